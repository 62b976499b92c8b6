# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This package writes a routing report as one self-contained HTML page and as PNG files.

matplotlib draws all pictures, once for the page (SVG) and once for the files (PNG). It was chosen over the scripts of plotly
and vega, which add megabytes to each page: an SVG needs no script to be seen, so that the page prints, opens from disk in a
fraction of a second, and takes the colours of light and dark from CSS, and PNG files need no browser. Heat maps are small
rasters inside the SVG, so that 64 experts in 16 layers cost one element, not a thousand. The page's own script only chooses
what to show, names the cell under the pointer, and lists tokens; it draws nothing.
"""

import base64
import hashlib
import importlib.util
from pathlib import Path
from typing import Any

from ....utils.atomic import write_bytes, write_text
from ....utils.errors import UserError
from ..data import RoutingReport


HERE = Path(__file__).parent
# pixels per inch of a model card's pictures, 9 inches wide
CARD_DPI = 133


def require_matplotlib() -> None:
    """Raises UserError if matplotlib is not installed; a command calls this before it computes anything."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError('the report draws with matplotlib, which is not installed: pip install "modeling-moe[plot]"')


def write_report(report: RoutingReport, folder: str | Path) -> list[Path]:
    """Writes `report.html` and, for the first picture of each section, a PNG file; equal reports give equal bytes.

    Args:
        report: the figures; texts in them may hold anything.
        folder: folder for the files, which is made if it is missing; files of equal names are replaced.

    Returns:
        The files, the page first. With two models, the second one's pictures end in `_2.png`.

    Raises:
        UserError: if matplotlib is not installed.
    """
    require_matplotlib()
    from .sections import sections
    from .style import Drawing, png, style

    with style():
        parts = sections(report)
        page = _page(report, parts)
        pictures: dict[str, Drawing] = {}
        for part in parts:
            for place, drawings in enumerate(part.groups):
                pictures[f"{part.key}{'' if place == 0 else f'_{place + 1}'}.png"] = drawings[0]
        images = {file: png(drawing.figure) for file, drawing in pictures.items()}
    folder = Path(folder)
    files = _write(images, folder)
    write_text(folder / "report.html", page)  # last, so that a page never lacks its pictures
    return [folder / "report.html", *files]


def card_pictures(report: RoutingReport, folder: str | Path) -> list[Path]:
    """Writes two PNG files of about 1200 pixels' width for a model card: the load by layer, and specialisation by domain.

    Args:
        report: the figures; the last model is drawn, which is the one after training where two are compared.
        folder: folder for `routing_load.png` and `routing_specialisation.png`, which is made if it is missing.

    Returns:
        The two files; only the first with fewer than two domains.

    Raises:
        UserError: if matplotlib is not installed.
        ValueError: if the report holds no model.
    """
    require_matplotlib()
    from .sections import CARD
    from .style import png, style

    if not report.models:
        raise ValueError("card_pictures needs a report with a model, and this one holds only a history.")
    model = report.models[-1]
    with style():
        chosen = list(CARD.items())[: 1 if len(model.domains) < 2 else 2]
        images = {file: png(draw(model).figure, CARD_DPI) for file, draw in chosen}
    return _write(images, Path(folder))


def _page(report: RoutingReport, parts: list[Any]) -> str:
    """Returns the page's HTML; the only script that may run is the one whose hash the page's policy names."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    from . import words
    from .style import boxes, svg
    from .token_data import model_data, text_data, to_json, top_data
    from .visible import shorten, visible

    script = (HERE / "report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"visible": visible, "shorten": shorten, "to_json": to_json}
    return environment.get_template("report.html.jinja").render(
        models=report.models,
        changes=report.changes,
        sections=parts,
        words=words,
        svg=lambda drawing, key: Markup(svg(drawing, key)),  # matplotlib escapes the texts of an SVG
        boxes=boxes,
        model_data=model_data,
        text_data=text_data,
        top_data=top_data,
        style=Markup((HERE / "report.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hash=f"sha256-{digest}",
    )


def _write(images: dict[str, bytes], folder: Path) -> list[Path]:
    """Writes pictures by file name into a folder, which is made if it is missing, and returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    for file, data in images.items():
        write_bytes(folder / file, data)
    return [folder / file for file in images]
