# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module gives a source's tensors the names of a MoE checkpoint and checks them against the configuration."""

import torch
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from ..checkpoint_layout import fuse_experts
from ..checkpoints import LazyTensor, State, refuse_quantised
from ..configuration_moe import MoEConfig
from ..model_embeddings import RotaryEmbeddings
from ..modeling_moe import MoEForCausalLM
from ..utils.errors import UserError
from .families.catalogue import family_of, moe_config
from .families.quantized import dequantised
from .families.wrappers import text_source, text_tensors
from .prediction_layers import split_prediction


# fields whose value alone is the size of a dimension of some tensor
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_experts", "kv_lora_rank")


def _on_disk(config: MoEConfig) -> dict[str, torch.Tensor]:
    """Returns the tensors of a MoE checkpoint on disk on the meta device, one tensor for each expert.

    Raises:
        UserError: if the fields of the configuration have allowed values that together make no model.
    """
    try:
        with torch.device("meta"):
            model = MoEForCausalLM(config)
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"no model can be built from the source's config.json ({error}): check its numbers") from error
    tensors = revert_weight_conversion(model, model.state_dict())
    if config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    return tensors


def tensors_on_disk(config: MoEConfig) -> dict[str, tuple[int, ...]]:
    """Returns names and shapes of a MoE checkpoint's tensors on disk, one tensor for each expert."""
    return {name: tuple(tensor.shape) for name, tensor in _on_disk(config).items()}


def _field_of_size(config: MoEConfig, found: tuple[int, ...], asked: tuple[int, ...]) -> str | None:
    """Returns the field of the configuration that gives a size of shape `asked` that `found` lacks, if there is one."""
    return next((name for name in SIZES if getattr(config, name) in set(asked) - set(found)), None)


def import_state(state: State, source: PreTrainedConfig, config: MoEConfig) -> State:
    """Returns the tensors of a checkpoint under our names, in the order of the model; nothing is read.

    Args:
        state: as on disk, or as transformers holds it in memory. Quantised weights are dequantised to bf16, and layers that
            predict further tokens are left out.
        source: its configuration.
        config: the same in our words, see [`moe_config`].

    Raises:
        UserError: names a tensor that is missing, left over, of another shape than the configuration asks for, or
            quantised.
    """
    if source.model_type != MoEConfig.model_type:
        text = text_source(source)
        state, _ = split_prediction(text_tensors(state, source), text)
        state = dequantised(state, getattr(text, "quantization_config", None))
        state = family_of(source).tensors(state, config)
    expected = _on_disk(config)
    if config.tie_word_embeddings:
        state = {name: tensor for name, tensor in state.items() if name != "lm_head.weight"}
    for name in state:
        if name not in expected:
            raise UserError(f"the source has a tensor {name} that its config.json does not account for: check both")
    for name, tensor in expected.items():
        shape = tuple(tensor.shape)
        if name not in state:
            remedy = "set tie_word_embeddings if it is tied" if name == "lm_head.weight" else "restore it"
            raise UserError(f"the source has no tensor for {name}: {remedy}")
        if state[name].shape != shape:
            field = _field_of_size(config, state[name].shape, shape)
            reason = "" if field is None else f": {field} is {getattr(config, field)} there"
            raise UserError(
                f"the source's tensor for {name} has shape {state[name].shape} where its config.json asks for {shape}"
                f"{reason}"
            )
    refuse_quantised(state)
    for name, tensor in expected.items():
        if state[name].dtype.is_floating_point != tensor.is_floating_point():
            found, wanted = (str(dtype).removeprefix("torch.") for dtype in (state[name].dtype, tensor.dtype))
            raise UserError(f"the source's tensor for {name} is {found} where {wanted} belongs: download it again")
    return {name: state[name] for name in expected}


def load_state(config: MoEConfig, state: State) -> MoEForCausalLM:
    """Returns a model in evaluation mode with the tensors of a MoE checkpoint, each in the tensor's own dtype."""
    with torch.device("meta"):
        model = MoEForCausalLM(config)
    # rotary frequencies are not in a checkpoint, so they are computed here
    model.model.rotary_emb = RotaryEmbeddings(config)
    weights = {name: tensor.read() for name, tensor in state.items()}
    for layer in range(config.num_hidden_layers):
        # fusing layer by layer keeps no more than one layer's experts in memory twice
        fuse_experts(weights, f"model.layers.{layer}.mlp.experts.", config.num_experts)
        fuse_experts(weights, f"model.layers.{layer}.self_attn.experts.", config.attention_experts)
    model.load_state_dict(weights, assign=True, strict=not config.tie_word_embeddings)
    model.tie_weights()
    return model.eval()


def to_moe(source: PreTrainedModel) -> MoEForCausalLM:
    """Converts a transformers model in memory to a MoE model that computes the same function.

    Args:
        source: causal LM of one of [`~modeling_moe.conversion.FAMILIES`]; weights whose layout stays the same are
            shared with the result.

    Returns:
        The MoE model in evaluation mode, in the source's dtypes, with the source's generation config.

    Raises:
        UserError: if the family has no conversion, or the model has a feature that a MoE cannot have.
    """
    config = moe_config(source.config)
    state = {name: LazyTensor.of(tensor) for name, tensor in source.state_dict().items()}
    model = load_state(config, import_state(state, source.config, config))
    if source.generation_config is not None:
        model.generation_config = GenerationConfig(**source.generation_config.to_diff_dict())
    return model
