#!/usr/bin/env python
"""Write the demo's text, a part of each domain held out for evaluation.

    python scripts/demo_data.py --output_dir outputs/demo/data
    python scripts/demo_data.py --output_dir outputs/demo/data --data mine=mine.txt yours=yours.jsonl

By default two domains that every Python ships with. manual: the language reference (pydoc_data.topics); code: source of
the standard library.
"""

import inspect
import pydoc_data.topics
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

from modeling_moe.data.documents import DataArguments, cut_documents, hold_out
from modeling_moe.utils.command_line import parse, run
from modeling_moe.utils.folders import whole_folder


CODE = (
    "argparse ast bisect calendar codecs configparser contextlib csv dataclasses difflib dis enum fractions functools"
)
HELD_OUT_CODE = "heapq shlex string textwrap"
HELD_OUT_TOPICS = 5
HELD_OUT_PART = 0.05


@dataclass
class Arguments:
    """Where to write, and how much."""

    output_dir: str = field(metadata={"help": "folder for DOMAIN_train.txt and DOMAIN_eval.txt"})
    data: list[str] = field(default_factory=list, metadata={"help": "domain=source ..., as of finetune.py"})
    seed: int = field(default=0, metadata={"help": "seed of what is held out of your own data"})
    overwrite: bool = field(default=False, metadata={"help": "replace what an earlier run wrote there"})


def without(text: str, seen: str) -> str:
    """The paragraphs of `text` that `seen` does not contain."""
    return "\n\n".join(paragraph for paragraph in text.split("\n\n") if paragraph not in seen)


def python_domains() -> dict[str, tuple[str, str]]:
    """Training and held-out text of each domain, other topics and other modules."""
    topics = sorted(pydoc_data.topics.topics.items())
    manual = "\n".join(text for i, (_, text) in enumerate(topics) if i % HELD_OUT_TOPICS)
    # topics quote each other
    held_out = "\n".join(without(text, manual) for _, text in topics[::HELD_OUT_TOPICS])
    code, held_out_code = (
        "\n".join(inspect.getsource(import_module(name)) for name in names.split()) for names in (CODE, HELD_OUT_CODE)
    )
    return {"manual": (manual, held_out), "code": (code, without(held_out_code, code))}


def own_domains(data: list[str], seed: int) -> dict[str, tuple[str, str]]:
    """Training and held-out text of the user's sources."""
    domains = {}
    for name, documents in DataArguments(data=data).load().items():
        parts = hold_out(cut_documents(documents), HELD_OUT_PART, seed)
        domains[name] = tuple("".join(part["text"]) for part in parts)
    return domains


def main() -> None:
    """Writes the files and prints their sizes."""
    (args,) = parse([Arguments], __doc__)
    domains = own_domains(args.data, args.seed) if args.data else python_domains()
    recipe = {"method": "demo_data", "data": args.data, "seed": args.seed}
    with whole_folder(args.output_dir, recipe, args.overwrite) as folder:
        for name, texts in domains.items():
            for part, text in zip(("train", "eval"), texts, strict=True):
                (folder / f"{name}_{part}.txt").write_text(text, encoding="utf-8")
                print(f"{Path(args.output_dir) / f'{name}_{part}.txt'}: {len(text):,} characters")


if __name__ == "__main__":
    run(main)
