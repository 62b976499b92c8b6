# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""Upcycling from folder to folder."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from ..conversion import Checkpoint, Verification, load_state, open_checkpoint, save_checkpoint, verify
from ..conversion.convert import result_folder
from ..conversion.verification import verification_ids
from ..utils.errors import UserError
from ..utils.loading import load_tokenizer
from .assembly import average, refuse_different_tensors, upcycle
from .calibration import load_domains, measure
from .options import UpcyclingOptions
from .plan import UpcyclingPlan, make_plan


# difference of logits in fp32 above which a result that should equal its source does not
TOLERANCE = 1e-3


def open_sources(
    name_or_path: str,
    options: UpcyclingOptions,
    gguf_file: str | None = None,
    dtype: str = "auto",
    *,
    trust_remote_code: bool = False,
) -> list[Checkpoint]:
    """The dense checkpoint and `options.sources`, none of them read; arguments as [`upcycle_checkpoint`]'s."""
    paths = [(name_or_path, gguf_file), *((source, None) for source in options.sources or [])]
    return [open_checkpoint(path, gguf, dtype, trust_remote_code=trust_remote_code) for path, gguf in paths]


def plan_upcycling(checkpoints: Sequence[Checkpoint], options: UpcyclingOptions) -> UpcyclingPlan:
    """What upcycling these checkpoints will make.

    Raises:
        UserError: if they do not fit together, or an option makes no model.
    """
    first, *further = (checkpoint.source_config for checkpoint in checkpoints)
    return make_plan(first, options, checkpoints[0].config.dtype, further)


def measure_sources(
    checkpoints: Sequence[Checkpoint],
    plan: UpcyclingPlan,
    options: UpcyclingOptions,
    *,
    trust_remote_code: bool = False,
) -> dict[str, torch.Tensor]:
    """What routers and neuron groups take from `options.calibration_data`; empty if they take nothing.

    It runs the dense model, of several sources their average, and so holds it in memory.

    Raises:
        UserError: if the texts or the tokenizer cannot be read.
    """
    if not options.needs_text:
        return {}
    domains = load_domains(options.calibration_data or [])
    source = checkpoints[0].source
    tokenizer = load_tokenizer(str(source.folder), source.gguf_file, trust_remote_code=trust_remote_code)
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
    *,
    trust_remote_code: bool = False,
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
        overwrite: replace what an earlier run wrote at `output_dir`.
        check: run source and result on a short text before the result takes its place.
        max_shard_size: largest file; what an interruption costs at most.
        trust_remote_code: run code that the sources bring.

    Returns:
        What was made, and how it compares with the source if `check` is set.

    Raises:
        UserError: if a source cannot be read or upcycled, `output_dir` cannot be written, or the check fails.
    """
    checkpoints = open_sources(name_or_path, options, gguf_file, dtype, trust_remote_code=trust_remote_code)
    plan = plan_upcycling(checkpoints, options)
    folder = result_folder(output_dir, overwrite, checkpoints, plan.bytes_on_disk)
    if check:
        # a source without a tokenizer is known now, not after hours of writing
        verification_ids(name_or_path, gguf_file, trust_remote_code=trust_remote_code)
    measured = measure_sources(checkpoints, plan, options, trust_remote_code=trust_remote_code)
    state = upcycle([checkpoint.state for checkpoint in checkpoints], plan.config, options, measured)
    verification = None

    def compare(result: Path) -> None:
        nonlocal verification
        verification = verify(name_or_path, result, gguf_file, dtype, trust_remote_code=trust_remote_code)
        inexact = plan.inexactness or plan.dtype != torch.float32
        if not inexact and not verification.largest_difference <= TOLERANCE:
            raise UserError(
                f"the result differs from {name_or_path} by {verification.largest_difference:.1e} in its logits where it "
                "should equal it: please report the source's config.json"
            )

    save_checkpoint(
        folder,
        plan.config,
        state,
        checkpoints[0],
        recipe(checkpoints, options, measured),
        max_shard_size=max_shard_size,
        check=compare if check else None,
        trust_remote_code=trust_remote_code,
    )
    return plan, verification
