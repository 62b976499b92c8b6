# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module upcycles the dense checkpoints in some folders and writes the sparse checkpoint into another folder."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..conversion import (
    Checkpoint,
    Verification,
    load_state,
    open_checkpoint,
    result_folder,
    save_checkpoint,
    verification_ids,
    verify,
)
from ..data import load_domains
from ..utils.errors import UserError
from ..utils.loading import load_tokenizer
from .assembly import assemble, average, refuse_different_tensors
from .calibration import measure
from .options import UpcyclingOptions
from .plan import UpcyclingPlan, make_plan
from .request import weights_dtype


# largest difference between the fp32 logits of a source and of a result that computes the dense function
TOLERANCE = 1e-3


def open_sources(
    name_or_path: str,
    options: UpcyclingOptions,
    gguf_file: str | None = None,
    dtype: str = "auto",
    *,
    trust_remote_code: bool = False,
) -> list[Checkpoint]:
    """Opens the dense checkpoint and `options.sources` without reading weights; see [`upcycle_checkpoint`] for the
    arguments.
    """
    paths = [(name_or_path, gguf_file), *((source, None) for source in options.sources or [])]
    return [open_checkpoint(path, gguf, dtype, trust_remote_code=trust_remote_code) for path, gguf in paths]


def plan_upcycling(checkpoints: Sequence[Checkpoint], options: UpcyclingOptions) -> UpcyclingPlan:
    """Plans the upcycling of opened checkpoints.

    Raises:
        UserError: if the checkpoints differ in architecture, or no model can be made with these options.
    """
    first, *further = (checkpoint.source_config for checkpoint in checkpoints)
    return make_plan(first, options, weights_dtype(checkpoints[0].config), further)


def measure_sources(
    checkpoints: Sequence[Checkpoint],
    plan: UpcyclingPlan,
    options: UpcyclingOptions,
    *,
    trust_remote_code: bool = False,
) -> dict[str, torch.Tensor]:
    """Measures routers and neuron groups on `options.calibration_data`; the result is empty if the options need no
    text.

    The dense model (the average of several sources) is loaded into memory and run.

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
    """Returns everything that the bytes of the result depend on."""
    digests = {name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for name, tensor in measured.items()}
    return {
        "method": "upcycle",
        "sources": [checkpoint.identity() for checkpoint in checkpoints],
        "options": asdict(options),
        "measured": digests,
        "dtype": str(checkpoints[0].config.dtype),
    }


def refuse_difference(verification: Verification, plan: UpcyclingPlan, source: str) -> None:
    """Refuses an fp32 result that should compute the dense function and does not.

    Raises:
        UserError: if the logits of source and result differ by more than `TOLERANCE`.
    """
    if plan.reason_not_exact or plan.dtype != torch.float32 or verification.largest_difference <= TOLERANCE:
        return
    raise UserError(
        f"the logits of the result differ from those of {source} by {verification.largest_difference:.1e}, but should be "
        "equal: please report the source's config.json"
    )


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
    """Upcycles dense checkpoints and writes the result with tokenizer, chat template and code.

    Tensors are read and written one by one, so that memory does not grow with the model unless something is measured
    or verified on text. An interrupted run continues when it is called again with the same arguments.

    Args:
        name_or_path: folder or Hub name of a model of one of `conversion.DENSE_FAMILIES`.
        output_dir: folder of the result; written as a whole or not at all.
        options: how to upcycle.
        gguf_file: name of the GGUF file in the source's folder.
        dtype: dtype of the result; `auto` keeps the source's.
        overwrite: replace the result of an earlier run at `output_dir`.
        check: run source and result on a short text before the result is moved to `output_dir`.
        max_shard_size: largest size of a file; an interruption loses at most one file.
        trust_remote_code: run Python code from the sources.

    Returns:
        The plan of the result, and the comparison with the source if `check` is set.

    Raises:
        UserError: if a source cannot be read or upcycled, `output_dir` cannot be written, or the check fails.
    """
    checkpoints = open_sources(name_or_path, options, gguf_file, dtype, trust_remote_code=trust_remote_code)
    plan = plan_upcycling(checkpoints, options)
    folder = result_folder(output_dir, overwrite, checkpoints, plan.bytes_on_disk)
    if check:
        # a source without a tokenizer is refused here, not after hours of writing
        verification_ids(name_or_path, gguf_file, trust_remote_code=trust_remote_code)
    measured = measure_sources(checkpoints, plan, options, trust_remote_code=trust_remote_code)
    state = assemble([checkpoint.state for checkpoint in checkpoints], plan.config, options, measured)
    verifications: list[Verification] = []

    def compare(result: Path) -> dict[str, Any]:
        verification = verify(name_or_path, result, gguf_file, dtype, trust_remote_code=trust_remote_code)
        refuse_difference(verification, plan, name_or_path)
        verifications.append(verification)
        return asdict(verification)

    save_checkpoint(
        folder,
        plan.config,
        state,
        checkpoints[0],
        recipe(checkpoints, options, measured) | {"reason_not_exact": plan.reason_not_exact},
        max_shard_size=max_shard_size,
        check=compare if check else None,
        trust_remote_code=trust_remote_code,
    )
    return plan, verifications[0] if verifications else None
