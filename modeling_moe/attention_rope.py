# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module declares the fields of the rotary embedding and checks the numbers of `rope_parameters`.

transformers checks few of these numbers, and only warns of some. The scale of queries by their position, which uses one of the
numbers, is here too.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, RopeParameters

from .configuration_fields import Condition, Range, setting, shown


_ROTATES = (
    Condition(lambda config: config.kv_lora_rank is None, "unset kv_lora_rank (latent attention)"),
    Condition(lambda config: config.position_embedding_type == "rope", "set position_embedding_type='rope'"),
)


@dataclass(init=False, repr=False, eq=False, kw_only=True)
class RopeFields:
    """These fields configure the rotary embedding."""

    rope_parameters: RopeParameters | dict | None = setting(
        None,
        "The parameters of the rotary embedding as transformers defines them, with rope_theta and rope_type; or one "
        "dictionary for each attention type of layer_types (Gemma 3).",
        conditions=_ROTATES[1:],
        idle=({"rope_theta": 10000.0, "rope_type": "default"},),
    )
    rope_fp32: bool = setting(
        False,
        "Rotates queries and keys in fp32 rather than in the model's dtype, as in OLMo2; it changes results of half-precision "
        "models only.",
        conditions=_ROTATES,
    )
    no_rope_layers: list[int] | None = setting(
        None,
        "For each layer 1 if the layer rotates queries and keys and 0 if it does not, as in SmolLM3; None lets all layers "
        "rotate them.",
        choices=(0, 1),
        conditions=_ROTATES,
    )


KINDS = ("full_attention", "sliding_attention")
_SCALE = Range(0, 1e6, open_below=True)
# entry of rope_parameters -> range
RANGES = {
    # powers of a larger theta are not finite in fp32
    "rope_theta": Range(0, 1e15, open_below=True),
    "factor": _SCALE,
    "attention_factor": _SCALE,
    "beta_fast": _SCALE,
    "beta_slow": _SCALE,
    "mscale": Range(0, 1e6),
    "mscale_all_dim": Range(0, 1e6),
    "low_freq_factor": _SCALE,
    "high_freq_factor": _SCALE,
    "partial_rotary_factor": Range(0, 1, open_below=True),
    "original_max_position_embeddings": Range(1, 2**31),
}
# rope_type -> entries that it needs beside rope_theta
NEEDED = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor", "original_max_position_embeddings"),
    "longrope": ("short_factor", "long_factor", "original_max_position_embeddings"),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    "proportional": (),
}


def by_kind(config) -> dict[str, Any]:
    """Returns the parameters for each attention type, or for all layers, by the label that messages use.

    Raises:
        ValueError: if there are parameters by attention type, and none for a type in `layer_types`.
    """
    rope = config.rope_parameters or {}
    if not set(KINDS).intersection(rope):
        return {"rope_parameters": rope}
    for kind in sorted(set(config.layer_types)):
        if not rope.get(kind):
            raise ValueError(
                f"rope_parameters has no {kind!r}, which layer_types has: give parameters for each kind of attention."
            )
    return {f"rope_parameters[{kind!r}]": rope[kind] for kind in KINDS if rope.get(kind)}


def check_shape(config) -> None:
    """Raises ValueError unless the parameters are dictionaries; to be called before transformers completes them."""
    for label, rope in by_kind(config).items():
        if not isinstance(rope, dict):
            raise ValueError(f"{label} is {shown(rope)}: it must be a dictionary.")


def entries_of_scaling(config) -> set[str]:
    """Returns the entry that `llama_4_scaling_beta` alone reads, which transformers does not know beside this `rope_type`."""
    kind = (config.rope_parameters or {}).get("rope_type", "default")
    entry = "original_max_position_embeddings"
    return set() if config.llama_4_scaling_beta is None or entry in NEEDED.get(kind, ()) else {entry}


