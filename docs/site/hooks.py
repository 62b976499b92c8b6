"""MkDocs hooks: pages from the repository's root join the site, and links to repository files are checked.

A link that leads from a page to a file outside docs/ becomes a link to the page that shows the file, or else plain text.
"""

import os
import re
from pathlib import Path

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File


ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
# file of the repository -> page of the site
ROOT_PAGES = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "README.md": "index.md",
}
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|#|mailto:)([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files, config):
    """Adds the pages of the repository's root."""
    for name, page in ROOT_PAGES.items():
        if page != "index.md":
            files.append(File.generated(config, page, content=(ROOT / name).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown, page, config, files):
    """Rewrites the links of a page that lead out of docs/.

    Raises:
        PluginError: for a link to a file that does not exist.
    """
    sources = {page_name: ROOT / name for name, page_name in ROOT_PAGES.items() if page_name != "index.md"}
    source = sources.get(page.file.src_uri, DOCS / page.file.src_uri)

    def rewrite(match: re.Match) -> str:
        picture, text, path, anchor = match.groups()
        target = Path(os.path.normpath(source.parent / path))
        name = target.relative_to(ROOT).as_posix()
        if not target.exists():
            raise PluginError(f"{source.relative_to(ROOT)}: the link leads to {name}, which does not exist")
        if name in ROOT_PAGES:
            target = DOCS / ROOT_PAGES[name]
        if not target.is_relative_to(DOCS):
            return text
        relative = os.path.relpath(target, (DOCS / page.file.src_uri).parent)
        return f"{picture}[{text}]({Path(relative).as_posix()}{anchor or ''})"

    return LINK.sub(rewrite, markdown)
