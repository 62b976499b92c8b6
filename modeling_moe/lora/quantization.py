# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module puts the experts of a model that is in memory into 4 bits (QLoRA, arXiv:2305.14314), by bitsandbytes.

# E experts, M columns of a matrix, N rows of a matrix
"""

from typing import NoReturn

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from ..utils.errors import UserError
from .enabling import enable
from .four_bits import DTYPES, check_quant_type, load_bitsandbytes, quantize_pieces
from .holding import hold_experts
from .layers import MATRICES, is_experts, reason_for_peft
from .quantizer import Experts4bitConfig, mark_as_4bit


def quantize_experts(model: nn.Module, quant_type: str = "nf4", compress_statistics: bool = True) -> None:
    """Replaces the matrices of all experts in `model` by 4 bits per number, in place; they are frozen from then on.

    The model must be in memory in 16 bits first; [`Experts4bitConfig`] loads one that does not fit. Adapters may be added
    before or after, and give the same model. Without adapters, `save_pretrained` writes the 4 bits. Linear layers are left
    to transformers' `BitsAndBytesConfig`. To merge, load the 16-bit model and the saved adapter.

    Matrices are dequantized to the dtype that they had, so load them in the dtype to compute in. Under an autocast to
    another dtype, backward keeps the copies that autocast makes, except with Triton on a GPU. `torch.compile` keeps
    dequantized matrices too, unless the layers are checkpointed.

    Calls [`~modeling_moe.lora.enable`], which also makes PEFT refuse to merge such experts.

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
    models = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    adapted = any(isinstance(module, BaseTunerLayer) for module in model.modules())
    unsaved = adapted or any(getattr(module, "hf_quantizer", None) is not None for module in models)
    for module in models:
        if unsaved:
            module.save_pretrained = _refuse_saving
        else:
            mark_as_4bit(module, Experts4bitConfig(quant_type, compress_statistics))
    enable()


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
        if vars(module).get("offloaded") is not None:
            raise UserError(f"{name} is offloaded: 4 bits take the place of offloading, load the whole model")
        if parameters[name].is_meta or parameters[name].dtype not in DTYPES:
            raise UserError(f"{name} is {parameters[name].dtype} on {parameters[name].device}: load it in bfloat16")
    return names


def _refuse_saving(*_, **__) -> NoReturn:
    raise UserError(
        "save_pretrained: experts in 4 bits that have adapters are not saved, and none beside other weights in 4 bits: save "
        "the adapter alone, or load the model by Experts4bitConfig, and save it before the adapter is added"
    )
