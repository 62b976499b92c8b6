# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This command measures speed and memory of the experts: ours, transformers' own implementations, and the limit.

    moe benchmark --device cpu --output cpu.json
    moe benchmark --device cuda --output cuda.json
    moe benchmark --presets cpu_fine --tokens 1 2048 --dtypes float32 --routing balanced zipf all_to_one
    moe benchmark --level model --presets cpu_fine --implementations moe moe_recompute grouped_mm
    moe benchmark --what lora --threads 1
    moe benchmark --what lora --device cuda --presets olmoe --tokens 8192
    moe benchmark --what watching --threads 1
    moe benchmark --what offload --threads 1

All contestants take turns in one run, and ratios are medians over rounds in which all of them had one turn. Before a case is
measured, outputs and gradients of every contestant are compared with a loop over the experts in float64. If ours fails or
disagrees, the case reports the failure instead of a time, the run goes on, and the exit code is 1; another contestant that
fails is left out. The file of --output is complete after every case, so an interrupted run keeps what it has measured. The
limit of a pass is the dense products of the same FLOPs; the limit of decoding, where caches are emptied before each call, is
the active experts' bytes over the bandwidth of a copy (read plus written). Saved bytes are what autograd keeps besides
parameters and input. `--what lora` measures LoRA on experts here against PEFT's own, full fine-tuning and attention-only
LoRA, in a model of two layers: float32 on the CPU, a preset's experts in bfloat16 on a GPU; outputs and gradients are first
compared with PEFT's in float32. `--what watching` measures training steps with the routing logged every second step, against
steps without. `--what offload` decodes with the experts on disk, by the expert cache and by Accelerate; the files leave the page
cache before each token. Liger's autotuning is off.
"""

import sys
from collections.abc import Sequence

import torch
from rich.console import Console
from rich.progress import Progress

from ..utils.command_line import parse, program
from ..utils.errors import UserError


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, writes the results after each case if asked to, and prints them all; exits with 0, 1 or 130."""
    try:
        from moe_benchmark import (
            BenchmarkArguments,
            LoraRunner,
            OffloadRunner,
            Report,
            Runner,
            WatchingRunner,
            machine_facts,
        )
    except ModuleNotFoundError as error:
        raise UserError(
            "the package moe_benchmark is not importable: install modeling-moe by pip, or run python scripts/benchmark.py"
        ) from error
    (args,) = parse([BenchmarkArguments], __doc__, argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    runners = {"experts": Runner, "lora": LoraRunner, "watching": WatchingRunner, "offload": OffloadRunner}
    runner = runners[args.what](args)
    report = Report(machine_facts(args.device), args.cases(), args.output)
    code = 0
    try:
        with Progress(console=Console(stderr=True)) as progress:
            for result in runner.run(progress.track(report.cases, description="cases")):
                report.add(result)
                for name, failure in result.failures.items():
                    print(f"{failure.traceback}{program()}: {name} failed in {result.case}", file=sys.stderr)
        report.stopped = runner.stopped
    except KeyboardInterrupt:
        report.stopped, code = "it was interrupted", 130
    report.write()
    report.print()
    if report.failed:
        print(f"{program()}: this package failed in {len(report.failed)} cases, listed last", file=sys.stderr)
        code = 1
    sys.exit(code)
