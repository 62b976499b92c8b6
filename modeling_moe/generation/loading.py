# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module loads what writes a text: a model, whole or with few experts in memory, a tokenizer and a draft model."""

from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import PartialState
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..utils.errors import UserError
from ..utils.loading import (
    adapter_base,
    load_config,
    load_model,
    load_tokenizer,
    one_line_for,
    parse_dtype,
    refuse_misfit,
)
from ..utils.locations import local_folder
from .arguments import WriterArguments
from .draft import Draft, load_draft


class Writer(NamedTuple):
    """A model in evaluation mode with all that it needs to write.

    Attributes:
        model: causal LM.
        tokenizer: the model's tokenizer.
        draft: the model that drafts tokens; None without one.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    draft: Draft | None = None


def usable_device(name: str | None) -> torch.device:
    """Returns a device on which a tensor has been made and read; the accelerator, or else the CPU, for None.

    Raises:
        UserError: if the device cannot be used.
    """
    try:
        device = torch.device(name or PartialState().device or "cpu")
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name} cannot be used: {str(error).splitlines()[0]}") from error
    return device


def load_writer(args: WriterArguments, tokenizer: PreTrainedTokenizerBase | None = None) -> Writer:
    """Loads model, tokenizer and draft model in evaluation mode on the chosen device.

    A model with a LoRA adapter makes this function call [`~modeling_moe.lora.enable`].

    Args:
        args: which models to load.
        tokenizer: the model's tokenizer if it is loaded already.

    Raises:
        UserError: if something cannot be loaded, does not fit the model, or the device cannot be used.
    """
    trust = args.trust_remote_code
    if tokenizer is None:
        tokenizer = load_tokenizer(args.model_name_or_path, args.gguf_file, trust_remote_code=trust)
    device = usable_device(args.device)
    if args.budget is not None:
        model = _load_offloaded(args, args.budget, device)
    else:
        model = load_model(args.model_name_or_path, args.gguf_file, args.dtype, trust_remote_code=trust)
        if getattr(model, "peft_config", None):
            # here, since PEFT takes seconds to import
            from ..lora import enable

            enable()
        model.to(device)  # pyrefly: ignore[bad-argument-type]: a decorator of transformers hides the signature
    refuse_misfit(tokenizer, model)
    model.eval()
    return Writer(model, tokenizer, load_draft(args, model, tokenizer) if args.draft is not None else None)


def _load_offloaded(args: WriterArguments, budget: str, device: torch.device) -> PreTrainedModel:
    """Loads a model whose routed experts take at most `budget` on the device, and are read from their tier when needed.

    Raises:
        UserError: if the model cannot be loaded or served from its tier, or the budget is too small.
    """
    # here, since few texts are written by a model that does not fit into memory
    from ..offload import from_pretrained_offloaded

    folder = local_folder(args.model_name_or_path)
    if adapter_base(folder) is not None and not (Path(folder) / "config.json").is_file():
        raise UserError(f"budget needs a whole model, and {folder} is an adapter: merge it first by moe merge_adapter")
    load_config(folder, trust_remote_code=args.trust_remote_code)
    with one_line_for("the model", folder, args.trust_remote_code):
        return from_pretrained_offloaded(
            folder,
            budget=budget,
            tier=args.expert_tier or "disk",
            policy=args.expert_policy or "lfru",
            prefetch=args.expert_prefetch,
            device=device,
            dtype=parse_dtype(args.dtype) or "auto",
            trust_remote_code=args.trust_remote_code,
        )
