# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module loads the model that a fine-tuning trains, and chooses which of its weights are trained."""

import logging
import re
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..lora import full_shape, is_in_4bit, shown_whole
from ..monitoring import UnreachableRouting, sparse_layers
from ..utils.errors import UserError
from ..utils.loading import load_model
from .arguments import BalanceArguments, LoraArguments, ModelArguments
from .balance import Balance, BalanceSettings, balance
from .presets import is_preset, new_model


logger = logging.getLogger(__name__)


# part of a model -> pattern of the names of its parameters
PARTS = {
    "router": re.compile(r"\.(gate|router)\."),
    "attention": re.compile(r"\.(self_attn|self_attention|attention|attn)\."),
    "experts": re.compile(r"\.experts\."),
}


def trained_parameters(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Returns the numbers of trained and of all parameters for each part of the model.

    A LoRA adapter's parameters count as trained, but not among all parameters: those are the model's without the adapter,
    which are also the merged model's. PEFT's `print_trainable_parameters` divides by the model and adapter together.
    """
    added = re.compile(rf"\.{model.base_model.prefix}|\.modules_to_save\.") if isinstance(model, PeftModel) else None
    counts = {}
    with shown_whole(model):
        parameters = list(model.named_parameters())
    for name, parameter in parameters:
        group = next((part for part, pattern in PARTS.items() if pattern.search(name)), "others")
        trained, total = counts.get(group, (0, 0))
        size = full_shape(parameter).numel()
        in_model = added is None or not added.search(name)
        counts[group] = (trained + size * parameter.requires_grad, total + size * in_model)
    return counts


def train_only(model: nn.Module, part: str) -> None:
    """Lets the parameters of one part of a model be trained, and no others.

    Args:
        model: any model.
        part: key of `PARTS`, such as `"router"`.

    Raises:
        UserError: if the model has no parameter of the part.
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(PARTS[part].search(name) is not None)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(f"method {part} finds no {part} in this model: choose another")


def _add_lora(model: PreTrainedModel, args: LoraArguments) -> PeftModel:
    if getattr(model.config, "controller", None) and not args.lora_router:
        raise UserError(
            "lora_router false would lose the selection biases that the routers' controller moves: set lora_router true"
        )
    adapted = get_peft_model(model, args.config(model))
    for config in adapted.peft_config.values():
        if config.base_model_name_or_path and Path(config.base_model_name_or_path).is_dir():
            # the adapter may be loaded from another working directory
            config.base_model_name_or_path = str(Path(config.base_model_name_or_path).resolve())
    return adapted


def balanced(model: PreTrainedModel | PeftModel, args: BalanceArguments) -> Balance | None:
    """Balances a model of transformers, by the loss of its configuration if the arguments name nothing.

    Raises:
        UserError: if an argument is given that the model cannot use.
    """
    given = args.given()
    try:
        own = any(layer.returns_routing for layer in sparse_layers(model))
    except UnreachableRouting as error:
        if given:
            raise UserError(f"{given[0]} has no effect: {error}") from error
        return None
    if own:
        if given:
            raise UserError(f"{given[0]} has no effect on a model of this package: set it in the model's config.json")
        return None
    config: Any = model.config
    coefficient = args.router_aux_loss_coef
    if coefficient is None:
        coefficient = getattr(config.get_text_config(), "router_aux_loss_coef", None)
    if not (coefficient or args.router_z_loss_coef or args.router_bias_update_rate):
        asks = getattr(config.get_text_config(), "output_router_logits", False)
        # without a loss, the handle switches off the balance loss that the configuration asks transformers for
        return Balance(model, BalanceSettings()) if asks else None
    try:
        handle = balance(model, **vars(args))
    except UserError as error:
        if given:
            raise
        logger.warning(f"The run has no balance loss: {error}.")
        return None
    if isinstance(model, PeftModel) and not all(bias.is_in_adapter(model) for bias in handle.biases):
        raise UserError(
            "router_bias_update_rate moves selection biases that the checkpoints of an adapter do not hold: set lora_router "
            "true, or method full if the biases are not part of the routers"
        )
    return handle


def load_for_training(
    model_args: ModelArguments,
    lora_args: LoraArguments,
    checkpointing: bool,
    resume: str | None,
    tokenizer: PreTrainedTokenizerBase,
) -> PreTrainedModel | PeftModel:
    """Loads the model that a run trains, or makes it from a preset, with the adapter or the frozen parts that the method asks for.

    Args:
        model_args: model, method and dtype.
        lora_args: settings of the adapter.
        checkpointing: whether gradients are checkpointed.
        resume: folder of the checkpoint from which the run continues; None for a new run.
        tokenizer: tokenizer of the model, whose vocabulary a new model gets.

    Raises:
        UserError: if the method does not fit the model.
    """
    source, split = model_args.model_name_or_path, model_args.distributed_config()
    if resume is not None and split is not None and (Path(resume) / "config.json").is_file():
        # `Trainer` loads no weights into a split model
        source = resume
    dtype, trust = model_args.dtype or "auto", model_args.trust_remote_code
    if is_preset(source):
        return new_model(source, tokenizer, dtype, trust_remote_code=trust)
    model = load_model(
        source,
        dtype=dtype,
        distributed_config=split,
        trust_remote_code=trust,
        quantization_config=model_args.quantization_config(),
    )
    if model_args.method != "lora" and is_in_4bit(model):
        raise UserError(f"method {model_args.method} cannot train {source}, whose experts are in 4 bits: use lora")
    if model_args.method == "lora":
        model = _add_lora(model, lora_args)
    elif model_args.method != "full":
        train_only(model, model_args.method)
    if checkpointing and model_args.method != "full":
        # reentrant checkpointing needs an input with a gradient, and the embedding is frozen
        model.enable_input_require_grads()
    return model
