# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module makes transformers load experts straight into 4 bits, and save and load them in 4 bits.

transformers' `BitsAndBytesConfig` puts linear layers into 4 bits and leaves matrices of three dimensions as they are. The
quantizer below is registered with transformers under a name of its own, so that `from_pretrained` finds it by
[`Experts4bitConfig`], or by the `quantization_config` of a saved folder once `modeling_moe.lora` is imported.

# E experts, M columns of a matrix, N rows of a matrix
"""

import copy
import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    ConversionOps,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightTransform,
    log_conversion_errors,
)
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

from ..utils.errors import UserError
from ..utils.loading import FOUR_BITS
from ..utils.mapped_pages import release
from .enabling import enable
from .four_bits import (
    BLOCK,
    DTYPES,
    QUANT_TYPES,
    SCALES_BLOCK,
    FourBit,
    check_quant_type,
    load_bitsandbytes,
    quantize_pieces,
)
from .holding import hold_experts
from .layers import MATRICES, is_experts, reason_for_peft


METHOD = FOUR_BITS
ROUTERS = ("gate", "router")
# tensors that a file holds beside the packed numbers of a matrix; bitsandbytes' names
COMPANIONS = (
    "absmax",
    "quant_map",
    "nested_absmax",
    "nested_quant_map",
    *(f"quant_state.bitsandbytes__{quant_type}" for quant_type in QUANT_TYPES),
)
# attribute of a module of experts: name of a matrix -> bitsandbytes' `QuantState`, from reading to the end of loading
STATES = "_states_of_4bit_matrices"


@register_quantization_config(METHOD)
class Experts4bitConfig(BitsAndBytesConfig):
    """Asks `from_pretrained` for experts in bitsandbytes' 4-bit format, quantized while they are read.

    Where each expert has tensors of its own in the file, at most one expert's are in memory beside the 4-bit model;
    otherwise at most one tensor. The bytes equal those of [`~modeling_moe.lora.quantize_experts`] on the model in 16 bits.
    Matrices are dequantized to the `dtype` of `from_pretrained`. Adapters are added afterwards, as to a model in 16 bits.

    `save_pretrained` writes the 4 bits, and `from_pretrained` reads them after `import modeling_moe.lora`. Loading calls
    [`~modeling_moe.lora.enable`], since PEFT alone does not find matrices in 4 bits.

    Args:
        quant_type: `"nf4"` or `"fp4"`.
        compress_statistics: hold the scale of each 64 numbers in 8 bits: 4.13 bits per number instead of 4.5.
        linear_layers: put the linear layers into 4 bits too, as transformers' `BitsAndBytesConfig` does, except routers,
            the head, and those in `skip_modules`.
        skip_modules: names of linear layers to leave as they are.

    Raises:
        UserError: if `quant_type` is unknown, or an argument is.

    Example:
        >>> import torch
        >>> from transformers import AutoModelForCausalLM
        >>> from modeling_moe.lora import Experts4bitConfig
        >>> model = AutoModelForCausalLM.from_pretrained(
        ...     "allenai/OLMoE-1B-7B-0924", dtype=torch.bfloat16, quantization_config=Experts4bitConfig()
        ... )
    """

    def __init__(
        self,
        quant_type: str = "nf4",
        compress_statistics: bool = True,
        linear_layers: bool = False,
        skip_modules: list[str] | None = None,
        **unknown: Any,
    ):
        if names := unknown.keys() - {"quant_method"}:
            raise UserError(f"{', '.join(sorted(names))}: Experts4bitConfig has no such field, leave it out")
        check_quant_type(quant_type)
        super().__init__(
            load_in_4bit=True,
            bnb_4bit_quant_type=quant_type,
            bnb_4bit_use_double_quant=compress_statistics,
            llm_int8_skip_modules=skip_modules,
        )
        # transformers' annotation asks for one of its own methods, and registered ones are texts
        self.quant_method = METHOD  # pyrefly: ignore[bad-assignment]
        self.linear_layers = linear_layers

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields for config.json, without the `load_in_4bit` by which transformers finds its own quantizer."""
        return {
            "quant_method": METHOD,
            "quant_type": self.bnb_4bit_quant_type,
            "compress_statistics": self.bnb_4bit_use_double_quant,
            "linear_layers": self.linear_layers,
            "skip_modules": self.llm_int8_skip_modules,
        }

    def to_diff_dict(self) -> dict[str, Any]:
        """Returns all fields; none is left out, so that a later default cannot change a saved model."""
        return self.to_dict()


