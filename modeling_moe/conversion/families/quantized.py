# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module dequantises the tensors of published checkpoints: fp8, NVFP4, and gpt-oss's mxfp4.

Only weights are dequantised: the result computes with unrounded activations, where a server of the source may round them.
Which weights are quantised is read from the tensors and not from config.json: a quantised weight is one that has a scale
beside it. The layouts are those of

- transformers' fine-grained fp8, as DeepSeek-V3 and Qwen publish it: `weight` (N, M) and `weight_scale_inv`, which is
  multiplied, with one scale for each block of `weight_block_size` or one for the whole weight;
- compressed-tensors' `float-quantized`: `weight` in fp8 and `weight_scale`, one for the whole weight, for each row, or for
  each block of `block_structure`;
- compressed-tensors' `nvfp4-pack-quantized`: `weight_packed` (N, M / 2), `weight_scale` (N, M / 16) in fp8, and
  `weight_global_scale`, which divides;
- NVIDIA ModelOpt's NVFP4: `weight` (N, M / 2), `weight_scale` (N, M / 16) in fp8, and `weight_scale_2`, which is multiplied;
  and ModelOpt's FP8: `weight` and one `weight_scale`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from ...checkpoints import LazyTensor, State
from ...utils.errors import UserError


FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
# values of NVFP4 that share a scale
NVFP4_BLOCK = 16
# the sixteen values of e2m1: a sign, two bits of exponent, one of mantissa
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
# scales of activations and of the cache, which a model that computes with unrounded activations does not need
ACTIVATIONS = (".input_scale", ".input_global_scale", ".q_scale", ".k_scale", ".v_scale", ".activation_scale")
FORMATS = {
    "compressed-tensors": ("float-quantized", "naive-quantized", "nvfp4-pack-quantized", "mixed-precision"),
    "modelopt": ("NVFP4", "FP8", "MIXED_PRECISION"),
}


def refuse_unreadable(settings: Mapping[str, Any], model_type: str) -> None:
    """Refuses a `quantization_config` of a format that [`dequantised`] cannot read.

    Raises:
        UserError: names the format and those that can be read.
    """
    method = settings.get("quant_method")
    found = settings.get("quant_algo" if method == "modelopt" else "format")
    # a rotation of the weights would have to be undone
    plain = not settings.get("transform_config") and (settings.get("sparsity_config") or {}).get("format") in (
        None,
        "dense",
    )
    if plain and (method == "fp8" or found in FORMATS.get(str(method), ())):
        return
    raise UserError(
        f"quantization_config is set in the config.json of this {model_type} model, with quant_method {method!r} and format "
        f"{found!r}, which cannot be read: only fp8, compressed-tensors (float-quantized, nvfp4-pack-quantized) and modelopt "
        "(NVFP4, FP8), without rotations and sparsity, can; dequantise the source first"
    )


def block_size(settings: Mapping[str, Any]) -> tuple[int, int] | None:
    """Returns rows and columns of the block of fp8 weights that shares a scale; None if the scales have no blocks."""
    groups = settings.get("config_groups")
    weights = [group.get("weights") or {} for group in (groups.values() if isinstance(groups, dict) else ())]
    found = [settings.get("weight_block_size"), *(entry.get("block_structure") for entry in weights)]
    size = next((size for size in found if size is not None), None)
    if size is None:
        return None
    if (
        not isinstance(size, Sequence)
        or len(size) != 2
        or not all(isinstance(side, int) and side > 0 for side in size)
    ):
        raise UserError(f"the block size in quantization_config is {size!r}, which must be two positive integers")
    return size[0], size[1]


