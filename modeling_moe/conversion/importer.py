# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""transformers' weights into ours: the fused tensors are laid out alike, so that names are all that changes."""

from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedModel

from ..files import copy_companions, load_source, whole_folder
from ..modeling_moe import MoEForCausalLM
from .families import moe_config


# Qwen2-MoE writes one shared expert in the singular; its gate keeps that name here too
RENAMED = {".shared_expert.": ".shared_experts."}


def to_moe(source: PreTrainedModel) -> MoEForCausalLM:
    """The same function as a MoE model.

    Args:
        source: causal LM of one of [`FAMILIES`]; its weights are shared with the result, not copied.

    Returns:
        In evaluation mode, in the source's dtypes, with its generation config.

    Raises:
        UserError: if the family has no conversion.
    """
    config = moe_config(source.config)
    with torch.device("meta"):
        model = MoEForCausalLM(config)
    # rotary frequencies are computed, not loaded
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
    weights = {}
    for name, tensor in source.state_dict().items():
        for old, new in RENAMED.items():
            name = name.replace(old, new)
        weights[name] = tensor
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    if source.generation_config is not None:
        model.generation_config = GenerationConfig(**source.generation_config.to_diff_dict())
    return model.eval()


def convert_checkpoint(
    name_or_path: str,
    output_dir: str | Path,
    gguf_file: str | None = None,
    dtype: str = "auto",
    overwrite: bool = False,
) -> MoEForCausalLM:
    """Writes a checkpoint of transformers' as a MoE checkpoint, tokenizer and chat template included.

    Args:
        name_or_path: folder or Hub name of a model of one of [`FAMILIES`].
        output_dir: written whole or not at all.
        gguf_file: name of the GGUF file in that folder.
        dtype: of the result; `auto` keeps the source's.
        overwrite: replace `output_dir`.

    Returns:
        The converted model.

    Raises:
        UserError: if the source cannot be loaded, its family has no conversion, or `output_dir` is not empty.
    """
    with whole_folder(output_dir, overwrite) as folder:
        model = to_moe(load_source(name_or_path, gguf_file, dtype))
        model.save_pretrained(folder)
        copy_companions(name_or_path, folder, gguf_file)
    return model
