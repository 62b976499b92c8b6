# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module holds the frozen matrices of experts in 4 bits (QLoRA, arXiv:2305.14314), by bitsandbytes.

A matrix is dequantized when it is read, once in a forward pass. Backward dequantizes it again, so no copy is kept.

# E experts, M columns of a matrix, N rows of a matrix
"""

from collections.abc import Iterable
from functools import partial
from typing import Any, NamedTuple, NoReturn

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor
from torch.nn.utils.parametrize import is_parametrized
from transformers import PreTrainedModel

from ..utils.errors import UserError
from .enabling import enable
from .four_bits import DTYPES, FourBit, check_quant_type, hold, load_bitsandbytes, quantize_pieces
from .layers import MATRICES, is_experts, reason_for_peft


def quantize_experts(model: nn.Module, quant_type: str = "nf4", compress_statistics: bool = True) -> None:
    """Replaces the matrices of all experts in `model` by 4 bits per number, in place; they are frozen from then on.

    Call it last, after [`~peft.get_peft_model`] or [`~peft.PeftModel.from_pretrained`]: PEFT cannot find parameters
    that are in 4 bits, and would nest its layers in another order, so that the adapter would not fit the 16-bit model.
    Linear layers are left to transformers' `BitsAndBytesConfig`. To merge, load the 16-bit model and the saved
    adapter.

    Matrices are dequantized to the dtype that they had, so load them in the dtype to compute in. Under an autocast to
    another dtype, backward keeps the copies that autocast makes, except with Triton on a GPU. `torch.compile` keeps
    dequantized matrices too, unless the layers are checkpointed.

    Calls [`~modeling_moe.lora.enable`], which also makes PEFT refuse to merge such experts, or to add an adapter on
    them.

    Args:
        model: any model with experts in transformers' interface, with or without adapters; each matrix is (E, N, M) or
            (E, M, N), in bf16, fp16 or fp32.
        quant_type: `"nf4"` or `"fp4"`.
        compress_statistics: hold the scale of each 64 numbers in 8 bits: 4.13 bits per number instead of 4.5.

    Raises:
        UserError: if bitsandbytes 0.50 or newer is missing, or the model cannot be quantized.

    Example:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from transformers import AutoModelForCausalLM
        >>> from modeling_moe.lora import moe_lora_config, quantize_experts
        >>> model = AutoModelForCausalLM.from_pretrained("allenai/OLMoE-1B-7B-0924", dtype=torch.bfloat16)
        >>> model = get_peft_model(model, moe_lora_config(model))
        >>> quantize_experts(model)
    """
    load_bitsandbytes()
    check_quant_type(quant_type)
    modules = [module for module in model.modules() if is_experts(module)]
    experts = {module: names for module in modules if (names := _matrices(module))}
    if not experts:
        raise UserError("model has no experts that are not in 4 bits already: leave quantize_experts out")
    for module, names in experts.items():
        matrices = ((name, module.get_parameter(name).data) for name in names)
        hold_experts(
            module,
            ((name, quantize_pieces(each, each.shape, quant_type, compress_statistics)) for name, each in matrices),
        )
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.save_pretrained = _refuse_saving
    enable()


def hold_experts(module: nn.Module, matrices: Iterable[tuple[str, FourBit]]) -> None:
    """Replaces matrices of `module` by their 4 bits, one after another, and makes backward dequantize them again."""
    for name, matrix in matrices:
        hold(module, name, matrix)
    module.forward = partial(_forward, module, module.forward)


def _matrices(module: nn.Module) -> list[str]:
    """Returns the names of the matrices of `module` that are not in 4 bits yet."""
    parameters = dict(module.named_parameters(recurse=False))
    # PEFT nests its layers in the order of the parameters
    names = [name for name in parameters if name in MATRICES]
    if names and (reason := reason_for_peft(module)):
        raise UserError(f"{type(module).__name__} cannot have adapters in 4 bits: {reason}")
    for name in names:
        if isinstance(parameters[name], DTensor):
            raise UserError(f"{name} is split over processes: load the model whole on each, without ep_size")
        if parameters[name].is_meta or parameters[name].dtype not in DTYPES:
            raise UserError(f"{name} is {parameters[name].dtype} on {parameters[name].device}: load it in bfloat16")
    return names


def _refuse_saving(*_, **__) -> NoReturn:
    raise UserError(
        "save_pretrained: experts in 4 bits are not saved, save the adapter and load the 16-bit model again"
    )


class _Matrix(NamedTuple):
    """The place of a matrix or a transposed matrix among the tensors saved for backward.

    Attributes:
        module: the experts.
        name: name of the matrix.
        size: size of the saved view.
        stride: stride of the saved view.
    """

    module: nn.Module
    name: str
    size: torch.Size
    stride: tuple[int, ...]

    def dequantize(self) -> torch.Tensor:
        """Dequantizes the matrix again and returns the saved view of it."""
        return getattr(self.module, self.name).as_strided(self.size, self.stride)


def _forward(module: nn.Module, forward: Any, *args, **kwargs) -> torch.Tensor:
    """Calls `forward`, and saves no dequantized matrix of `module` for backward, which dequantizes again."""
    if torch.compiler.is_compiling():
        return forward(*args, **kwargs)
    names = [name for name in MATRICES if is_parametrized(module, name)]
    # torch calls only the innermost hooks, so the hooks of checkpointing are called from here
    outer: Any = torch._C._autograd._top_saved_tensors_default_hooks(True)
    # the tensor itself may hold the graph, so a detached one is packed
    outer_pack, outer_unpack = outer or (torch.Tensor.detach, lambda tensor: tensor)

    def pack(tensor: torch.Tensor) -> Any:
        for name in names:
            # bitsandbytes caches the dequantized matrix while the forward pass runs
            weight = getattr(module, name)
            if _same_storage(tensor, weight) and tensor.numel() == weight.numel():
                return _Matrix(module, name, tensor.size(), tensor.stride())
        return outer_pack(tensor)

    def unpack(packed: Any) -> torch.Tensor:
        return packed.dequantize() if isinstance(packed, _Matrix) else outer_unpack(packed)

    with saved_tensors_hooks(pack, unpack):
        return forward(*args, **kwargs)


def _same_storage(first: torch.Tensor, second: torch.Tensor) -> bool:
    return first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
