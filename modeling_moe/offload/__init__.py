# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""The expert cache runs models whose experts do not fit into the memory of the device, with the bits of the whole model.

Experts stay in host memory or in the checkpoint. Each layer has slots for some of them, and a policy decides which stay.
"""

from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from ..attention_experts import PROJECTIONS
from .comparison import compare_policies
from .forward import IMPLEMENTATION, offloaded_forward
from .loading import from_pretrained_offloaded, load_without_experts
from .offloading import offload_experts, offload_statistics, offload_to_stores
from .prefetch import prefetch_experts
from .recording import record_trace


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, offloaded_forward)
# the experts of attention stay in memory
PROJECTIONS[IMPLEMENTATION] = PROJECTIONS["moe"]

__all__ = [
    "compare_policies",
    "from_pretrained_offloaded",
    "load_without_experts",
    "offload_experts",
    "offload_statistics",
    "offload_to_stores",
    "prefetch_experts",
    "record_trace",
]
