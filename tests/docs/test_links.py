"""Links, anchors, paths, names and flags on the pages exist; `bash scripts/docs.sh` checks the built site too."""

import ast
import pkgutil
import re
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import yaml

import modeling_moe
from tests.docs.blocks import ROOT, pages


PAGES = pages()
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
# the names in a changelog are those of the time
CURRENT = [name for name in NAMES if name != "CHANGELOG.md"]
DOCS = ROOT / "docs"
FENCE = re.compile(r"^```.*?^```$", flags=re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
REFERENCE = re.compile(r"\[`~?([\w.]+)`\](?:\[([\w.]*)\])?")
# pages of the site that scripts/docs.sh makes of files in the repository's root
GENERATED = {"changelog.md", "contributing.md", "security.md"}
# what inline code on the pages names although it is not in the repository
ELSEWHERE = {"docs/speed-gpu.md"}


@cache
def prose(page: Path) -> str:
    """Returns the text of a page without its code blocks."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


@cache
def anchors(page: Path) -> set[str]:
    """Returns the anchors of a page's headings; the rules of GitHub and MkDocs agree on these headings."""
    found = set()
    for heading in re.findall(r"^#+ (.+)$", prose(page), flags=re.MULTILINE):
        text = re.sub(r"[^\w\s-]", "", heading).strip().lower()
        assert "  " not in text, f"{page.name}: GitHub and MkDocs name the heading {heading!r} differently"
        found.add(text.replace(" ", "-"))
    return found


def inline_code(page: Path) -> list[str]:
    """Returns the inline code of a page."""
    return re.findall(r"`([^`\n]+)`", prose(page))


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_to_files_and_headings(page):
    for link in LINK.findall(prose(page)):
        if link.startswith(("https://", "mailto:")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_file(), f"{link} leads nowhere"
        assert not anchor or anchor in anchors(target), f"{link}: no heading has this name"


def test_every_page_is_in_the_navigation():
    def leaves(entry) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        return [leaf for child in (entry.values() if isinstance(entry, dict) else entry) for leaf in leaves(child)]

    # the file holds no tags, so that the safe loader reads it
    listed = leaves(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    assert len(listed) == len(set(listed))
    assert set(listed) == {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")} | GENERATED
    index = prose(DOCS / "index.md")
    for page in set(listed) - GENERATED - {"index.md"}:
        assert f"({page})" in index or page.startswith("api/"), f"index.md does not link {page}"
        assert index.count(f"({page})") < 2, f"index.md links {page} twice"


@pytest.mark.parametrize("name", CURRENT)
def test_inline_paths_exist(name):
    folders = ("modeling_moe/", "scripts/", "configuration/", "tests/", "docs/")
    for code in inline_code(ROOT / name):
        for word in code.split():
            if word.startswith(folders) and not re.search(r"\*|[A-Z]{4}", word) and word not in ELSEWHERE:
                assert (ROOT / word.partition("::")[0]).exists(), f"{word} does not exist"


def resolve(name: str) -> object:
    """Returns the object of a dotted name, importing as many modules as it names."""
    parts = name.split(".")
    module, found = parts[0], import_module(parts[0])
    for part in parts[1:]:
        module = f"{module}.{part}"
        if hasattr(found, part) and not (
            isinstance(found, ModuleType) and not isinstance(getattr(found, part), ModuleType) and _is_module(module)
        ):
            found = getattr(found, part)
        else:
            found = import_module(module)
    return found


def _is_module(name: str) -> bool:
    try:
        return isinstance(import_module(name), ModuleType)
    except ImportError:
        return False


@pytest.mark.parametrize("name", CURRENT)
def test_inline_names_import(name):
    for code in inline_code(ROOT / name):
        if match := re.match(r"(modeling_moe(?:\.\w+)+)(?!/)", code):
            if match[1].endswith(".py"):
                continue
            try:
                resolve(match[1])
            except (ImportError, AttributeError) as error:
                raise AssertionError(f"{match[1]} does not exist") from error


def test_api_pages_name_modules():
    names = [
        name
        for page in (DOCS / "api").glob("*.md")
        for name in re.findall(r"^::: (\S+)", page.read_text(), flags=re.MULTILINE)
    ]
    assert len(names) == len(set(names)) > 40
    for name in names:
        assert isinstance(import_module(name), ModuleType), name
    saved_with_checkpoints = {f"modeling_moe.{file.stem}" for file in (ROOT / "modeling_moe").glob("[!_]*.py")}
    assert saved_with_checkpoints <= set(names), saved_with_checkpoints - set(names)


MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(modeling_moe.__path__, "modeling_moe.")
    if not module.name.endswith("__main__")
)


def docstrings(module: ModuleType):
    """Yields the docstrings of a module, each with the name of the class around it, or None."""
    tree = ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))
    holders = [(tree, None)]
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            holders += [(node, node.name)] + [
                (child, node.name) for child in node.body if isinstance(child, ast.FunctionDef)
            ]
        elif isinstance(node, ast.FunctionDef):
            holders.append((node, None))
    for node, owner in holders:
        if text := ast.get_docstring(node):
            yield text, owner


@pytest.mark.parametrize("name", MODULES)
def test_references_in_docstrings_resolve(name):
    if ".triton" in name:
        pytest.importorskip("triton")
    if name == "modeling_moe.serving.vllm_model":
        pytest.importorskip("vllm", reason="only vLLM imports this module")
    module = import_module(name)
    for text, owner in docstrings(module):
        for match in REFERENCE.finditer(text):
            target = match[2] or match[1]
            around = [modeling_moe, module, *([getattr(module, owner)] if owner else [])]
            if "." in target and target.split(".")[0] in ("modeling_moe", "transformers", "peft"):
                resolve(target)
                continue
            first, *rest = target.split(".")
            holder = next((place for place in reversed(around) if hasattr(place, first)), None)
            assert holder is not None, f"{name}: the reference to {target} leads nowhere"
            found = getattr(holder, first)
            for part in rest:
                found = getattr(found, part)