@register_quantizer(METHOD)
class Experts4bitQuantizer(Bnb4BitHfQuantizer):
    """Puts the matrices of experts into 4 bits while transformers loads a model, and linear layers if asked to.

    Args:
        quantization_config: the fields of [`Experts4bitConfig`].
    """

    @property
    def fields(self) -> Experts4bitConfig:
        """The fields of the description that the quantizer was made from."""
        assert isinstance(self.quantization_config, Experts4bitConfig)  # transformers finds the quantizer by it
        return self.quantization_config

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Raises UserError if bitsandbytes is missing or too old."""
        load_bitsandbytes()
        super().validate_environment(*args, **kwargs)

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Makes the linear layers compute in the model's dtype, in which the experts compute too."""
        if dtype not in DTYPES:
            raise UserError(f"dtype is {dtype}: 4 bits are dequantized to bfloat16, float16 or float32, choose one")
        self.quantization_config.bnb_4bit_compute_dtype = dtype
        return dtype

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Returns whether a parameter is a matrix of experts, or the weight of a linear layer in 4 bits."""
        path, _, name = param_name.rpartition(".")
        if name in MATRICES and is_experts(model.get_submodule(path)):
            return True
        return super().param_needs_quantization(model, param_name, **kwargs)

    def _process_model_before_weight_loading(self, model: Any, device_map: Any, **kwargs: Any) -> None:
        experts = {path: module for path, module in model.named_modules() if is_experts(module)}
        self._matrices = sorted(
            {
                f"{path.rpartition('.')[2]}.{name}"
                for path, module in experts.items()
                for name in MATRICES
                if name in module._parameters
            }
        )
        if not self._matrices:
            raise UserError("Experts4bitConfig: the model has no experts, use transformers' BitsAndBytesConfig")
        if getattr(model.config, "distributed_config", None) is not None:
            raise UserError(
                "Experts4bitConfig: experts in 4 bits cannot be split while they are loaded, leave out fsdp_size, tp_size "
                "and ep_size: each process then holds the model, as under DDP"
            )
        for module in experts.values():
            if reason := reason_for_peft(module):
                raise UserError(f"{type(module).__name__} cannot be held in 4 bits: {reason}")
        config = self.fields
        if config.linear_layers:
            routers = [name for name, _ in model.named_modules() if name.rpartition(".")[2] in ROUTERS]
            given, kept = config.llm_int8_skip_modules, {*get_keys_to_not_convert(model), *routers}
            config.llm_int8_skip_modules = sorted({*(given or ()), *kept})
            super()._process_model_before_weight_loading(model, device_map, **kwargs)
            config.llm_int8_skip_modules = given

    def get_quantize_ops(self) -> Any:
        """Returns the operation that quantizes a tensor that transformers has read."""
        return _Quantize(self)

    def update_weight_conversions(self, weight_conversions: list[WeightTransform], model: Any = None) -> list:
        """Makes the conversions of experts work on one expert at a time, or read what was saved in 4 bits."""
        if self.pre_quantized:
            kept = [conversion for conversion in weight_conversions if not _makes_experts(conversion)]
            saved = [self._saved_matrix(name) for name in self._matrices]
            # older releases of transformers do not give the model
            return [*saved, *super().update_weight_conversions(kept, *([] if model is None else [model]))]
        return [_expert_by_expert(conversion) for conversion in weight_conversions]

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        raise UserError("dequantize: experts in 4 bits do not become 16 bits again, load the checkpoint in 16 bits")

    def _saved_matrix(self, name: str) -> WeightConverter:
        pattern = rf"\.{name.replace('.', chr(92) + '.')}"
        sources = [f"{pattern}$", *(rf"{pattern}\.{companion}$" for companion in COMPANIONS)]
        return WeightConverter(sources, [f".{name}"], [_ReadSaved(self)])

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self.fields.linear_layers:
            super()._process_model_after_weight_loading(model, **kwargs)
        for path, module in model.named_modules():
            if not is_experts(module):
                continue
            states, matrices = vars(module).pop(STATES, {}), []
            # PEFT nests its layers in the order of the parameters
            for name, parameter in module.named_parameters(recurse=False):
                if name not in MATRICES:
                    continue
                state = states.get(name, "it is not in the file")
                if isinstance(state, str):
                    raise UserError(f"{path}.{name} cannot be read in 4 bits: {state}, download the checkpoint again")
                matrices.append((name, FourBit(parameter.data, state)))
            hold_experts(module, matrices)
        _save_in_4bit(model)
        # PEFT alone would leave out the adapters of experts in 4 bits, with a warning
        enable()
        return model


def mark_as_4bit(model: Any, config: Experts4bitConfig) -> None:
    """Makes a model whose experts were put into 4 bits in memory like one that was loaded so, for `save_pretrained`."""
    quantizer = Experts4bitQuantizer(config, pre_quantized=False)
    model.hf_quantizer, model.config.quantization_config = quantizer, config
    model.is_quantized, model.quantization_method = True, METHOD
    if getattr(model, "_weight_conversions", None) is None:
        model._weight_conversions = get_model_conversion_mapping(model, add_legacy=False)
    _save_in_4bit(model)


def _save_in_4bit(model: Any) -> None:
    """Leaves out the conversions that would split the matrices of experts again when the model is saved."""
    model._weight_conversions = [
        each for each in model._weight_conversions if not _makes_experts(each) and not _of_quantizer(each)
    ]


def _makes_experts(conversion: WeightTransform) -> bool:
    """Returns whether a conversion makes a matrix of experts."""
    return isinstance(conversion, WeightConverter) and any(
        target.rpartition(".")[2] in MATRICES for target in conversion.target_patterns
    )


def _of_quantizer(conversion: WeightTransform) -> bool:
    operations = conversion.operations if isinstance(conversion, WeightConverter) else ()
    return any(hasattr(operation, "hf_quantizer") for operation in operations)


def _quantized(
    hf_quantizer: Experts4bitQuantizer, model: Any, name: str, pieces: Iterator[torch.Tensor]
) -> torch.Tensor:
    """Quantizes a matrix of experts (E, N, M) from its experts' matrices, and returns the packed numbers."""
    shape, config = model.get_parameter(name).shape, hf_quantizer.quantization_config

    def checked() -> Iterator[torch.Tensor]:
        for piece in pieces:
            if piece.shape[-2:] != shape[1:] or piece.numel() != shape[1:].numel():
                raise ValueError(
                    f"an expert's part of {name} has shape {tuple(piece.shape)} and not {tuple(shape[1:])}"
                )
            yield piece

    matrix = quantize_pieces(checked(), shape, config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant)
    return _keep_state(model, name, matrix)


