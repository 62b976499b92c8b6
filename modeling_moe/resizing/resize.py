# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module reads a sparse checkpoint from a folder and writes one with more or fewer experts into another folder."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from ..checkpoints import LazyTensor, State, refuse_full_disk
from ..configuration_moe import MoEConfig
from ..conversion import Checkpoint, load_state, open_checkpoint, result_folder, save_checkpoint
from ..data import DataArguments, token_ids
from ..utils.errors import UserError
from ..utils.loading import load_tokenizer
from .extraction import extract_task
from .growth import GrowthOptions, grow
from .pruning import PruningOptions, check_pruning, merge, prune
from .usage import Usage, measure_usage


# tokens of a block of text, which the model reads on its own
BLOCK = 512


@dataclass
class ResizeOptions:
    """These options name the method, and the text that the use of the experts is measured on."""

    method: Literal["grow", "prune", "merge", "extract"] = field(
        default="grow",
        metadata={
            "help": "grow: add experts without changing the function; prune: keep the experts that the text uses most; "
            "merge: merge the other experts into these; extract: keep the experts of one task of a model with "
            "router_type='task'"
        },
    )
    data: list[str] | None = field(
        default=None, metadata={"help": "text to measure the use of experts on, each as domain=file"}
    )
    tokens: int = field(default=8192, metadata={"help": "number of tokens measured in each domain"})
    task: int | None = field(default=None, metadata={"help": "id of the task that method extract keeps"})

    def check(self) -> None:
        """Refuses options that cannot be used together.

        Raises:
            UserError: if an option is refused; the message names the option and the remedy.
        """
        if self.method not in METHODS:
            raise UserError(f"method {self.method!r} is unknown: it must be one of {', '.join(METHODS)}")
        if self.method == "extract" and self.task is None:
            raise UserError("method 'extract' keeps the experts of one task: give task")
        if self.method in RANKING and not self.data:
            raise UserError(f"method {self.method!r} ranks the experts by their use on a text: give data")
        if self.tokens < 1:
            raise UserError(f"tokens is {self.tokens}: it must be positive")


@dataclass(frozen=True)
class ResizeRequest:
    """Holds everything that a method of resizing may read.

    Attributes:
        checkpoint: the opened source.
        options: method, data and task.
        growth: options of method `grow`.
        pruning: options of methods `prune` and `merge`.
        usage: usage of the experts on `options.data`; None without data.
    """

    checkpoint: Checkpoint
    options: ResizeOptions
    growth: GrowthOptions
    pruning: PruningOptions
    usage: Usage | None

    def required_usage(self) -> Usage:
        """Returns the usage of the experts.

        Raises:
            UserError: if no text was given to measure it on.
        """
        if self.usage is None:
            raise UserError(f"method {self.options.method!r} ranks the experts by their use on a text: give data")
        return self.usage


class Resized(NamedTuple):
    """Holds a resized checkpoint, its configuration, and why its function differs from the source's (None if equal)."""

    state: State
    config: MoEConfig
    reason_not_exact: str | None


class ResizeResult(NamedTuple):
    """Holds the configurations of source and result, and why their functions differ (None if they are equal)."""

    source: MoEConfig
    result: MoEConfig
    reason_not_exact: str | None


def _grow(request: ResizeRequest) -> Resized:
    state, config = grow(request.checkpoint.state, request.checkpoint.config, request.growth, request.usage)
    return Resized(state, config, request.growth.reason_not_exact())


def _prune(request: ResizeRequest) -> Resized:
    source, pruning = request.checkpoint, request.pruning
    state, config = prune(source.state, source.config, request.required_usage(), pruning)
    return Resized(state, config, pruning.reason_not_exact(source.config))


def _merge(request: ResizeRequest) -> Resized:
    source, pruning = request.checkpoint, request.pruning
    state, config = merge(source.state, source.config, request.required_usage(), pruning)
    return Resized(state, config, pruning.reason_not_exact(source.config))


