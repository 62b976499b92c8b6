"""This module writes a table of measured answers between two markers of a page."""

from collections.abc import Sequence
from pathlib import Path


def write_section(page: Path, name: str, versions: Sequence[str], lines: Sequence[str]) -> None:
    """Replaces the text between the markers `NAME: begin` and `NAME: end` of a page.

    Args:
        page: Markdown file.
        name: name in the markers.
        versions: programs that were measured, with their releases.
        lines: lines of the table.
    """
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    text = page.read_text(encoding="utf-8")
    before, rest = text.split(begin)
    after = rest.split(end)[1]
    section = "\n".join([begin, "", f"Measured with {', '.join(versions)}.", "", *lines, "", end])
    page.write_text(before + section + after, encoding="utf-8")
