# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""A sparse checkpoint with more or fewer experts, from folder to folder."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ..checkpoints import LazyTensor, State
from ..checkpoints.writer import refuse_full_disk
from ..configuration_moe import MoEConfig
from ..conversion import Checkpoint, load_state, open_checkpoint, save_checkpoint
from ..conversion.convert import result_folder
from ..upcycling.calibration import load_domains, token_ids
from ..utils.errors import UserError
from ..utils.loading import load_tokenizer
from .extraction import extract_task
from .growth import GrowthOptions, grow
from .pruning import PruningOptions, check_pruning, merge, prune
from .usage import Usage, measure_usage


BLOCK = 512


@dataclass
class ResizeOptions:
    """What happens to the experts, and the text that tells which of them matter."""

    method: str = field(
        default="grow",
        metadata={
            "help": "grow: more experts, the same function; prune: keep those that the text uses most; merge: the others "
            "into these; extract: the experts of one task, of a model with router_type='task'"
        },
    )
    data: list[str] | None = field(
        default=None, metadata={"help": "prune, merge, grow by use: domain=file, text to measure the use on"}
    )
    tokens: int = field(default=8192, metadata={"help": "tokens of each domain that are measured"})
    task: int | None = field(default=None, metadata={"help": "extract: the task to keep"})


def _grow(checkpoint: Checkpoint, growth: GrowthOptions, pruning: PruningOptions, usage: Usage | None):
    return *grow(checkpoint.state, checkpoint.config, growth, usage), growth.inexactness()


def _prune(checkpoint: Checkpoint, growth: GrowthOptions, pruning: PruningOptions, usage: Usage | None):
    return *prune(checkpoint.state, checkpoint.config, usage, pruning), pruning.inexactness(checkpoint.config)


def _merge(checkpoint: Checkpoint, growth: GrowthOptions, pruning: PruningOptions, usage: Usage | None):
    return *merge(checkpoint.state, checkpoint.config, usage, pruning), pruning.inexactness(checkpoint.config)


# method -> from checkpoint, options and usage to state, configuration and why it is not exact
METHODS: dict[str, Callable[..., tuple[State, MoEConfig, str]]] = {"grow": _grow, "prune": _prune, "merge": _merge}


def usage_on(checkpoint: Checkpoint, data: list[str], tokens: int, *, trust_remote_code: bool = False) -> Usage:
    """What texts use of a checkpoint's experts; it runs the model, and so holds it in memory.

    Args:
        checkpoint: of a sparse model.
        data: `domain=file` each.
        tokens: of each domain.
        trust_remote_code: run code that the source's tokenizer brings.

    Raises:
        UserError: if a text or the tokenizer cannot be read, or a domain has fewer tokens.
    """
    source = checkpoint.source
    tokenizer = load_tokenizer(str(source.folder), source.gguf_file, trust_remote_code=trust_remote_code)
    blocks = [
        {"input_ids": block[None]}
        for name, documents in load_domains(data).items()
        for block in token_ids(documents, tokenizer, tokens, name).split(BLOCK)
    ]
    return measure_usage(load_state(checkpoint.config, checkpoint.state), blocks)


def _extract(checkpoint: Checkpoint, task: int) -> tuple[State, MoEConfig]:
    model = extract_task(load_state(checkpoint.config, checkpoint.state), task)
    return {name: LazyTensor.of(tensor) for name, tensor in model.state_dict().items()}, model.config


def resize_checkpoint(
    name_or_path: str,
    output_dir: str | Path,
    options: ResizeOptions,
    growth: GrowthOptions,
    pruning: PruningOptions,
    dtype: str = "auto",
    overwrite: bool = False,
    *,
    trust_remote_code: bool = False,
) -> tuple[MoEConfig, MoEConfig, str]:
    """Writes a sparse checkpoint with other experts, tokenizer, chat template and code included.

    Args:
        name_or_path: folder or Hub name of a model of this package, or of a sparse family of `conversion.FAMILIES`.
        output_dir: written whole or not at all; an interrupted run goes on where it was.
        options: what happens.
        growth: how, if they grow.
        pruning: how, if they become fewer.
        dtype: of the result; `auto` keeps the source's.
        overwrite: replace what an earlier run wrote at `output_dir`.
        trust_remote_code: run code that the source brings.

    Returns:
        The configurations of source and result, and why the function changes; empty if it does not.

    Raises:
        UserError: if the source cannot be read, the options make no model of it, or `output_dir` cannot be written.
    """
    if options.method not in (*METHODS, "extract"):
        raise UserError(f"method {options.method!r} is unknown: it must be one of {', '.join(METHODS)}, extract")
    if options.method == "extract" and options.task is None:
        raise UserError("method 'extract' keeps the experts of one task: give task")
    if options.method in ("prune", "merge") and not options.data:
        raise UserError(f"method {options.method!r} ranks the experts by what a text uses: give data")
    if options.tokens < 1:
        raise UserError(f"tokens is {options.tokens}: it must be positive")
    checkpoint = open_checkpoint(name_or_path, dtype=dtype, trust_remote_code=trust_remote_code)
    if len(checkpoint.config.mlp_only_layers) == checkpoint.config.num_hidden_layers:
        raise UserError(f"{name_or_path} has no sparse layer: upcycle it first")
    if options.method in ("prune", "merge"):
        check_pruning(checkpoint.config, pruning)
    folder = result_folder(output_dir, overwrite, [checkpoint], 0)
    usage = None
    if options.data:
        usage = usage_on(checkpoint, options.data, options.tokens, trust_remote_code=trust_remote_code)
    if options.method == "extract":
        (state, config), inexactness = _extract(checkpoint, options.task), ""
    else:
        state, config, inexactness = METHODS[options.method](checkpoint, growth, pruning, usage)
    refuse_full_disk(folder, sum(tensor.nbytes for tensor in state.values()))
    config.dtype = checkpoint.config.dtype
    scores = None if usage is None else {i: layer.load.tolist() for i, layer in usage.layers.items()}
    recipe = {
        "source": checkpoint.identity(),
        "options": asdict(options) | asdict(growth) | asdict(pruning),
        "load": scores,
        "dtype": str(checkpoint.config.dtype),
    }
    save_checkpoint(folder, config, state, checkpoint, recipe, trust_remote_code=trust_remote_code)
    return checkpoint.config, config, inexactness
