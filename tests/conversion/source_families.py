"""This module writes docs/source-families.md: which MoE families of the installed transformers can be converted.

    python -m tests.conversion.source_families

It also writes the number of families into README.md, and removes the reasons of families that can be converted now.
"""

import functools
import json
import re
from pathlib import Path
from typing import NamedTuple

import transformers
from transformers import CONFIG_MAPPING
from transformers.models.auto.configuration_auto import model_type_to_module_name

from modeling_moe.conversion import DENSE_FAMILIES, SPARSE_FAMILIES
from modeling_moe.conversion.families.unread import REASONS_FILE, TOOLS, follows_interface, reasons
from modeling_moe.conversion.families.wrappers import WRAPPERS
from tests.monitoring.moe_families import experts_families, other_families


ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "source-families.md"
COUNT = re.compile(r"\d+ dense and \d+ sparse model families")
# names that transformers' configurations give to the number of routed experts
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


class SourceFamily(NamedTuple):
    """What the conversion does with a folder of transformers' models that has routed experts.

    Attributes:
        folder: name of the folder.
        read: model types in the folder that can be converted, sorted.
        reason: what a MoE lacks, or None if nobody wrote it down.
    """

    folder: str
    read: list[str]
    reason: str | None


def read_types() -> dict[str, list[str]]:
    """Returns the sparse model types that can be converted, wrappers included, by transformers' folder."""
    found: dict[str, list[str]] = {}
    for model_type in sorted({*SPARSE_FAMILIES, *WRAPPERS}):
        if model_type in CONFIG_MAPPING:
            found.setdefault(model_type_to_module_name(model_type), []).append(model_type)
    return found


@functools.cache
def folders() -> list[str]:
    """Returns the folders of the installed transformers that define experts, or a configuration with a number of experts."""
    configs = {model_type: CONFIG_MAPPING[model_type] for model_type in CONFIG_MAPPING}
    configured = {
        model_type_to_module_name(model_type)
        for model_type, config in configs.items()
        # other packages, and this one, register configurations too
        if config.__module__.startswith("transformers.")
        and any(hasattr(config, name) or name in config.attribute_map for name in EXPERTS)
    }
    return sorted({*experts_families(), *other_families(), *configured})


def source_families() -> list[SourceFamily]:
    """Returns every folder of [`folders`] with what the conversion does with it."""
    read, why = read_types(), reasons()
    return [SourceFamily(folder, read.get(folder, []), why.get(folder)) for folder in folders()]


def count() -> str:
    """Returns the text of README.md that counts the families."""
    return f"{len(DENSE_FAMILIES)} dense and {len(SPARSE_FAMILIES)} sparse model families"


def _codes(names) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _line(row: SourceFamily) -> str:
    tools = "" if row.read else "yes" if follows_interface(row.folder) else "no"
    return f"| `{row.folder}` | {_codes(row.read)} | {row.reason or ''} | {tools} |"


HEADER = """# Which MoE families can be converted

<!-- python -m tests.conversion.source_families writes this page -->

[`moe convert`](conversion.md) reads {count}. The table has every folder of transformers {release} with routed experts: classes
that hold them, or a configuration that counts them. `moe convert` reads {read} of the {all} folders.

{tools}, if its experts follow transformers' experts interface. The last column says so of the families that are not read; [what is
recorded of each family](routing-families.md) and [the experts classes](experts-classes.md) have the details.

| folder | read as | what a MoE lacks | tools |
|---|---|---|---|
"""
WRAPPED = """
## Multimodal models

Of a multimodal model, the text model is read, and the result has the logits of the whole model for texts. The parts for images
and sound are left out: `moe convert` prints them, and `conversion.json` has their numbers of parameters. These are read:
{wrappers}.

## Others

`deepseek` (DeepSeek-MoE) is a sparse family for which transformers has no class. The dense families are {dense}.
"""


def page() -> str:
    """Returns the text of docs/source-families.md."""
    table = source_families()
    lines = [_line(row) for row in table]
    header = HEADER.format(
        count=count(),
        release=transformers.__version__,
        read=sum(bool(row.read) for row in table),
        all=len(table),
        tools=TOOLS[0].upper() + TOOLS[1:],
    )
    return (
        header
        + "\n".join(lines)
        + "\n"
        + WRAPPED.format(wrappers=_codes(WRAPPERS), dense=_codes(sorted(DENSE_FAMILIES)))
    )


def main() -> None:
    """Removes the reasons of families that are read, then writes the page and the number in README.md."""
    kept = {folder: reason for folder, reason in sorted(reasons().items()) if folder not in read_types()}
    REASONS_FILE.write_text(json.dumps(kept, indent=2) + "\n", "utf-8")
    PAGE.write_text(page(), "utf-8")
    readme = ROOT / "README.md"
    readme.write_text(COUNT.sub(count(), readme.read_text("utf-8")), "utf-8")


if __name__ == "__main__":
    main()
