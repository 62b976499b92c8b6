# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""One part of the GPU check, or the summary of all; `bash scripts/gpu_check.sh` gives each a process and a limit.

    python -m moe_benchmark.gpu environment --output outputs/gpu
    python -m moe_benchmark.gpu summary --output outputs/gpu

A part that ends exits with 0, whatever it found: what failed is in the results. The summary exits with 1 if anything
failed.
"""

import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from importlib import import_module
from pathlib import Path

import torch

from modeling_moe.utils.command_line import run
from modeling_moe.utils.errors import UserError

from .compilations import cache_use
from .results import FILE, DeviceLost, Results, read
from .sizes import SIZES
from .summary import print_summary


DEVICE_LOST = 3
# part -> its module
PARTS = {
    "environment": "environment",
    "precompile": "precompile",
    "tests": "kernel_tests",
    "correctness": "correctness",
    "comparison": "comparison",
    "kernels": "kernels",
    "sweep": "sweep",
    "lora": "lora",
    "memory": "memory",
    "science": "science",
}


def _arguments() -> Namespace:
    parser = ArgumentParser("moe_benchmark.gpu", None, __doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=[*PARTS, "summary"])
    parser.add_argument("--output", type=Path, default=Path("outputs/gpu"), help="folder of the results")
    parser.add_argument(
        "--until", type=float, default=float("inf"), help="epoch seconds after which nothing new begins"
    )
    parser.add_argument("--size", choices=SIZES, default="full", help="tiny for a run without a GPU")
    return parser.parse_args()


def main() -> None:
    """Runs the part, and writes that it ended."""
    arguments = _arguments()
    if not arguments.output.is_dir():
        raise UserError(f"output {arguments.output}: make the folder first")
    path = arguments.output / FILE
    if arguments.part == "summary":
        sys.exit(print_summary(read(path)))
    # precompile does not ask, since who has asked must not fork
    if arguments.part != "precompile" and not torch.cuda.is_available():
        raise UserError("torch sees no GPU here: run the check where there is one")
    results = Results(path, arguments.part, arguments.until)
    try:
        with cache_use() as kernels, results.attempt(what="the part"):
            import_module(f".{PARTS[arguments.part]}", __package__).run(results, SIZES[arguments.size])
    except DeviceLost:
        # recorded already; what else the process does on the GPU fails too
        sys.exit(DEVICE_LOST)
    results.put(ended=True, kernels=dict(kernels))


if __name__ == "__main__":
    run(main)
