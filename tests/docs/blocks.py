"""This module finds the fenced code blocks of a Markdown page and says how each one is tested.

A comment on the line before a fence chooses another treatment than running:

    <!-- not run: REASON -->    Python is compiled, and the flags of each command are parsed by the command's own parser.
    <!-- output -->             The block shows what the block before it prints; the first words of its rows are compared.
"""

import re
from pathlib import Path
from typing import NamedTuple


ROOT = Path(__file__).parents[2]
LANGUAGES = ("python", "bash", "text")
# programs write these pages, and other tests compare them
GENERATED = ("docs/config.md", "docs/experts-classes.md", "docs/gpu-kernels.md", "docs/routing-families.md", "docs/source-families.md")
COMMENT = re.compile(r"<!-- (not run|output)(?:: (.+))? -->")


class Block(NamedTuple):
    """A fenced code block.

    Attributes:
        page: the Markdown file.
        line: number of the block's first line of code, from 1.
        language: one of `LANGUAGES`.
        code: the text between the fences.
        treatment: "run", "not run" or "output".
    """

    page: Path
    line: int
    language: str
    code: str
    treatment: str

    @property
    def place(self) -> str:
        """Returns the page and line of the block, for messages."""
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def pages() -> list[Path]:
    """Returns the hand-written Markdown pages of the repository."""
    flat = [page for folder in (".", "configuration", "model_cards") for page in (ROOT / folder).glob("*.md")]
    deep = [page for folder in ("docs", ".github") for page in (ROOT / folder).rglob("*.md")]
    return sorted(flat + deep)


def find_blocks(page: Path) -> list[Block]:
    """Returns the blocks of `page` in the order of the page.

    Raises:
        ValueError: for a block without a known language, a treatment without its reason, and an unclosed fence.
    """
    blocks, lines, treatment, start = [], page.read_text(encoding="utf-8").splitlines(), "run", None
    for number, line in enumerate(lines, start=1):
        where = f"{page.relative_to(ROOT)}:{number}"
        if start is not None:
            if line.strip() == "```":
                first, language, chosen = start
                blocks.append(Block(page, first, language, "\n".join(lines[first - 1 : number - 1]) + "\n", chosen))
                start = None
        elif line.startswith("```"):
            language = line.removeprefix("```")
            if language not in LANGUAGES:
                raise ValueError(f"{where}: the block has the language {language!r}: choose one of {LANGUAGES}")
            start, treatment = (number + 1, language, treatment), "run"
        elif match := COMMENT.fullmatch(line.strip()):
            treatment, reason = match.groups()
            if (treatment == "output") != (reason is None):
                raise ValueError(f"{where}: {treatment!r} needs a reason, and only `output` has none")
        elif line.strip():
            treatment = "run"
    if start is not None:
        raise ValueError(f"{page.relative_to(ROOT)}:{start[0]}: the fence is not closed")
    return blocks
