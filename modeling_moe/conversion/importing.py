# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""A source's tensors as those of a MoE checkpoint, checked against its configuration before any is read."""

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


# fields that are a side of a tensor by themselves
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_experts", "kv_lora_rank")


def _on_disk(config: MoEConfig) -> dict[str, torch.Tensor]:
    """The tensors of a MoE checkpoint on disk without their numbers, one for each expert.

    Raises:
        UserError: if the configuration's numbers are each allowed and make no model together.
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
    """Names and shapes of a MoE checkpoint's tensors, one for each expert."""
    return {name: tuple(tensor.shape) for name, tensor in _on_disk(config).items()}


def _reason(config: MoEConfig, found: tuple[int, ...], asked: tuple[int, ...]) -> str:
    """The end of a message: a field of the configuration that gives a size which the tensor has not."""
    for name in SIZES:
        if (size := getattr(config, name)) in set(asked) - set(found):
            return f": {name} is {size} there"
    return ""


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
            raise UserError(
                f"the source's tensor for {name} has shape {state[name].shape} where its config.json asks for {shape}"
                f"{_reason(config, state[name].shape, shape)}"
            )
    refuse_quantised(state)
    for name, tensor in expected.items():
        if state[name].dtype.is_floating_point != tensor.is_floating_point():
            found, wanted = (str(dtype).removeprefix("torch.") for dtype in (state[name].dtype, tensor.dtype))
            raise UserError(f"the source's tensor for {name} is {found} where {wanted} belongs: download it again")
    return {name: state[name] for name in expected}


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
