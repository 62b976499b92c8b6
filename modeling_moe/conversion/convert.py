# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module plans and runs the conversion of a checkpoint of one family to the format of another."""

from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from transformers.utils import logging

from ..configuration_moe import MoEConfig
from ..utils.errors import UserError
from .families.catalogue import refuse_to_run
from .families.wrappers import text_source
from .opening import Checkpoint, open_checkpoint
from .plain_transformers import PlainComparison, compare_in_plain_transformers
from .saving import result_folder, save_checkpoint
from .targets.catalogue import AUTO, TARGETS, choose_target, export_plan, refuse_server
from .verification import Verification, verification_ids, verify


logger = logging.get_logger(__name__)


def _resolved_target(checkpoint: Checkpoint, target: str, dtype: str, server: str | None) -> str:
    """Returns the name of a target; of `auto`, the target that [`choose_target`] chooses.

    Raises:
        UserError: if the target cannot hold the model or is the format and dtype that the source already has, or if the
            server is not known to compute the target exactly.
    """
    if target == AUTO:
        return choose_target(checkpoint.config, server).target
    if target != "moe":
        export_plan(checkpoint.config, target)
        if server is not None:
            refuse_server(checkpoint.config, target, server)
    elif server is not None:
        raise UserError(
            f"server {server} needs an export: set target to {AUTO} or to a family; target moe is served by `moe serve`, "
            "and by vLLM where this package is installed"
        )
    elif checkpoint.source_config.model_type == MoEConfig.model_type and dtype == "auto":
        raise UserError(f"{checkpoint.source.folder} is in this format already: name another target")
    return target


class Conversion(NamedTuple):
    """What a conversion wrote.

    Attributes:
        config: the model's configuration as a `MoEConfig`.
        verification: the comparison of source and result, or None if it was not asked for.
        target: format of the result; never `auto`.
        plain: the comparison of source and result in transformers without this package, or None if it was not asked for.
    """

    config: MoEConfig
    verification: Verification | None
    target: str
    plain: PlainComparison | None


class ConversionPlan(NamedTuple):
    """What a conversion would write.

    Attributes:
        config: the model's configuration as a `MoEConfig`.
        nbytes: size of the result's weights in bytes, before a target merges or adds tensors.
        target: format of the result; never `auto`.
        notes: sentences on what the result leaves out, see [`Checkpoint.notes`].
    """

    config: MoEConfig
    nbytes: int
    target: str
    notes: list[str]


def plan_conversion(
    name_or_path: str,
    target: str = "moe",
    gguf_file: str | None = None,
    dtype: str = "auto",
    *,
    trust_remote_code: bool = False,
    server: str | None = None,
) -> ConversionPlan:
    """Checks whether [`convert_checkpoint`] can convert a checkpoint, from the headers of the files alone.

    Raises:
        UserError: as [`convert_checkpoint`].
    """
    checkpoint = open_checkpoint(name_or_path, gguf_file, dtype, trust_remote_code=trust_remote_code)
    target = _resolved_target(checkpoint, target, dtype, server)
    return ConversionPlan(checkpoint.config, _result_bytes(checkpoint, target), target, checkpoint.notes(target))


def _rounds(checkpoint: Checkpoint, target: str) -> bool:
    """Returns whether a conversion rounds weights: by a factor that it multiplies in, or by dequantising."""
    quantised = getattr(text_source(checkpoint.source_config), "quantization_config", None) is not None
    return TARGETS[target].rounds(checkpoint.config) or quantised


def _result_bytes(checkpoint: Checkpoint, target: str) -> int:
    prediction = checkpoint.prediction_for(target)
    return sum(tensor.nbytes for tensor in checkpoint.state.values()) + (prediction.nbytes if prediction else 0)


def convert_checkpoint(
    name_or_path: str,
    output_dir: str | Path,
    target: str = "moe",
    gguf_file: str | None = None,
    dtype: str = "auto",
    overwrite: bool = False,
    check: bool = False,
    *,
    trust_remote_code: bool = False,
    check_plain: bool = False,
    server: str | None = None,
) -> Conversion:
    """Converts a checkpoint of one family to the format of another, with equal logits.

    Args:
        name_or_path: folder or Hub name of a model of one of `FAMILIES` or of this package.
        output_dir: folder that is written whole or not at all; an interrupted run continues where it was.
        target: format of the result: `moe`, a key of `TARGETS`, or `auto`, see
            [`~modeling_moe.conversion.choose_target`].
        gguf_file: name of the GGUF file in the folder, if the model is one.
        dtype: dtype of the result; `auto` keeps the source's.
        overwrite: whether to replace the result of an earlier run at `output_dir`.
        check: whether to run source and result on a short text before the result replaces `output_dir`.
        trust_remote_code: whether code that the source brings may run.
        check_plain: whether to run the source here, and the result in transformers in a process without this package, on a
            short text in fp32 before the result replaces `output_dir`.
        server: key of `SERVERS` of the server that will run the export. A target that the server is not known to compute
            exactly is refused, and `auto` takes one of those that it is.

    Raises:
        UserError: if the source cannot be read or held, the target cannot hold it, `server` does not compute the target
            exactly, or the result computes other logits in transformers.
    """
    checkpoint = open_checkpoint(name_or_path, gguf_file, dtype, trust_remote_code=trust_remote_code)
    target = _resolved_target(checkpoint, target, dtype, server)
    if check_plain and target == "moe":
        raise UserError(
            "transformers alone does not know target moe: name another --target, or compare this one with --verify"
        )
    if check_plain and dtype not in ("auto", "float32"):
        raise UserError(
            f"the check in transformers compares in fp32, and dtype {dtype} rounds weights, which can change the chosen "
            "experts: convert to that dtype with target moe first, then export the result with the check"
        )
    if check or check_plain:
        # a source that cannot run and a missing tokenizer raise errors here, and not after hours of writing weights
        refuse_to_run(checkpoint.source_config)
        input_ids = verification_ids(name_or_path, gguf_file, trust_remote_code=trust_remote_code)
    folder = result_folder(output_dir, overwrite, [checkpoint], _result_bytes(checkpoint, target))
    for note in checkpoint.notes(target):
        logger.warning(note)
    verification = plain = None

    def compare(result: Path) -> dict[str, Any]:
        nonlocal verification, plain
        if check:
            verification = verify(name_or_path, result, gguf_file, dtype, trust_remote_code=trust_remote_code)
        if check_plain:
            weights = checkpoint.state["model.embed_tokens.weight"].dtype
            rounded = weights if _rounds(checkpoint, target) else None
            plain = compare_in_plain_transformers(
                name_or_path, result, input_ids, gguf_file, rounded, trust_remote_code=trust_remote_code
            )
        measured = asdict(verification) if verification else {}
        return measured | ({"in_plain_transformers": plain._asdict()} if plain else {})

    save_checkpoint(
        folder,
        checkpoint.config,
        checkpoint.state,
        checkpoint,
        {"source": checkpoint.identity(), "target": target, "dtype": dtype},
        target,
        check=compare if check or check_plain else None,
        trust_remote_code=trust_remote_code,
        same_weights=True,
    )
    return Conversion(checkpoint.config, verification, target, plain)
