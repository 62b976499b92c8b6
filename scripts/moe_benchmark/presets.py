# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module defines the measured shapes."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Preset:
    """Describes the routed experts of one layer.

    Attributes:
        hidden: width H of a token.
        intermediate: width I of an expert.
        experts: number E of experts.
        per_token: number K of experts per token.
        family: `"gated"`, act(gate) * up without biases; or `"gpt_oss"`, with biases, a clamped interleaved gate and
            transposed weights.
    """

    hidden: int
    intermediate: int
    experts: int
    per_token: int
    family: str = "gated"

    @property
    def expert_elements(self) -> int:
        """Number of elements of one expert's matrices, 3HI."""
        return 3 * self.hidden * self.intermediate


# presets in the order of measurement
GPU_PRESETS = {
    "qwen3_30b_a3b": Preset(2048, 768, 128, 8),
    "mixtral_8x7b": Preset(4096, 14336, 8, 2),
    "gpt_oss_20b": Preset(2880, 2880, 32, 4, "gpt_oss"),
    "olmoe": Preset(2048, 1024, 64, 8),
    "deepseek_v3": Preset(7168, 2048, 256, 8),
    "qwen3_next": Preset(2048, 512, 512, 10),
    "deepseek_v2_lite": Preset(2048, 1408, 64, 6),
}
# H, I, K and tokens are equal, so that only overhead grows with E
EXPERT_SWEEP = {f"cpu_e{experts}": Preset(512, 256, experts, 8) for experts in (8, 16, 32, 64, 128, 256)}
PRESETS = {
    **GPU_PRESETS,
    "cpu_fine": Preset(512, 256, 64, 8),
    "cpu_coarse": Preset(512, 1024, 8, 2),
    # SmolLM2-135M with 4 experts, as scripts/demo.sh makes it
    "cpu_demo": Preset(576, 1536, 4, 2),
    "cpu_lora": Preset(256, 256, 64, 8),
    **EXPERT_SWEEP,
    "tiny": Preset(32, 24, 5, 3),
}
