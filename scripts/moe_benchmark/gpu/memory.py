# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module is part `memory`: it measures the GPU memory of forward plus backward of one layer's experts.

# peak: largest number of bytes beyond weights and inputs; it includes the gradients of the weights
# saved: bytes kept between forward and backward
"""

from collections.abc import Mapping

import torch

from ..cases import Case
from ..contestants import implementation, leaves, module_of, register_adapters, skip_reason
from ..measure import is_out_of_memory, peak_bytes, saved_bytes
from ..workloads import Workload, make_workload
from .comparison import IMPLEMENTATIONS
from .results import Results, free
from .sizes import Size


def run(results: Results, size: Size) -> None:
    """Writes a line for each pass of `size.memory` and each implementation."""
    register_adapters()
    for shape in size.memory:
        if results.late():
            results.put(not_run=shape._asdict())
            continue
        case = Case("experts", shape.preset, shape.dtype, shape.tokens, "balanced", "forward_backward")
        label = {"preset": shape.preset, "tokens": shape.tokens, "dtype": shape.dtype}
        with results.attempt(**label):
            workload = make_workload(case, torch.device("cuda"))
            workload.prepare(case)
            for name in IMPLEMENTATIONS:
                with results.attempt(**label, implementation=name):
                    _put_bytes(results, label, name, case, workload)
            del workload
        free()


def _put_bytes(results: Results, label: Mapping[str, object], name: str, case: Case, workload: Workload) -> None:
    device = torch.device("cuda")
    reason = skip_reason(name, case, device, case.torch_dtype.itemsize)
    if reason is not None:
        results.put(**label, implementation=name, skipped=reason)
        return
    contestant, module = implementation(name, workload, case.mode), module_of(name, workload)
    gradients = sum(parameter.nbytes for parameter in module.parameters())
    try:
        contestant.prepare()
        contestant.run()  # memory that a first call allocates for good, such as workspaces, is not part of the peak
        free()
        saved = saved_bytes(lambda: workload.forward(module), leaves(name, workload))
        free()
        peak = peak_bytes(contestant.run, device)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        results.put(**label, implementation=name, skipped="out of memory")
        return
    results.put(**label, implementation=name, saved_bytes=saved, peak_bytes=peak, gradient_bytes=gradients)
