#!/usr/bin/env python
"""Write the demo's text; a part of each domain is held out for evaluation.

    python scripts/demo_data.py --output_dir outputs/demo/data
    python scripts/demo_data.py --output_dir outputs/demo/data --data mine=mine.txt yours=yours.jsonl

Without --data there are two domains from Python itself: manual is the language reference (pydoc_data.topics), and
code is source code of the standard library.
"""

import inspect
import pydoc_data.topics
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

from modeling_moe.data import DataArguments, cut_documents, hold_out
from modeling_moe.utils.command_line import parse, run
from modeling_moe.utils.folders import whole_folder


# modules of the standard library to train on
CODE = (
    "argparse ast bisect calendar codecs configparser contextlib csv dataclasses difflib dis enum fractions functools"
)
HELD_OUT_CODE = "heapq shlex string textwrap"
HELD_OUT_TOPICS = 5
HELD_OUT_PART = 0.05


@dataclass
class Arguments:
    """These arguments name the output folder and the text."""

    output_dir: str = field(metadata={"help": "folder for DOMAIN_train.txt and DOMAIN_eval.txt"})
    data: list[str] = field(default_factory=list, metadata={"help": "texts, each as domain=source, see finetune.py"})
    seed: int = field(default=0, metadata={"help": "seed of the choice of held-out text in --data"})
    overwrite: bool = field(default=False, metadata={"help": "replace the result of an earlier run"})


def without(text: str, seen: str) -> str:
    """Returns the paragraphs of `text` that `seen` does not contain."""
    return "\n\n".join(paragraph for paragraph in text.split("\n\n") if paragraph not in seen)


def python_domains() -> dict[str, tuple[str, str]]:
    """Returns training and held-out text of each domain, from different topics and different modules."""
    topics = sorted(pydoc_data.topics.topics.items())
    manual = "\n".join(text for i, (_, text) in enumerate(topics) if i % HELD_OUT_TOPICS)
    # topics quote each other, so that quoted paragraphs are removed
    held_out = "\n".join(without(text, manual) for _, text in topics[::HELD_OUT_TOPICS])
    code, held_out_code = (
        "\n".join(inspect.getsource(import_module(name)) for name in names.split()) for names in (CODE, HELD_OUT_CODE)
    )
    return {"manual": (manual, held_out), "code": (code, without(held_out_code, code))}


def own_domains(data: list[str], seed: int) -> dict[str, tuple[str, str]]:
    """Returns training and held-out text of the user's sources."""
    domains = {}
    for name, documents in DataArguments(data=data).load().items():
        training, held_out = hold_out(cut_documents(documents), HELD_OUT_PART, seed)
        domains[name] = ("".join(training["text"]), "".join(held_out["text"]))
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
