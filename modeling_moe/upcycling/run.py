# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""Upcycling from folder to folder."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from ..cli import UserError
from ..conversion import Checkpoint, Verification, load_state, open_checkpoint, save_checkpoint, verify
from ..utils.loading import load_tokenizer
from .calibration import load_domains, measure
from .layers import average, refuse_different_tensors, upcycle
from .options import UpcyclingOptions
from .plan import UpcyclingPlan, make_plan


# difference of logits in fp32 above which a result that should equal its source does not
TOLERANCE = 1e-3


def open_sources(
    name_or_path: str, options: UpcyclingOptions, gguf_file: str | None = None, dtype: str = "auto"
) -> list[Checkpoint]:
    """The dense checkpoint and `options.sources`, none of them read; arguments as [`upcycle_checkpoint`]'s."""
    first = open_checkpoint(name_or_path, gguf_file, dtype)
    return [first, *(open_checkpoint(source, dtype=dtype) for source in options.sources or [])]


def plan_upcycling(checkpoints: Sequence[Checkpoint], options: UpcyclingOptions) -> UpcyclingPlan:
    """What upcycling these checkpoints will make.

    Raises:
        UserError: if they do not fit together, or an option makes no model.
    """
    first, *further = (checkpoint.source_config for checkpoint in checkpoints)
    return make_plan(first, options, checkpoints[0].config.dtype, further)


def measure_sources(
    checkpoints: Sequence[Checkpoint], plan: UpcyclingPlan, options: UpcyclingOptions
) -> dict[str, torch.Tensor]:
    """What routers and neuron groups take from `options.calibration_data`; empty if they take nothing.

    It runs the dense model, of several sources their average, and so holds it in memory.

    Raises:
        UserError: if the texts or the tokenizer cannot be read.
    """
    if not options.needs_text:
        return {}
    domains = load_domains(options.calibration_data or [])
    tokenizer = load_tokenizer(str(checkpoints[0].source.folder), checkpoints[0].source.gguf_file)
    states = [checkpoint.state for checkpoint in checkpoints]
    refuse_different_tensors(states, options.sources or [])
    merged = {name: average([state[name] for state in states], options.source_weights) for name in states[0]}
    return measure(load_state(checkpoints[0].config, merged), tokenizer, domains, plan.config, options)


def recipe(checkpoints: Sequence[Checkpoint], options: UpcyclingOptions, measured: Mapping[str, torch.Tensor]) -> dict:
    """All that a byte of the result depends on."""
    digests = {name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for name, tensor in measured.items()}
    return {
        "method": "upcycle",
        "sources": [checkpoint.identity() for checkpoint in checkpoints],
        "options": asdict(options),
        "measured": digests,
        "dtype": str(checkpoints[0].config.dtype),
    }


def upcycle_checkpoint(
    name_or_path: str,
    output_dir: str | Path,
    options: UpcyclingOptions,
    gguf_file: str | None = None,
    dtype: str = "auto",
    overwrite: bool = False,
    check: bool = False,
    max_shard_size: str = "5GB",
) -> tuple[UpcyclingPlan, Verification | None]:
    """Writes dense checkpoints as a Mixture of Experts, tokenizer, chat template and code included.

    Tensor by tensor, so that memory does not grow with the model unless something is measured or checked on text. An
    interrupted run goes on where it was when called again.

    Args:
        name_or_path: folder or Hub name of a model of one of `conversion.DENSE_FAMILIES`.
        output_dir: written whole or not at all.
        options: how to upcycle.
        gguf_file: name of the GGUF file in that folder.
        dtype: of the result; `auto` keeps the source's.
        overwrite: replace `output_dir`.
        check: run source and result on a short text before the result takes its place.
        max_shard_size: largest file; what an interruption costs at most.

    Returns:
        What was made, and how it compares with the source if `check` is set.

    Raises:
        UserError: if a source cannot be read or upcycled, `output_dir` cannot be written, or the check fails.
    """
    checkpoints = open_sources(name_or_path, options, gguf_file, dtype)
    plan = plan_upcycling(checkpoints, options)
    measured = measure_sources(checkpoints, plan, options)
    state = upcycle([checkpoint.state for checkpoint in checkpoints], plan.config, options, measured)
    verification = None

    def compare(folder: Path) -> None:
        nonlocal verification
        verification = verify(name_or_path, folder, gguf_file, dtype)
        inexact = plan.inexactness or plan.dtype != torch.float32
        if not inexact and not verification.largest_difference <= TOLERANCE:
            raise UserError(
                f"the result differs from {name_or_path} by {verification.largest_difference:.1e} in its logits where it "
                "should equal it: please report the source's config.json"
            )

    save_checkpoint(
        output_dir,
        plan.config,
        state,
        checkpoints[0],
        recipe(checkpoints, options, measured),
        overwrite=overwrite,
        max_shard_size=max_shard_size,
        check=compare if check else None,
    )
    return plan, verification
