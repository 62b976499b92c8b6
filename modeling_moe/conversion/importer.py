# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""A source's tensors as those of a MoE checkpoint, checked against its configuration before any is read."""

import torch
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from ..checkpoints import fuse_experts
from ..cli import UserError
from ..configuration_moe import MoEConfig
from ..embeddings import RotaryEmbeddings
from ..modeling_moe import MoEForCausalLM
from ..streaming import LazyTensor, State, refuse_quantised
from .families import family_of, moe_config


def tensors_on_disk(config: MoEConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a MoE checkpoint's tensors, one for each expert."""
    with torch.device("meta"):
        model = MoEForCausalLM(config)
    shapes = {
        name: tuple(tensor.shape) for name, tensor in revert_weight_conversion(model, model.state_dict()).items()
    }
    if config.tie_word_embeddings:
        shapes.pop("lm_head.weight", None)
    return shapes


def import_state(state: State, source: PreTrainedConfig, config: MoEConfig) -> State:
    """The tensors of a checkpoint under our names, in the order of the model; nothing is read.

    Args:
        state: as on disk, or as transformers holds it in memory.
        source: its configuration.
        config: the same in our words, see [`moe_config`].

    Raises:
        UserError: names a tensor that is missing, left over, of another shape than the configuration asks for, or
            quantised.
    """
    if source.model_type != MoEConfig.model_type:
        state = family_of(source).tensors(state, config)
    shapes = tensors_on_disk(config)
    if config.tie_word_embeddings:
        state = {name: tensor for name, tensor in state.items() if name != "lm_head.weight"}
    for name in state:
        if name not in shapes:
            raise UserError(f"the source has a tensor {name} that its config.json does not account for: check both")
    for name, shape in shapes.items():
        if name not in state:
            remedy = "set tie_word_embeddings if it is tied" if name == "lm_head.weight" else "restore it"
            raise UserError(f"the source has no tensor for {name}: {remedy}")
        if state[name].shape != shape:
            raise UserError(
                f"the source's tensor for {name} has shape {state[name].shape} where its config.json asks for {shape}"
            )
    refuse_quantised(state)
    return {name: state[name] for name in shapes}


def load_state(config: MoEConfig, state: State) -> MoEForCausalLM:
    """A model in memory, in evaluation mode, with the tensors of a MoE checkpoint in their own dtypes."""
    with torch.device("meta"):
        model = MoEForCausalLM(config)
    # rotary frequencies are computed, not loaded
    model.model.rotary_emb = RotaryEmbeddings(config)
    weights = {name: tensor.read() for name, tensor in state.items()}
    for layer in range(config.num_hidden_layers):
        # here, so that no more than one layer's experts are held twice
        fuse_experts(weights, f"model.layers.{layer}.mlp.experts.", config.num_experts)
    model.load_state_dict(weights, assign=True, strict=not config.tie_word_embeddings)
    model.tie_weights()
    return model.eval()


def to_moe(source: PreTrainedModel) -> MoEForCausalLM:
    """The same function as a MoE model.

    Args:
        source: causal LM of one of [`FAMILIES`]; its weights are shared with the result where their layout is the same.

    Returns:
        In evaluation mode, in the source's dtypes, with its generation config.

    Raises:
        UserError: if the family has no conversion, or the model something that cannot be held.
    """
    config = moe_config(source.config)
    state = {name: LazyTensor.of(tensor) for name, tensor in source.state_dict().items()}
    model = load_state(config, import_state(state, source.config, config))
    if source.generation_config is not None:
        model.generation_config = GenerationConfig(**source.generation_config.to_diff_dict())
    return model
