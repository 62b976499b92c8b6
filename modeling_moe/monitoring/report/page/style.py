# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module sets the look of all pictures and turns a matplotlib figure into SVG for the page and into a PNG file.

A picture's lines and texts have a few fixed colours, which the SVG names as CSS variables, so that the page turns them
light or dark. Colour maps stay as they are: viridis for amounts, and PuOr around a neutral middle for ratios; both can be
read by the colour-blind.
"""

import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.cm import ScalarMappable
from matplotlib.colorbar import Colorbar
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from PIL import Image

from .visible import shorten


INK, PAPER, MUTED, RULE = "#1d2129", "#fefeff", "#5c6471", "#cfd4db"
BLUE, ORANGE = "#0b5fa6", "#b9530b"
# a colour of the light page -> the CSS variable that holds the colour of the light or the dark page
VARIABLES = {INK: "--ink", PAPER: "--page", MUTED: "--muted", RULE: "--rule", BLUE: "--blue", ORANGE: "--orange"}
RATIOS, AMOUNTS = "PuOr_r", "viridis"
# inches; side by side, two models have narrower pictures, so that their text stays readable
WIDTH, HALF_WIDTH = 9.0, 6.3
PNG_DPI = 140
# of what is drawn as a raster inside an SVG
RASTER_DPI = 200
STYLE = {
    "axes.edgecolor": MUTED,
    "axes.facecolor": "none",
    "axes.labelcolor": INK,
    "axes.labelsize": 9,
    "axes.linewidth": 0.6,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 9.5,
    "figure.facecolor": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # matplotlib brings this font, so that a picture is equal on every machine
    "font.size": 9,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "hatch.color": RULE,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "svg.fonttype": "none",  # text stays text: it can be searched and recoloured
    "svg.hashsalt": "modeling_moe",  # equal figures get equal ids
    "text.color": INK,
    "text.parse_math": False,  # names may contain dollar signs
    "xtick.color": MUTED,
    "xtick.labelcolor": INK,
    "xtick.labelsize": 8,
    "xtick.major.size": 2.5,
    "xtick.major.width": 0.6,
    "ytick.color": MUTED,
    "ytick.labelcolor": INK,
    "ytick.labelsize": 8,
    "ytick.major.size": 2.5,
    "ytick.major.width": 0.6,
}


@dataclass(frozen=True)
class Cells:
    """The values of one heat map, which the page names where the pointer is.

    Attributes:
        axes: the axes that the heat map fills.
        values: (R, C); NaN where there is nothing to see.
        rows: R names.
        columns: C names.
        unit: text behind a value.
    """

    axes: Axes
    values: np.ndarray
    rows: Sequence[str]
    columns: Sequence[str]
    unit: str


@dataclass(frozen=True)
class Drawing:
    """One picture, which the page offers under a label such as `layer 3`."""

    label: str
    figure: Figure
    cells: list[Cells] = field(default_factory=list)


@contextmanager
def style() -> Iterator[None]:
    """Applies the look within a `with` block; a glyph that the font lacks is drawn as a box, without a warning."""
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        yield


def name(text: str, limit: int = 28) -> str:
    """Returns a user's name of a domain or a model as a picture shows it."""
    return shorten(text, limit)


def colour_map(of: str) -> Colormap:
    """Returns a colour map that leaves cells without a value transparent."""
    return matplotlib.colormaps[of].with_extremes(bad=(0, 0, 0, 0))


def heat_map(
    axes: Axes, values: np.ndarray, colours: str, norm: Normalize, texts: Sequence[Sequence[str]] | None = None
) -> AxesImage:
    """Draws values (R, C) as a raster; `texts` are written into the cells, dark on light and light on dark.

    Cells without a value (NaN) are hatched.
    """
    shown = np.ma.masked_invalid(values)
    image = axes.imshow(shown, cmap=colour_map(colours), norm=norm, aspect="auto", interpolation="none")
    if np.ma.is_masked(shown):
        axes.patch.set(hatch="/////", facecolor="none")
    else:
        axes.patch.set_visible(False)
    for row, texts_of_row in enumerate(texts or ()):
        for column, text in enumerate(texts_of_row):
            if text:
                dark = np.dot(image.cmap(image.norm(values[row, column]))[:3], (0.2126, 0.7152, 0.0722)) < 0.45
                axes.text(
                    column, row, text, ha="center", va="center_baseline", size=7.5, color="white" if dark else "black"
                )
    return image


def with_scale(
    figure: Figure,
    lines: int = 1,
    columns: int = 1,
    *,
    height: float = 2.0,
    width_ratios: Sequence[float] | None = None,
) -> tuple[Axes, list[Axes]]:
    """Returns axes for a colour scale at the top left and, below it, `lines` x `columns` axes, line by line.

    Args:
        figure: empty figure of constrained layout.
        lines: number of lines.
        columns: number of columns.
        height: inches of a line, about.
        width_ratios: relative widths of the columns.
    """
    grid = figure.add_gridspec(
        lines + 1, columns, height_ratios=[0.11, *[height] * lines], width_ratios=width_ratios or [1] * columns
    )
    scale = figure.add_subplot(grid[0, :])
    scale.set_box_aspect(1 / 40)
    scale.set_anchor("W")
    return scale, [figure.add_subplot(grid[1 + line, column]) for line in range(lines) for column in range(columns)]


