"""Tables and inline flags on the pages agree with the commands, the recipes and the routers."""

import re
import runpy
import sys
from argparse import ArgumentParser
from pathlib import Path
from typing import NoReturn

import pytest

from modeling_moe.commands.main import COMMANDS, run_command
from modeling_moe.router_catalogue import RENAMED_VALUES
from tests.docs.blocks import ROOT, find_blocks, pages
from tests.docs.commands import ParsedError
from tests.docs.test_links import CURRENT, inline_code


CONFIGURATION = ROOT / "configuration"
# flags of other programs that the pages mention
OTHER_FLAGS = {"--continuous-batching", "--config_file"}
# of vLLM, and of llama.cpp's converter of adapters
OTHER_FLAGS |= {"--enable-lora", "--max-lora-rank", "--lora-modules", "--base", "--model-impl", "--trust-remote-code"}


def rows(page: str, first: str) -> list[list[str]]:
    """Returns the cells of the table on `page` whose head starts with the cell `first`."""
    lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(f"| {first} |"))
    table = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        table.append([cell.strip().replace("\\|", "|") for cell in line.strip("|").split(" | ")])
    return table


@pytest.fixture
def parsers(monkeypatch) -> dict[str, ArgumentParser]:
    """Returns the parser of each command and of each script that is no command."""
    found: dict[str, ArgumentParser] = {}

    def keep(parser, *args, **kwargs) -> NoReturn:
        found[name] = parser
        raise ParsedError

    monkeypatch.setattr(ArgumentParser, "parse_known_args", keep)
    monkeypatch.setattr(sys, "argv", ["moe"])
    for name in COMMANDS:
        with pytest.raises(ParsedError):
            run_command(name, [f"moe {name}"])
    for script in sorted((ROOT / "scripts").glob("*.py")):
        name = script.name
        monkeypatch.setattr(sys, "argv", [name])
        with pytest.raises(ParsedError):
            runpy.run_path(str(script), run_name="__main__")
    monkeypatch.undo()
    return found


def test_inline_flags_belong_to_a_command(parsers):
    known = {flag for parser in parsers.values() for flag in parser._option_string_actions} | OTHER_FLAGS
    known |= {flag for script in (ROOT / "scripts").glob("*.sh") for flag in re.findall(r"--\w+", script.read_text())}
    for name in CURRENT:
        for code in inline_code(ROOT / name):
            for flag in re.findall(r"(?<![\w-])--[\w-]+", code):
                assert flag in known, f"{name}: {flag} is no flag of a command"


def test_each_upcycling_method_is_a_set_of_flags(parsers):
    table = rows("docs/upcycling.md", "Flags of `moe upcycle`")
    assert len(table) > 7
    for flags, _ in table:
        for line in re.findall(r"`([^`]+)`", flags):
            words = ["--model_name_or_path", "D", "--output_dir", "O", *line.split()]
            *_, unknown = parsers["upcycle"].parse_args_into_dataclasses(words, return_remaining_strings=True)
            assert not unknown, line


def test_the_table_of_commands_is_complete():
    table = rows("docs/commands.md", "Command")
    assert {row[0] for row in table} == {f"`moe {name}`" for name in COMMANDS}
    listed = {script for row in table for script in re.findall(r"scripts/(\w+\.py)", row[1])}
    listed |= {
        script for row in rows("docs/commands.md", "Script") for script in re.findall(r"scripts/(\w+\.\w+)", row[0])
    }
    own = {"demo_data.py", "demo_report.py", "setup_env.sh", "matrix.sh"}  # parts of other scripts
    assert {
        script.name for script in (ROOT / "scripts").glob("*.*") if script.suffix in (".py", ".sh")
    } - own == listed


def test_the_tree_names_every_sub_package():
    tree = (
        (ROOT / "docs" / "concepts.md")
        .read_text(encoding="utf-8")
        .partition("## The tree")[2]
        .partition("configuration/")[0]
    )
    packages = {file.parent.name for file in (ROOT / "modeling_moe").glob("*/__init__.py")}
    assert set(re.findall(r"^  (\w+)/ ", tree, re.MULTILINE)) == packages


def test_the_table_of_recipes_is_complete():
    names = {row[0].strip("`") for row in rows("docs/commands.md", "Recipe")}
    assert names == {file.stem for file in (CONFIGURATION / "recipes").glob("*.yaml")}


def test_old_names_of_routers_are_listed():
    listed = {tuple(re.findall(r"`(\w+)`", " ".join(row))) for row in rows("docs/routing.md", "Before")}
    assert listed == {pair for renamed in RENAMED_VALUES.values() for pair in renamed.items()}


def test_pages_name_no_path_of_a_machine():
    for page in pages():
        assert not re.search(r"/(?:home|work|root|tmp)/", page.read_text(encoding="utf-8")), page.name


def test_the_readme_is_short():
    assert len(Path(ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_the_kernels_of_a_pass_exist():
    (block,) = [block for block in find_blocks(ROOT / "docs" / "gpu.md") if block.language == "text"]
    kernels = set(re.findall(r"\b[a-z]+_[a-z_]+\b", block.code))
    assert len(kernels) > 6
    sources = (ROOT / "modeling_moe" / "dispatch" / "backends" / "triton").rglob("*.py")
    defined = {
        name for source in sources for name in re.findall(r"^def (\w+)", source.read_text(), flags=re.MULTILINE)
    }
    assert kernels <= defined, kernels - defined
