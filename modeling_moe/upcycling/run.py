# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""Upcycling from folder to folder, and the look at what came out."""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from ..cli import UserError
from ..conversion import to_moe
from ..files import copy_companions, load_source, load_tokenizer, whole_folder
from ..modeling_moe import MoEForCausalLM
from .methods import upcycle
from .options import UpcyclingOptions
from .plan import UpcyclingPlan, make_plan


VERIFICATION_TEXT = (
    "A mixture of experts sends each token through a few of many small networks. A router decides which. At first all "
    "of them are the same, so the model writes what the dense one would have written; training then tells them apart."
)


@dataclass(frozen=True)
class Verification:
    """Source and result on the same text.

    Attributes:
        dense_loss: of the source, nats per token.
        moe_loss: of the result, nats per token.
        largest_difference: between any two of their logits, compared in fp32.
    """

    dense_loss: float
    moe_loss: float
    largest_difference: float


@torch.no_grad()
def verify(dense: PreTrainedModel, moe: MoEForCausalLM, input_ids: torch.Tensor) -> Verification:
    """Runs both models on token ids (1, S)."""
    expected = dense(input_ids, labels=input_ids)
    got = moe(input_ids, labels=input_ids)
    difference = (expected.logits.float() - got.logits.float()).abs().max().item()
    return Verification(expected.loss.item(), got.loss.item(), difference)


def upcycle_checkpoint(
    name_or_path: str,
    output_dir: str | Path,
    options: UpcyclingOptions,
    gguf_file: str | None = None,
    dtype: str = "auto",
    overwrite: bool = False,
    check: bool = False,
) -> tuple[UpcyclingPlan, Verification | None]:
    """Writes a dense checkpoint as a Mixture of Experts, tokenizer, chat template and code included.

    Args:
        name_or_path: folder or Hub name of a model of one of `conversion.DENSE_FAMILIES`.
        output_dir: written whole or not at all.
        options: how to upcycle.
        gguf_file: name of the GGUF file in that folder.
        dtype: of the result; `auto` keeps the source's.
        overwrite: replace `output_dir`.
        check: run source and result on a short text.

    Returns:
        What was made, and how it compares with the source if `check` is set.

    Raises:
        UserError: if the source cannot be loaded or upcycled, or `output_dir` is not empty.
    """
    with whole_folder(output_dir, overwrite) as folder:
        source = load_source(name_or_path, gguf_file, dtype).eval()
        plan = make_plan(source.config, options, source.dtype)
        model = upcycle(to_moe(source), plan.config, options)
        verification = None
        if check:
            tokenizer = load_tokenizer(name_or_path, gguf_file)
            verification = verify(source, model, tokenizer(VERIFICATION_TEXT, return_tensors="pt").input_ids)
            if not plan.inexactness and source.dtype == torch.float32 and verification.largest_difference > 1e-3:
                raise UserError(
                    f"the result differs from {name_or_path} by {verification.largest_difference:.1e} in its logits "
                    "where it should equal it: nothing was written, please report the source's config.json"
                )
        model.save_pretrained(folder)
        copy_companions(name_or_path, folder, gguf_file)
    return plan, verification
