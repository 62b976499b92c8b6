# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module reads a saved LoRA adapter as low-rank factors of named parameters, without the weights of the base model.

PEFT's own layers, built on the meta device, say which tensor of the file belongs to which parameter.
"""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ..checkpoints import LazyTensor, State
from ..checkpoints.safetensors_format import read_tensors
from ..utils.errors import UserError


PREFIX = "base_model.model."
# what changes a model by more than low-rank factors: field of adapter_config.json -> the part in words
UNSERVED = {
    "modules_to_save": "modules that are trained in full",
    "trainable_token_indices": "single token embeddings",
    "use_dora": "the magnitudes of DoRA",
    "lora_bias": "biases of low-rank factors",
    "layer_replication": "repeated layers",
    "alora_invocation_tokens": "tokens that switch the adapter on",
    "use_qalora": "the pooled inputs of QA-LoRA",
    "use_bdlora": "block-diagonal factors",
}
# initialisations of PEFT that leave the base model's weights as they are
PLAIN_INITS = ("gaussian", "eva", "orthogonal", "lora_ga", "mica")


@dataclass(frozen=True)
class Factors:
    """The low-rank update of one parameter: the matrix (N, M) of a linear layer or of each of E experts.

    The update is `scaling * b @ a`, with R ranks, M inputs and N outputs.

    Attributes:
        parameter: name of the parameter in the model in memory.
        experts: number E of experts in the parameter, or None for a linear layer.
        transposed: whether the parameter of experts is (E, M, N) in memory, and not (E, N, M).
        scaling: factor of the update.
        saved_a: the first factor as PEFT saves it, (R, M) or (E * R, M), expert after expert.
        saved_b: the second factor as PEFT saves it, (N, R) or (N, R * E), rank after rank.
    """

    parameter: str
    experts: int | None
    transposed: bool
    scaling: float
    saved_a: LazyTensor
    saved_b: LazyTensor

    @property
    def rank(self) -> int:
        """The rank R of each update."""
        return self.saved_a.shape[0] // (self.experts or 1)

    def a_of(self, expert: int | None) -> LazyTensor:
        """Returns the first factor (R, M) of the linear layer, or of one expert."""
        first = (expert or 0) * self.rank
        return self.saved_a[first : first + self.rank]

    @property
    def b_shape(self) -> tuple[int, ...]:
        """The shape of [`Factors.read_b`]."""
        if self.experts is None:
            return self.saved_b.shape
        inner = (self.saved_b.shape[0], self.rank)
        return (self.experts, *(reversed(inner) if self.transposed else inner))

    def read_b(self) -> torch.Tensor:
        """Reads the second factor in the layout of the parameter with R in the place of M: (N, R), (E, N, R) or (E, R, N)."""
        saved = self.saved_b.read()
        if self.experts is None:
            return saved
        order = (2, 1, 0) if self.transposed else (2, 0, 1)
        return saved.view(len(saved), self.rank, self.experts).permute(order)


def _refuse(folder: Path, part: str) -> NoReturn:
    raise UserError(
        f"the adapter in {folder} trains {part}, which no server loads from an adapter: merge it with moe merge_adapter, "
        "and serve the merged model, or train without that part (routers: moe finetune --lora_router false)"
    )


def _lora_config(folder: Path) -> LoraConfig:
    """Returns the adapter's configuration.

    Raises:
        UserError: if the adapter is no plain LoRA.
    """
    config = PeftConfig.from_pretrained(str(folder))
    if not isinstance(config, LoraConfig):
        raise UserError(f"the adapter in {folder} is a {config.peft_type}: only LoRA adapters can be exported")
    for name, part in UNSERVED.items():
        if getattr(config, name, None):
            value = getattr(config, name)
            _refuse(folder, f"{part} ({name}: {', '.join(value) if name == 'modules_to_save' else value})")
    if config.bias != "none":
        _refuse(folder, f"biases (bias: {config.bias})")
    init = config.init_lora_weights
    if isinstance(init, str) and init.lower() not in PLAIN_INITS:
        _refuse(folder, f"factors that were split off the base model's weights (init_lora_weights: {init})")
    return config


def meta_model(config: PreTrainedConfig, trust_remote_code: bool = False) -> PreTrainedModel:
    """Returns the causal LM of a configuration without memory for weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)


def _layers(model: PreTrainedModel, config: LoraConfig, folder: Path) -> dict[str, LoraLayer]:
    """Returns PEFT's layers of the adapter on `model`, by their names in the adapter's file."""
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        try:
            adapted = get_peft_model(model, config)
        except (ImportError, ValueError, RuntimeError, KeyError, TypeError) as error:
            raise UserError(f"the adapter in {folder} does not fit the base model: {error}") from error
    layers = {name: module for name, module in adapted.named_modules() if isinstance(module, LoraLayer)}
    for name, layer in layers.items():
        if "default" not in layer.lora_A:
            _refuse(folder, f"the embedding {name.removeprefix(PREFIX)}")
    return layers


def _factors(name: str, layer: LoraLayer, saved: State) -> Factors:
    path = name.removeprefix(PREFIX).replace(".base_layer", "")
    a, b = saved[f"{name}.lora_A.weight"], saved[f"{name}.lora_B.weight"]
    scaling = float(layer.scaling["default"])
    if not isinstance(layer, ParamWrapper):
        return Factors(f"{path}.weight", None, False, scaling, a, b)
    stacked = layer.get_param().ndim == 3
    transposed = stacked and bool(getattr(layer.get_base_layer(), "is_transposed", False))
    experts = layer.num_experts if stacked else None
    return Factors(f"{path}.{layer.parameter_name}", experts, transposed, scaling, a, b)


def read_factors(folder: Path, base: PreTrainedConfig, trust_remote_code: bool = False) -> list[Factors]:
    """Returns the factors of a saved adapter, with no tensor read.

    Args:
        folder: folder of the adapter.
        base: configuration of the model that the adapter was trained on.
        trust_remote_code: whether the base model's own code may run.

    Raises:
        UserError: if the adapter is no plain LoRA, is not in safetensors, or does not fit the model.
    """
    config = _lora_config(folder)
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        raise UserError(f"{folder} has no adapter_model.safetensors: save the adapter with save_pretrained")
    saved = read_tensors(file)
    if held := next((name for name in saved if name.endswith(".base_layer.weight")), None):
        _refuse(folder, f"the embedding or head {held.removeprefix(PREFIX).removesuffix('.base_layer.weight')}")
    layers = _layers(meta_model(base, trust_remote_code), config, folder)
    asked = {
        f"{name}.lora_{part}.weight": tuple(getattr(layer, f"lora_{part}")["default"].weight.shape)
        for name, layer in layers.items()
        for part in "AB"
    }
    if lost := sorted(set(saved) - set(asked)):
        raise UserError(
            f"the adapter in {folder} has {lost[0]} ({len(lost)} such tensors), for which the base model has no place: give "
            "the model that it was trained on as --base_model"
        )
    for name, shape in asked.items():
        if name not in saved or saved[name].shape != shape:
            found = f"with shape {saved[name].shape}" if name in saved else "not at all"
            raise UserError(
                f"the adapter in {folder} has {name} {found} where the base model asks for {shape}: give the model that it "
                "was trained on as --base_model"
            )
    return [_factors(name, layer, saved) for name, layer in layers.items()]
