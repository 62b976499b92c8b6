#!/usr/bin/env python
"""Speed and memory of the experts: ours, transformers' own implementations, and the limit, taking turns in one run.

    python scripts/benchmark.py --device cpu --output cpu.json
    python scripts/benchmark.py --device cuda --output cuda.json
    python scripts/benchmark.py --presets cpu_fine --tokens 1 2048 --dtypes float32 --routing balanced zipf all_to_one
    python scripts/benchmark.py --level model --presets cpu_fine --implementations moe moe_recompute grouped_mm
    python scripts/benchmark.py --what lora --threads 1

Before a case is measured, outputs and gradients of every contestant are compared with one expert after another in
float64. If ours disagrees, nothing is reported and the exit code is 1; others that disagree are left out. Ratios are
medians over rounds in which all contestants had one turn. The limit of a pass is the dense products of the same FLOPs;
that of decoding, where caches are emptied before each call, the active experts' bytes over the bandwidth of a copy
(read plus written). Saved bytes are what autograd keeps beside parameters and input. `--what lora` measures LoRA on
experts here against PEFT's own, full fine-tuning and attention-only LoRA, after PEFT's outputs and gradients agree.
"""

import sys
import traceback

import torch
from rich.console import Console
from rich.progress import Progress

from modeling_moe.benchmark import (
    LORA_ROUNDS,
    BenchmarkArguments,
    Disagreement,
    Runner,
    compare_lora,
    machine_facts,
    print_lora,
    print_report,
    write_json,
)
from modeling_moe.cli import parse, run


def main() -> None:
    """Measures, writes the results if asked to, and prints them."""
    (args,) = parse([BenchmarkArguments], __doc__)
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        if args.what == "lora":
            print_lora(compare_lora(args.device, args.rounds or LORA_ROUNDS))
            return
        with Progress(console=Console(stderr=True)) as progress:
            results, not_run = Runner(args).run(progress.track(args.cases(), description="cases"))
    except Disagreement as error:
        if error.__cause__ is not None:
            traceback.print_exception(error.__cause__)
        print(f"benchmark.py: nothing is reported: {error}", file=sys.stderr)
        sys.exit(1)
    facts = machine_facts(args.device)
    if args.output:
        write_json(args.output, facts, results, not_run)
    print_report(facts, results, not_run, args.level)


if __name__ == "__main__":
    run(main)
