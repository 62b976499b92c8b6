# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""Run one part of the GPU check, or print the summary of all; `bash scripts/gpu_check.sh` runs each part in a
process.

    python -m moe_benchmark.gpu environment --output outputs/gpu
    python -m moe_benchmark.gpu summary --output outputs/gpu

A part exits with 0 whatever it finds; failures are in the results. The summary exits with 1 if anything failed.
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
        "--until", type=float, default=float("inf"), help="seconds since the epoch after which nothing new starts"
    )
    parser.add_argument(
        "--size", choices=SIZES, default="full", help="size of the check: full, or tiny for a run without a GPU"
    )
    return parser.parse_args()


def main() -> None:
    """Runs the part, and records that it ended."""
    arguments = _arguments()
    if not arguments.output.is_dir():
        raise UserError(f"output {arguments.output}: make the folder first")
    path = arguments.output / FILE
    if arguments.part == "summary":
        sys.exit(print_summary(read(path)))
    # part precompile does not look for a GPU, because a process that has done it must not fork
    if arguments.part != "precompile" and not torch.cuda.is_available():
        raise UserError("torch finds no GPU: run the check on a machine with a GPU")
    results = Results(path, arguments.part, arguments.until)
    try:
        with cache_use() as kernels, results.attempt(what="the part"):
            import_module(f".{PARTS[arguments.part]}", __package__).run(results, SIZES[arguments.size])
    except DeviceLost:
        # the failure is recorded, and everything else on this GPU would fail in this process
        sys.exit(DEVICE_LOST)
    results.put(ended=True, kernels=dict(kernels))


if __name__ == "__main__":
    run(main)