def dequantised(state: State, settings: Any, dtype: torch.dtype = torch.bfloat16) -> State:
    """Dequantises the weights that have a scale beside them; all other tensors stay as they are, and nothing is read.

    Args:
        state: tensors under the source's names.
        settings: `quantization_config` of the source; None, or one with the quant_method mxfp4, changes nothing, since
            gpt-oss's own layout is read with the family's other tensors.
        dtype: dtype of the dequantised weights.

    Raises:
        UserError: if the shape of a scale does not fit the weight.
    """
    settings = settings.to_dict() if hasattr(settings, "to_dict") else settings
    if not settings or settings.get("quant_method") == "mxfp4":
        return state
    block, result, used = block_size(settings), {}, set[str]()
    for name, tensor in state.items():
        base = name.removesuffix("_packed")
        scale = next((key for key in (f"{base}_scale_inv", f"{base}_scale") if key in state), None)
        second = next((key for key in (f"{base}_scale_2", f"{base}_global_scale") if key in state), None)
        if scale is not None and tensor.dtype in FP8:
            result[base] = _from_fp8(base, tensor, state[scale], block, dtype)
            used.add(scale)
        elif scale is not None and second is not None and tensor.dtype == torch.uint8:
            divides = second.endswith("_global_scale")
            result[base] = _from_nvfp4(base, tensor, state[scale], state[second], divides, dtype)
            used |= {scale, second}
        elif not name.endswith(ACTIVATIONS):
            result[name] = tensor
    return {name: tensor for name, tensor in result.items() if name not in used}


def _misfit(name: str, tensor: LazyTensor, scale: LazyTensor) -> UserError:
    return UserError(
        f"{name} has shape {tensor.shape} and scales of shape {scale.shape}, which do not fit its quantization_config: "
        "download the checkpoint again"
    )


def _from_fp8(
    name: str, weight: LazyTensor, scale: LazyTensor, block: tuple[int, int] | None, dtype: torch.dtype
) -> LazyTensor:
    """Returns a matrix (..., N, M); the experts of a fused tensor (E, N, M) are dequantised one by one."""
    if len(weight.shape) == 3 and scale.shape[:1] == weight.shape[:1]:
        experts = [_from_fp8(name, weight[e], scale[e], block, dtype) for e in range(weight.shape[0])]

        def load(index: tuple[slice, ...]) -> torch.Tensor:
            return torch.stack([expert.load(index[1:]) for expert in experts[index[0]]])

        return LazyTensor(weight.shape, dtype, load, experts)
    if block is not None and scale.shape == tuple(
        math.ceil(size / side) for size, side in zip(weight.shape, block, strict=False)
    ):
        return LazyTensor.combine(lambda w, s: from_fp8_blocks(w, s, block), weight, scale, dtype=dtype)
    if scale.numel != 1 and scale.shape not in ((weight.shape[0],), (weight.shape[0], 1)):
        raise _misfit(name, weight, scale)
    return LazyTensor.combine(lambda w, s: w.float() * s.float().reshape(-1, 1), weight, scale, dtype=dtype)


def from_fp8_blocks(weight: torch.Tensor, scale: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """Dequantises an fp8 matrix (N, M) with scales of blocks (ceil(N / block[0]), ceil(M / block[1])) to fp32."""
    scale = scale.float()
    for dim, size in enumerate(weight.shape):
        scale = scale.repeat_interleave(block[dim], dim).narrow(dim, 0, size)
    return weight.float() * scale


def _from_nvfp4(
    name: str, packed: LazyTensor, scale: LazyTensor, second: LazyTensor, divides: bool, dtype: torch.dtype
) -> LazyTensor:
    rows, half = packed.shape if len(packed.shape) == 2 else (0, 0)
    if second.numel != 1 or scale.shape != (rows, 2 * half // NVFP4_BLOCK) or scale.dtype not in FP8:
        raise _misfit(name, packed, scale)

    def dequantise(packed: torch.Tensor, scale: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        second = second.float().reshape(())
        return from_nvfp4(packed, scale.float() / second if divides else scale.float() * second)

    return LazyTensor.combine(dequantise, packed, scale, second, shape=(rows, 2 * half), dtype=dtype)


def from_nvfp4(packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Dequantises NVFP4 to fp32 (N, M).

    Args:
        packed: (N, M / 2), uint8 with two values of e2m1; the low four bits are the value with the even column.
        scale: (N, M / 16), fp32, one for each block of 16 columns, with the scale of the whole weight merged in.
    """
    index = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1).int()
    values = torch.tensor(E2M1)[index].unflatten(1, (-1, NVFP4_BLOCK))
    return (values * scale[..., None]).flatten(1)


def from_mxfp4(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Dequantises an expert's matrix to bf16 (N, M).

    Args:
        blocks: (N, M / 32, 16), two values in a byte.
        scales: (N, M / 32).
    """
    return convert_moe_packed_tensors(blocks[None], scales[None], dtype=torch.bfloat16)[0].T