def check_numbers(config) -> None:
    """Raises ValueError, naming the entry, for a number with which a rotation angle is not finite."""
    check_shape(config)
    for label, rope in by_kind(config).items():
        if rope.get("llama_4_scaling_beta") is not None:
            raise ValueError(f"llama_4_scaling_beta of {label} is not read there: set the field llama_4_scaling_beta.")
        kind = _rope_type(label, rope)
        for name, limits in RANGES.items():
            if (value := rope.get(name)) is not None and not _lies_in(limits, value):
                raise ValueError(f"{name} of {label} is {shown(value)}: it must be a number {limits}.")
        _check_formula(label, rope, kind)
        # transformers rounds an odd number of rotated features up
        pairs = (int(config.head_dim * (rope.get("partial_rotary_factor") or 1.0)) + 1) // 2
        if pairs < 1:
            raise ValueError(
                f"partial_rotary_factor of {label} is {rope['partial_rotary_factor']}: it lets none of the "
                f"{config.head_dim} features of a head rotate, raise it."
            )
        if config.kv_lora_rank is not None and pairs * 2 < config.head_dim:
            raise ValueError(
                f"partial_rotary_factor of {label} is {rope['partial_rotary_factor']}: in latent attention "
                "(kv_lora_rank) all qk_rope_head_dim features rotate, leave it out."
            )
        if kind == "longrope":
            _check_longrope(label, rope, pairs)


def _check_formula(label: str, rope: dict[str, Any], kind: str) -> None:
    """Raises ValueError for numbers with which the formula of a rotary embedding divides by 0 or changes its sign."""
    if kind == "llama3" and rope["high_freq_factor"] <= rope["low_freq_factor"]:
        raise ValueError(f"high_freq_factor of {label} must be above its low_freq_factor: change one of them.")
    if kind == "yarn" and (rope.get("beta_fast") or 32) < (rope.get("beta_slow") or 1):
        raise ValueError(f"beta_fast of {label} must not be below its beta_slow: change one of them.")
    # yarn divides by the logarithm of theta, longrope by the logarithm of the original length
    for name, of in (("rope_theta", "yarn"), ("original_max_position_embeddings", "longrope")):
        if kind == of and rope[name] <= 1:
            raise ValueError(f"{name} of {label} is {rope[name]}: rope_type {kind!r} needs more than 1.")


def _rope_type(label: str, rope: dict[str, Any]) -> str:
    """Returns the `rope_type` of the parameters after checking that the entries that it needs are there."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    known = [name for name in NEEDED if name == "default" or name in ROPE_INIT_FUNCTIONS]
    if kind not in known:
        raise ValueError(f"{label} has rope_type {shown(kind)}: choose one of {', '.join(known)}.")
    for name in ("rope_theta", *NEEDED[kind]):
        if rope.get(name) is None:
            raise ValueError(f"{label} has no {name}, which rope_type {kind!r} needs: add it.")
    return kind


def _lies_in(limits: Range, value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and limits.holds(value)


def _check_longrope(label: str, rope: dict[str, Any], pairs: int) -> None:
    for name in ("short_factor", "long_factor"):
        factors = rope[name]
        if not isinstance(factors, list) or len(factors) != pairs or not all(_lies_in(_SCALE, x) for x in factors):
            raise ValueError(f"{name} of {label} must be a list of {pairs} numbers {_SCALE}.")


def scale_by_position(query: torch.Tensor, config: Any, kwargs: Any) -> torch.Tensor:
    """Multiplies queries (B, heads, S, D) by a factor that grows with their positions, by `llama_4_scaling_beta`.

    Mistral 4's factor 1 + beta * log(1 + floor(p / L)) keeps attention sharp beyond the length L of pretraining.

    Args:
        query: (B, heads, S, D).
        config: the model's configuration; `llama_4_scaling_beta` is beta, and L stands in `rope_parameters`.
        kwargs: keyword arguments of attention, with `position_ids` (B, S) or (1, S).

    Raises:
        ValueError: if there are no `position_ids`, which the model always gives.
    """
    if (positions := kwargs.get("position_ids")) is None:
        raise ValueError("llama_4_scaling_beta scales queries by their positions: give the layer position_ids.")
    length = config.rope_parameters["original_max_position_embeddings"]
    factor = 1 + config.llama_4_scaling_beta * torch.log(1 + torch.floor(positions / length))
    return query * factor[:, None, :, None].to(query.dtype)
