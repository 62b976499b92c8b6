# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""Experts whose frozen matrices are held in 4 bits (QLoRA, arXiv:2305.14314), by bitsandbytes.

A matrix is dequantized when it is read, once in a forward; backward dequantizes it again and keeps none.

# E experts, M columns of a matrix, N rows of it
"""

from functools import partial
from typing import Any, NamedTuple, NoReturn

import torch
from packaging.version import Version
from peft import LoraConfig, LoraModel
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor
from torch.nn.utils.parametrize import is_parametrized
from transformers import PreTrainedModel

from ..utils.errors import UserError
from .layers import MATRICES, Stock, is_experts, left_to_peft


QUANT_TYPES = ("nf4", "fp4")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_stock_merge, _stock_inject = Stock.merge, LoraModel._inject_parameters


def quantize_experts(model: nn.Module, quant_type: str = "nf4", compress_statistics: bool = True) -> None:
    """Replaces the matrices of all experts in `model` by 4 bits a number, in place; they are frozen from then on.

    Call it last, after [`~peft.get_peft_model`] or [`~peft.PeftModel.from_pretrained`]: PEFT finds no suffix of a name
    among parameters in 4 bits, and nests its layers on them in another order, so that their adapter would not fit the
    16-bit model. Linear layers are left to transformers' `BitsAndBytesConfig`. To merge, load the 16-bit model and the
    saved adapter on it.

    Matrices are dequantized to the dtype that they had. Load them in the one to compute in: under an autocast to
    another one, the copies that it makes are kept for backward, save on a GPU by Triton. So is what `torch.compile` dequantizes, unless the
    layers are checkpointed.

    Args:
        model: any model with experts of transformers' interface, with adapters or without; (E, N, M) or (E, M, N) each,
            in bf16, fp16 or fp32.
        quant_type: `"nf4"` or `"fp4"`.
        compress_statistics: hold the scale of each 64 numbers in 8 bits too: 4.13 bits a number in place of 4.5.

    Raises:
        UserError: without bitsandbytes of 0.50 or newer, or for a model that cannot be quantized; and later, in PEFT,
            for what would leave the experts out: to merge, or to add an adapter on them.

    Example:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from transformers import AutoModelForCausalLM
        >>> from modeling_moe.lora import moe_lora_config, quantize_experts
        >>> model = AutoModelForCausalLM.from_pretrained("allenai/OLMoE-1B-7B-0924", dtype=torch.bfloat16)
        >>> model = get_peft_model(model, moe_lora_config(model))
        >>> quantize_experts(model)
    """
    try:
        import bitsandbytes
        from bitsandbytes.nn.parametrize import replace_parameter_4bit
    except ImportError as error:
        raise UserError("bitsandbytes is not installed: pip install 'modeling-moe[4bit]'") from error
    if Version(bitsandbytes.__version__) < Version("0.50"):
        # under checkpointing it never frees what it dequantized
        raise UserError(
            f"bitsandbytes is {bitsandbytes.__version__}: pip install 'modeling-moe[4bit]' for a newer one"
        )
    if quant_type not in QUANT_TYPES:
        raise UserError(f"quant_type is {quant_type!r}: choose {' or '.join(QUANT_TYPES)}")
    modules: list[Any] = [module for module in model.modules() if is_experts(module)]
    experts = {module: names for module in modules if (names := _matrices(module))}
    if not experts:
        raise UserError("model has no experts that are not in 4 bits already: leave quantize_experts out")
    for module, names in experts.items():
        for name in names:
            replace_parameter_4bit(module, name, compress_statistics, quant_type)
            module.parametrizations[name][0].register_forward_pre_hook(_follow)
        module.forward = partial(_forward, module, module.forward, names)
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.save_pretrained = _refuse_saving
    Stock.merge, LoraModel._inject_parameters = _merge, _inject_parameters


def _matrices(module: nn.Module) -> list[str]:
    """Names of those that are not in 4 bits yet."""
    parameters = dict(module.named_parameters(recurse=False))
    names = [name for name in MATRICES if name in parameters]
    if names and (reason := left_to_peft(module)):
        raise UserError(f"{type(module).__name__} cannot have adapters in 4 bits: {reason}")
    for name in names:
        if isinstance(parameters[name], DTensor):
            raise UserError(f"{name} is split over processes: load the model whole on each, without ep_size")
        if parameters[name].is_meta or parameters[name].dtype not in DTYPES:
            raise UserError(f"{name} is {parameters[name].dtype} on {parameters[name].device}: load it in bfloat16")
    return names


def _merge(wrapper: Stock, *args, **kwargs) -> None:
    """PEFT's `ParamWrapper.merge`, which would add to a dequantized copy."""
    if is_parametrized(wrapper.get_base_layer(), wrapper.parameter_name):
        raise UserError(
            f"{wrapper.parameter_name} is in 4 bits: to merge, load the 16-bit model and the adapter on it"
        )
    _stock_merge(wrapper, *args, **kwargs)


def _inject_parameters(tuner: LoraModel, peft_config: LoraConfig, model: nn.Module, *args, **kwargs) -> list[str]:
    """PEFT's `BaseTuner._inject_parameters`, which would find nothing."""
    if any(is_parametrized(module) for module in model.modules() if is_experts(module)):
        raise UserError("experts are in 4 bits already: call quantize_experts after all adapters are on the model")
    return _stock_inject(tuner, peft_config, model, *args, **kwargs)


def _refuse_saving(*_, **__) -> NoReturn:
    raise UserError(
        "save_pretrained: experts in 4 bits are not saved, save the adapter and load the 16-bit model again"
    )


def _follow(parametrization: Any, inputs: tuple[torch.Tensor]) -> None:
    """Moves the scales to where `Module.to` has moved the 4-bit numbers: they are no buffers."""
    device = inputs[0].device
    if parametrization.quant_state.absmax.device != device:
        parametrization.quant_state.to(device)


class _Matrix(NamedTuple):
    """Stands for a matrix, or its transpose, among what is saved for backward."""

    module: nn.Module
    name: str
    size: torch.Size
    stride: tuple[int, ...]

    def dequantize(self) -> torch.Tensor:
        return getattr(self.module, self.name).as_strided(self.size, self.stride)


def _forward(module: nn.Module, forward: Any, names: list[str], *args, **kwargs) -> torch.Tensor:
    """`forward`, after which backward has no dequantized matrix of `module` but makes its own."""
    if torch.compiler.is_compiling():
        return forward(*args, **kwargs)
    # only the innermost hooks are called: those of checkpointing have to be called from here
    outer: Any = torch._C._autograd._top_saved_tensors_default_hooks(True)
    # a packed tensor must not be the one that came, which may hold the graph
    outer_pack, outer_unpack = outer or (torch.Tensor.detach, lambda tensor: tensor)

    def pack(tensor: torch.Tensor) -> Any:
        for name in names:
            # bitsandbytes caches it for as long as the forward runs
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