def draw_scale(scale: Axes, image: ScalarMappable, label: str, extend: str = "neither") -> Colorbar:
    """Draws the colours of an image along `scale`, with the label above them."""
    figure = scale.get_figure(root=True)
    assert figure is not None
    bar = figure.colorbar(image, cax=scale, orientation="horizontal", extend=extend)
    bar.outline.set_visible(False)
    scale.set_title(label, size=8.5)
    return bar


def with_side_scale(width: float, height: float) -> tuple[Figure, Axes, Axes]:
    """Returns a figure of `width` x `height` inches with axes, and with axes for a colour scale at their right.

    Fixed margins take a third of the time of a layout; the page has many figures of this kind, one for each layer.
    """
    figure = Figure(figsize=(width, height))
    left, right, bottom, top = 0.65, 0.95, 0.55, 0.35
    axes = figure.add_axes((left / width, bottom / height, 1 - (left + right) / width, 1 - (bottom + top) / height))
    scale = figure.add_axes((1 - (right - 0.15) / width, bottom / height, 0.12 / width, 1 - (bottom + top) / height))
    return figure, axes, scale


def draw_side_scale(scale: Axes, image: ScalarMappable, label: str, extend: str = "neither") -> None:
    """Draws the colours of an image along `scale`, with the label beside them."""
    figure = scale.get_figure(root=True)
    assert figure is not None
    bar = figure.colorbar(image, cax=scale, extend=extend)
    bar.set_label(label, rotation_mode="anchor")
    bar.outline.set_visible(False)


def expert_names(count: int) -> list[str]:
    """Returns `expert 0`, `expert 1` and so on."""
    return [f"expert {expert}" for expert in range(count)]


def ticks(axes: Axes, which: str, names: Sequence[str], most: int) -> None:
    """Names the rows (`which` is "y") or columns ("x") of a heat map; of many, every second, fourth, eighth ... is named."""
    step = 1
    while len(names) / step > most:
        step *= 2
    places = range(0, len(names), step)
    (axes.set_xticks if which == "x" else axes.set_yticks)(places, [names[place] for place in places])


def svg(drawing: Drawing, key: str) -> str:
    """Returns the figure as an SVG element to write into a page; `key` makes the ids unique within the page."""
    stream = io.StringIO()
    no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    drawing.figure.set_dpi(RASTER_DPI)
    # savefig would draw twice, once for the layout alone; drawing makes the layout too
    FigureCanvasSVG(drawing.figure).print_svg(stream, metadata=no_metadata)
    drawing.figure.set_layout_engine("none")  # the places stay, and a PNG file needs no second layout
    text = re.sub(r"<!--.*?-->\s*", "", stream.getvalue(), flags=re.DOTALL)
    size = re.search(r'viewBox="[^"]*"', text)
    content = text[
        text.index("</defs>", text.index("<svg")) + len("</defs>") :
    ]  # the first <defs> holds a global style
    assert size is not None
    content = re.sub(r'\bid="', f'id="{key}-', content)
    content = content.replace("url(#", f"url(#{key}-").replace('xlink:href="#', f'href="#{key}-')
    content = content.replace("xlink:href", "href")
    content = re.sub(
        r'(<image [^>]*?)\sid="[^"]*"', r"\1", content
    )  # nothing refers to it, and equal images have equal ids
    for colour, variable in VARIABLES.items():
        content = content.replace(colour, f"var({variable})")
    return f'<svg {size[0]} aria-hidden="true">{content.strip()}'


def png(figure: Figure, dpi: int = PNG_DPI) -> bytes:
    """Returns the figure as a PNG file on a white ground."""
    figure.set(dpi=dpi, facecolor="white")
    canvas, stream = FigureCanvasAgg(figure), io.BytesIO()
    canvas.draw()
    # 256 colours look the same and take a third of the bytes
    picture = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    picture.quantize(256, dither=Image.Dither.NONE).save(stream, "png", optimize=True)
    return stream.getvalue()


def boxes(drawing: Drawing) -> list[dict]:
    """Returns the place (left, top, right, bottom as shares of the picture) and the values of each heat map.

    The figure must have been drawn: only then are the places known.
    """
    found = []
    for cells in drawing.cells:
        place = cells.axes.get_position()
        values = [[_short(value) for value in row] for row in np.asarray(cells.values, dtype=float)]
        box = [round(float(side), 4) for side in (place.x0, 1 - place.y1, place.x1, 1 - place.y0)]
        found.append(
            {
                "box": box,
                "rows": list(cells.rows),
                "columns": list(cells.columns),
                "values": values,
                "unit": cells.unit,
            }
        )
    return found


def _short(value: float) -> float | None:
    """Returns three significant digits of a value; None for NaN and infinity, which JSON lacks."""
    return float(f"{value:.3g}") if np.isfinite(value) else None
