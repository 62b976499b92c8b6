#!/usr/bin/env python
"""Speed and memory of the experts: ours, transformers' own implementations, and the limit, taking turns in one run.

    python scripts/benchmark.py --device cpu --output cpu.json
    python scripts/benchmark.py --device cuda --output cuda.json
    python scripts/benchmark.py --presets cpu_fine --tokens 1 2048 --dtypes float32 --routing balanced zipf all_to_one
    python scripts/benchmark.py --level model --presets cpu_fine --implementations moe moe_recompute grouped_mm
    python scripts/benchmark.py --what lora --threads 1
    python scripts/benchmark.py --what lora --device cuda --presets olmoe --tokens 8192

Before a case is measured, outputs and gradients of every contestant are compared with one expert after another in
float64. If ours fails or disagrees, the case says so in place of a time, the run goes on, and the exit code is 1; others
that do are left out. The file of --output is whole after every case, so an interrupted run keeps what it has measured.
Ratios are medians over rounds in which all contestants had one turn. The limit of a pass is the dense products of the same
FLOPs; that of decoding, where caches are emptied before each call, the active experts' bytes over the bandwidth of a copy
(read plus written). Saved bytes are what autograd keeps beside parameters and input. `--what lora` measures LoRA on experts
here against PEFT's own, full fine-tuning and attention-only LoRA, in a model of two layers: float32 on the CPU, a preset's
experts in bfloat16 on a GPU. Outputs and gradients are first compared with PEFT's in float32. Liger's autotuning is off.
"""

import sys

import torch
from moe_benchmark import BenchmarkArguments, LoraRunner, Report, Result, Runner, machine_facts
from rich.console import Console
from rich.progress import Progress

from modeling_moe.utils.command_line import parse, run


def complain(result: Result) -> None:
    """Prints on stderr what went wrong in a case, with where."""
    for name, failure in result.failures.items():
        print(f"{failure.traceback}benchmark.py: {name} failed in {result.case}", file=sys.stderr)


def main() -> None:
    """Measures, writes the results after each case if asked to, and prints them all."""
    (args,) = parse([BenchmarkArguments], __doc__)
    if args.threads:
        torch.set_num_threads(args.threads)
    runner = (LoraRunner if args.what == "lora" else Runner)(args)
    report = Report(machine_facts(args.device), args.cases(), args.output)
    code = 0
    try:
        with Progress(console=Console(stderr=True)) as progress:
            for result in runner.run(progress.track(report.cases, description="cases")):
                report.add(result)
                complain(result)
        report.stopped = runner.stopped
    except KeyboardInterrupt:
        report.stopped, code = "it was interrupted", 130
    report.write()
    report.print()
    if report.failed:
        print(f"benchmark.py: this package failed in {len(report.failed)} cases, listed last", file=sys.stderr)
        code = 1
    sys.exit(code)


if __name__ == "__main__":
    run(main)
