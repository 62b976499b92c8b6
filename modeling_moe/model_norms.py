# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module defines the norms of the model families, and their places in a decoder layer."""

from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from transformers import initialization as init
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from .configuration_fields import SPARSE, Condition, Range, setting


@dataclass(init=False, repr=False, eq=False, kw_only=True)
class NormFields:
    """These fields configure the norms."""

    rms_norm_eps: float = setting(
        1e-6,
        "The epsilon of all norms except the norms of latent attention's latents, which use 1e-6, and the last norm if "
        "final_norm_eps is set.",
        Range(1e-30, 1),
    )
    final_norm_eps: float | None = setting(
        None,
        "The epsilon of the norm after the last layer; None means rms_norm_eps. JetMoE's layers have the epsilon 1e-6 whatever "
        "its rms_norm_eps is, which only its last norm reads.",
        Range(1e-30, 1),
    )
    norm_type: Literal["rms", "rms_fp32", "rms_plus_one", "layer"] = setting(
        "rms",
        'The norm: "rms" (Llama), "rms_fp32", which multiplies by the weight before the cast (OLMo2), "rms_plus_one", which '
        'multiplies by 1 + weight (Gemma), or "layer", a layer norm (GPT-2, GPT-NeoX).',
    )
    norm_bias: bool = setting(
        True,
        "Gives layer norms a bias; False is the norm of Cohere and DBRX.",
        conditions=(Condition(lambda config: config.norm_type == "layer", "set norm_type='layer'"),),
    )
    norm_placement: Literal["pre", "post", "sandwich", "parallel", "parallel_shared"] = setting(
        "pre",
        'The place of the norms: "pre" before attention and feed-forward network, "post" after each of them and before the '
        'sum (OLMo2), "sandwich" in both places (Gemma 2 and 3), "parallel" before two networks that read one common input '
        '(GPT-NeoX), or "parallel_shared", one norm whose output both networks read (Cohere).',
    )
    sparse_output_norm: bool = setting(
        False,
        "Puts a norm on the output of sparse feed-forward networks, before the sum, as in A.X-K1.",
        conditions=(
            SPARSE,
            Condition(
                lambda config: PLACEMENTS[config.norm_placement][3] is None,
                "choose a norm_placement that puts no norm after the networks",
            ),
        ),
    )


# norm_type -> class; the RMS norms round in different places: w * cast(x), cast(w * x), cast((1 + w) * x)
NORMS: dict[str, type[nn.Module]] = {
    "rms": LlamaRMSNorm,
    "rms_fp32": Olmo2RMSNorm,
    "rms_plus_one": Gemma2RMSNorm,
    "layer": nn.LayerNorm,
}

# norm_placement -> names of the norms before attention, after attention, before the network and after the network
PLACEMENTS: dict[str, tuple[str | None, str | None, str | None, str | None]] = {
    "pre": ("input_layernorm", None, "post_attention_layernorm", None),
    "post": (None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
    "sandwich": (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
    "parallel": ("input_layernorm", None, "post_attention_layernorm", None),
    "parallel_shared": ("input_layernorm", None, "input_layernorm", None),
}


def norm_names(config: Any, is_sparse: bool) -> tuple[str | None, str | None, str | None, str | None]:
    """Returns the names of a layer's norms before and after attention, then before and after its sparse or dense network."""
    names = PLACEMENTS[config.norm_placement]
    return (*names[:3], "post_feedforward_layernorm") if is_sparse and config.sparse_output_norm else names


def make_norm(config: Any, width: int | None = None, eps: float | None = None) -> nn.Module:
    """Makes the norm that the configuration names, over `width` features; None for the hidden size, and for `rms_norm_eps`."""
    bias = {"bias": config.norm_bias} if config.norm_type == "layer" else {}
    eps = config.rms_norm_eps if eps is None else eps
    return NORMS[config.norm_type](config.hidden_size if width is None else width, eps=eps, **bias)


def init_norm(norm: nn.Module) -> bool:
    """Initialises a norm to the identity scale. Returns False if the module is not a norm."""
    if not isinstance(norm, tuple(NORMS.values())):
        return False
    (init.zeros_ if isinstance(norm, Gemma2RMSNorm) else init.ones_)(norm.get_parameter("weight"))
    if isinstance(norm, nn.LayerNorm) and norm.bias is not None:
        init.zeros_(norm.bias)
    return True