def _extract(request: ResizeRequest) -> Resized:
    if request.options.task is None:
        raise UserError("method 'extract' keeps the experts of one task: give task")
    model = extract_task(load_state(request.checkpoint.config, request.checkpoint.state), request.options.task)
    return Resized({name: LazyTensor.of(tensor) for name, tensor in model.state_dict().items()}, model.config, None)


METHODS: dict[str, Callable[[ResizeRequest], Resized]] = {
    "grow": _grow,
    "prune": _prune,
    "merge": _merge,
    "extract": _extract,
}
# methods that rank the experts by their use on a text
RANKING = ("prune", "merge")


def usage_on(checkpoint: Checkpoint, data: list[str], tokens: int, *, trust_remote_code: bool = False) -> Usage:
    """Measures how much texts use the experts of a checkpoint; the model is loaded into memory and run.

    Args:
        checkpoint: checkpoint of a sparse model.
        data: texts, each as `domain=file`.
        tokens: number of tokens of each domain.
        trust_remote_code: run Python code from the source's tokenizer.

    Raises:
        UserError: if a text or the tokenizer cannot be read, or a domain has fewer tokens.
    """
    source = checkpoint.source
    tokenizer = load_tokenizer(str(source.folder), source.gguf_file, trust_remote_code=trust_remote_code)
    blocks = [
        {"input_ids": block[None]}
        for name, documents in DataArguments(data=data).load().items()
        for block in token_ids(documents, tokenizer, tokens, name, "tokens", "data").split(BLOCK)
    ]
    return measure_usage(load_state(checkpoint.config, checkpoint.state), blocks)


def _recipe(request: ResizeRequest) -> dict:
    """Returns everything that the bytes of the result depend on."""
    usage = request.usage
    return {
        "source": request.checkpoint.identity(),
        "options": asdict(request.options) | asdict(request.growth) | asdict(request.pruning),
        "load": None if usage is None else {i: layer.load.tolist() for i, layer in usage.layers.items()},
        "dtype": str(request.checkpoint.config.dtype),
    }


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
) -> ResizeResult:
    """Resizes a sparse checkpoint and writes the result with tokenizer, chat template and code.

    Args:
        name_or_path: folder or Hub name of a model of this package, or of a sparse family of `conversion.FAMILIES`.
        output_dir: folder of the result, written as a whole or not at all; an interrupted run continues.
        options: the method, and the text to measure on.
        growth: options of method `grow`.
        pruning: options of methods `prune` and `merge`.
        dtype: dtype of the result; `auto` keeps the source's.
        overwrite: replace the result of an earlier run at `output_dir`.
        trust_remote_code: run Python code from the source.

    Raises:
        UserError: if the source cannot be read or resized with these options, or `output_dir` cannot be written.
    """
    options.check()
    checkpoint = open_checkpoint(name_or_path, dtype=dtype, trust_remote_code=trust_remote_code)
    if len(checkpoint.config.mlp_only_layers) == checkpoint.config.num_hidden_layers:
        raise UserError(f"{name_or_path} has no sparse layer: upcycle it first")
    if options.method in RANKING:
        check_pruning(checkpoint.config, pruning)
    folder = result_folder(output_dir, overwrite, [checkpoint], 0)
    usage = None
    if options.data:
        usage = usage_on(checkpoint, options.data, options.tokens, trust_remote_code=trust_remote_code)
    request = ResizeRequest(checkpoint, options, growth, pruning, usage)
    resized = METHODS[options.method](request)
    refuse_full_disk(folder, sum(tensor.nbytes for tensor in resized.state.values()))
    resized.config.dtype = checkpoint.config.dtype
    recipe = _recipe(request)
    save_checkpoint(folder, resized.config, resized.state, checkpoint, recipe, trust_remote_code=trust_remote_code)
    return ResizeResult(checkpoint.config, resized.config, resized.reason_not_exact)
