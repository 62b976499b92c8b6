#!/usr/bin/env python
"""Write the page of a GPU check from the results of `bash scripts/gpu_check.sh`, and print proposed tiles for the
kernels.

    python scripts/gpu_report.py outputs/gpu/results.jsonl
    python scripts/gpu_report.py call1.jsonl call2.jsonl --output docs/speed-gpu.md

If several files contain a part of the check, the last file is used. A figure is drawn beside the page if matplotlib
is installed.
"""

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

from moe_benchmark.gpu import figures, report, tile_table
from moe_benchmark.gpu.results import read
from moe_benchmark.gpu.targets import TARGETS

from modeling_moe.utils.command_line import run
from modeling_moe.utils.errors import UserError


def main() -> None:
    """Writes the page and the figure, and prints the targets and the tiles."""
    parser = ArgumentParser("gpu_report.py", None, __doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument(
        "results", nargs="*", default=["outputs/gpu/results.jsonl"], help="JSON Lines files of results"
    )
    parser.add_argument("--output", type=Path, default=Path("docs/speed-gpu.md"), help="Markdown page to write")
    arguments = parser.parse_args()
    if not arguments.output.parent.is_dir():
        raise UserError(f"output {arguments.output}: make the folder {arguments.output.parent} first")
    rows = report.latest([read(path) for path in arguments.results])
    figure = arguments.output.with_suffix(".png")
    drawn = figures.can_draw() and figures.draw(rows, figure)
    if not figures.can_draw():
        print("no figure: matplotlib is not installed (pip install 'modeling-moe[plot]')")
    arguments.output.write_text(report.markdown(rows, figure.name if drawn else None))
    for target in TARGETS:
        print(": ".join(target.cells(rows)).replace("**", ""))
    proposed = tile_table.propose(rows)
    if proposed is not None:
        family, numbers, entries = proposed
        print(f'\nfor tiles.CONFIGS["{family}"]:\n{tile_table.as_text(numbers, entries)}')
    decoding = tile_table.propose_decoding(rows)
    if decoding is not None:
        print(f"for tiles.DECODING: {decoding}")
    print(f"\nwritten to {arguments.output}")


if __name__ == "__main__":
    run(main)