def _keep_state(model: nn.Module, name: str, matrix: FourBit) -> torch.Tensor:
    """Keeps the state of a matrix at its module until all is loaded, and returns the packed numbers."""
    path, _, name = name.rpartition(".")
    vars(model.get_submodule(path)).setdefault(STATES, {})[name] = matrix.state
    return matrix.packed


class _Quantize(ConversionOps):
    """Quantizes what transformers has read: a fused tensor of experts, or the weight of a linear layer."""

    def __init__(self, hf_quantizer: Experts4bitQuantizer):
        self.hf_quantizer = hf_quantizer

    def convert(self, input_dict: dict[str, Any], *args: Any, model: Any = None, **kwargs: Any) -> dict[str, Any]:
        """Returns the given names with packed numbers."""
        found: dict[str, Any] = {}
        for name, value in input_dict.items():
            tensor = value[0] if isinstance(value, list) else value
            if name.rpartition(".")[2] in MATRICES:
                found[name] = _quantized(self.hf_quantizer, model, name, iter(tensor))
                release(tensor)
            else:
                linear = Bnb4BitHfQuantizer.get_quantize_ops(self.hf_quantizer)
                found |= linear.convert({name: tensor}, *args, model=model, **kwargs)
        return found


class _ExpertByExpert(WeightConverter):
    """A conversion that reads, joins and quantizes one expert after another."""

    __slots__ = ()

    def convert(
        self,
        layer_name: str,
        model: Any = None,
        config: Any = None,
        hf_quantizer: Any = None,
        loading_info: Any = None,
    ) -> dict[str, Any]:
        """Returns the packed numbers of all experts under the name of the matrix."""
        tensors: dict[str, Any] = dict(self.collected_tensors)
        counts = {len(each) for each in tensors.values()}
        if self.quantization_operation is None or len(counts) != 1:
            # transformers names what is missing
            return super().convert(layer_name, model, config, hf_quantizer, loading_info)
        operation, self.quantization_operation = self.quantization_operation, None

        def pieces() -> Iterator[torch.Tensor]:
            for expert in range(counts.pop()):
                # transformers gives functions that read, where it quantizes while it loads
                read = {pattern: each[expert]() for pattern, each in tensors.items()}
                collected: dict[str, Any] = self.collected_tensors
                collected.clear()
                collected |= {pattern: [partial(_identity, tensor)] for pattern, tensor in read.items()}
                converted: dict[str, Any] = WeightConverter.convert(self, layer_name, model, config, hf_quantizer)
                (piece,) = converted.values()
                yield piece
                for tensor in read.values():
                    release(tensor)

        with log_conversion_errors(layer_name, loading_info, (len(tensors), layer_name), operation):
            return {layer_name: _quantized(hf_quantizer, model, layer_name, pieces())}


