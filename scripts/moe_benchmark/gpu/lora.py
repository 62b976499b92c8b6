# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module is part `lora`: it compares LoRA on experts with full fine-tuning and with PEFT's own code."""

from ..arguments import BenchmarkArguments
from ..cases import Case
from ..lora import LoraRunner
from . import passes
from .comparison import measure
from .results import Results, free
from .sizes import Size
from .timing import median_ms


def run(results: Results, size: Size) -> None:
    """Writes the ms of forward plus backward, with all gradients and with those of the factors only.

    Then it measures a model of two layers: experts adapted by this package and by PEFT, all weights trained, and only
    the attention adapted.
    """
    _compare_with_full(results, size)
    runner = LoraRunner(BenchmarkArguments(device="cuda", what="lora", case_s=size.case_s, rounds=size.case_rounds))
    for shape in size.lora:
        measure(results, runner, Case("lora", shape.preset, shape.dtype, shape.tokens, "router", "forward_backward"))


def _compare_with_full(results: Results, size: Size) -> None:
    for shape in size.lora:
        times = {}
        label = {"preset": shape.preset, "tokens": shape.tokens, "dtype": shape.dtype}
        for scenario in ("lora", "train"):
            if results.late():
                results.put(not_run=label | {"scenario": scenario})
                continue
            with results.attempt(**label, scenario=scenario):
                problem = passes.make(shape._replace(scenario=scenario))
                times[scenario] = median_ms(lambda problem=problem: passes.run(problem), size.rounds)
                results.put(**label, scenario=scenario, rank=passes.RANK, ms=times[scenario])
                del problem
            free()
        if len(times) == 2:
            results.put(**label, lora_over_full=times["lora"] / times["train"])
