"""The code blocks of README.md and of each page run in the order of the page, in a folder of tiny models."""

import doctest
import re
from importlib import import_module

import pytest

from modeling_moe.router_catalogue import ROUTERS
from tests.docs.blocks import GENERATED, ROOT, Block, find_blocks, pages
from tests.docs.commands import Shell


WRITTEN = [page for page in pages() if str(page.relative_to(ROOT)) not in GENERATED]
BLOCKS = {page: blocks for page in WRITTEN if (blocks := find_blocks(page))}
NAMES = {page: str(page.relative_to(ROOT)) for page in BLOCKS}
RUN = [page for page, blocks in BLOCKS.items() if any(block.treatment == "run" for block in blocks)]


def row_titles(text: str) -> set[str]:
    """Returns the first cell of each row of the tables that rich prints, and the title row's cells."""
    rows = re.findall(r"^[│┃]([^│┃]*)[│┃]", text, flags=re.MULTILINE)
    return {row.strip() for row in rows} - {""}


def run_page(blocks: list[Block], monkeypatch, capsys) -> None:
    """Runs the blocks of a page, Python in one namespace; a traceback shows the page and the line."""
    namespace: dict[str, object] = {"__name__": "page"}
    printed = ""
    for block in blocks:
        if block.treatment == "output":
            missing = row_titles(block.code) - row_titles(printed)
            assert not missing, f"{block.place}: the block before does not print {missing}"
            assert row_titles(block.code), f"{block.place}: the output has no table"
        elif block.treatment == "not run" or block.language == "text":
            continue
        elif block.language == "python":
            code = "\n" * (block.line - 1) + block.code
            exec(compile(code, block.page, "exec"), namespace)
            printed = capsys.readouterr().out
        else:
            Shell(monkeypatch)(block)
            printed = capsys.readouterr().out


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    """Rich would wrap the tables in a narrow terminal."""
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture(autouse=True)
def unchanged_catalogue(monkeypatch):
    """A page may add its own router to the catalogue."""
    before = dict(ROUTERS)
    yield
    ROUTERS.clear()
    ROUTERS.update(before)


@pytest.mark.parametrize("page", RUN, ids=NAMES.get)
def test_blocks(page, workspace, uploads, monkeypatch, capsys):
    run_page(BLOCKS[page], monkeypatch, capsys)


@pytest.mark.parametrize("page", BLOCKS, ids=NAMES.get)
def test_blocks_that_do_not_run(page, monkeypatch, workspace, capsys):
    shell = Shell(monkeypatch, run=False)
    for block in BLOCKS[page]:
        if block.language == "python":
            compile("\n" * (block.line - 1) + block.code, page, "exec")
        elif block.language == "bash" and block.treatment == "not run":
            shell(block)


def test_a_wrong_flag_is_noticed(monkeypatch, capsys):
    block = Block(ROOT / "README.md", 1, "bash", "moe generate --no_such_flag 1\n", "not run")
    with pytest.raises(AssertionError, match=r"README.md:1: `moe generate --no_such_flag 1` ended with 2"):
        Shell(monkeypatch, run=False)(block)


@pytest.mark.parametrize(
    "module", ["configuration_moe", "dispatch.interface", "evaluation.hf_metrics", "offload.offloading"]
)
def test_docstring_examples(module):
    result = doctest.testmod(import_module(f"modeling_moe.{module}"))
    assert result.attempted > 0
    assert result.failed == 0
