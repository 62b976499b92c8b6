# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""The dispatch orders tokens by expert, runs the experts and combines their outputs.

It is registered in transformers' experts interface. `experts_implementation="moe"` takes the fastest back end for the
device, the dtype and the shapes; `"moe_native"`, `"moe_loop"`, `"moe_grouped_mm"` and `"moe_triton"` ask for one. They
serve this package's model, where `"moe"` is the default, and transformers' own MoE models.
"""

import functools

from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from ..attention_experts import PROJECTIONS
from .backends import NAMES
from .halves import OperatorProjections
from .interface import (
    HeldExperts,
    PreparedCall,
    backend_of,
    check_arguments,
    experts_forward,
    follows_interface,
    prepare,
    reason_unsupported,
)
from .problem import ExpertsProblem, Gradients, Needs
from .recognition import recognise
from .rounds import by_slot, expert_of_slot, index_in_round


ALL_EXPERTS_FUNCTIONS.register("moe", experts_forward)
PROJECTIONS["moe"] = OperatorProjections
for _backend in NAMES:
    ALL_EXPERTS_FUNCTIONS.register(f"moe_{_backend}", functools.partial(experts_forward, backend=_backend))
    PROJECTIONS[f"moe_{_backend}"] = functools.partial(OperatorProjections, backend=_backend)

__all__ = [
    "NAMES",
    "ExpertsProblem",
    "Gradients",
    "HeldExperts",
    "Needs",
    "PreparedCall",
    "backend_of",
    "by_slot",
    "check_arguments",
    "expert_of_slot",
    "experts_forward",
    "follows_interface",
    "index_in_round",
    "prepare",
    "recognise",
    "reason_unsupported",
]