def _identity(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _expert_by_expert(conversion: WeightTransform) -> WeightTransform:
    """Returns a conversion that quantizes one expert at a time if its operations allow it, else the given conversion."""
    if not isinstance(conversion, WeightConverter) or not _makes_experts(conversion):
        return conversion
    merge, *others = conversion.operations
    of_experts = (
        isinstance(merge, MergeModulelist) and merge.dim == 0 and all(_within_experts(each) for each in others)
    )
    if not of_experts or len(conversion.target_patterns) != 1:
        return conversion
    conversion = copy.copy(conversion)
    conversion.__class__ = _ExpertByExpert
    return conversion


def _within_experts(operation: ConversionOps) -> bool:
    """Returns whether an operation on (E, N, M) treats each expert alone."""
    if isinstance(operation, Concatenate):
        return operation.dim % 3 != 0
    if isinstance(operation, Transpose) and not operation.check_dims:
        return operation.dim0 % 3 != 0 and operation.dim1 % 3 != 0
    return False


class _ReadSaved(ConversionOps):
    """Reads a matrix of experts that was saved in 4 bits."""

    def __init__(self, hf_quantizer: Experts4bitQuantizer):
        self.hf_quantizer = hf_quantizer

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        *,
        full_layer_name: str = "",
        model: Any = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Returns the packed numbers under the matrix's name.

        What is wrong with a damaged file is kept for the end of loading, since transformers would only print it.
        """
        packed, *companions = (input_dict[source][0] if source in input_dict else None for source in source_patterns)
        parts = {name: part for name, part in zip(COMPANIONS, companions, strict=True) if part is not None}
        packed = torch.empty(0) if packed is None else packed
        try:
            state = state_of(parts, packed.shape, packed.dtype, packed.device)
            check_shape(state, model.get_parameter(full_layer_name).shape)
            state.dtype = self.hf_quantizer.quantization_config.bnb_4bit_compute_dtype
        except (ValueError, KeyError, TypeError, AttributeError, AssertionError, RuntimeError) as error:
            state = f"{error}" if isinstance(error, ValueError) else f"{type(error).__name__} {error}".strip()
        return {target_patterns[0]: _keep_state(model, full_layer_name, FourBit(packed, state))}


def state_of(parts: dict[str, torch.Tensor], packed: tuple[int, ...], dtype: torch.dtype, device: Any = "cpu") -> Any:
    """Returns bitsandbytes' state of a matrix from the tensors beside it in a file.

    Args:
        parts: the tensors, by the names in `COMPANIONS`.
        packed: shape of the packed numbers.
        dtype: dtype of the packed numbers.
        device: device of the state.

    Raises:
        ValueError: if a tensor is missing or misshapen.
    """
    nested = {part for part in parts if part.startswith("nested_")}
    settings = [part for part in parts if part.startswith("quant_state.")]
    if not {"absmax", "quant_map"} <= parts.keys() or len(nested) not in (0, 2) or len(settings) != 1:
        raise ValueError(f"only {', '.join(parts) or 'nothing'} lies beside it in the file")
    state = load_bitsandbytes().functional.QuantState.from_dict(parts, device=device)
    numbers, scales = torch.Size(state.shape).numel(), state.absmax.numel()
    wanted = {
        "number of bytes": (math.prod(packed), math.ceil(numbers / 2)),
        "dtype": (dtype, torch.uint8),
        "block": (state.blocksize, BLOCK),
        "number of scales": (scales, math.ceil(numbers / BLOCK)),
        "number of levels": (state.code.numel(), 16),
    }
    if state.nested:
        wanted["number of scales' scales"] = (state.state2.absmax.numel(), math.ceil(scales / SCALES_BLOCK))
    _refuse_others(wanted)
    return state


def check_shape(state: Any, shape: torch.Size) -> None:
    """Raises ValueError if a state belongs to a matrix of another shape."""
    _refuse_others({"shape": (state.shape, shape)})


def _refuse_others(wanted: dict[str, tuple[Any, Any]]) -> None:
    for what, (found, expected) in wanted.items():
        if found != expected:
            raise ValueError(f"its {what} is {found} and not {expected}")
