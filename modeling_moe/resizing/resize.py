# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module reads a sparse checkpoint from a folder and writes one with more or fewer experts into another folder."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from transformers import CONFIG_MAPPING, PreTrainedModel, PreTrainedTokenizerBase

from ..checkpoints import LazyTensor, Source, State, open_source, refuse_full_disk
from ..configuration_moe import MoEConfig
from ..conversion import Checkpoint, load_state, open_checkpoint, result_folder, save_checkpoint
from ..data import DataArguments, token_ids
from ..utils.errors import UserError
from ..utils.folders import ResultFolder
from ..utils.json_files import read_json
from ..utils.loading import load_model, load_tokenizer, refuse_misfit
from .extraction import extract_task
from .growth import GrowthOptions, grow
from .pruning import PRUNED, PruningOptions, check_pruning, kept_experts, merge, prune
from .pruning_any import open_any, plan_pruning, prune_any, write_pruned
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
            "merge: keep the most used experts, and merge the others into them; extract: keep the experts of one task of a "
            "model with router_type='task'"
        },
    )
    data: list[str] | None = field(
        default=None, metadata={"help": "text to measure the use of experts on, each as domain=file"}
    )
    tokens: int = field(default=8192, metadata={"help": "number of tokens measured in each domain"})
    task: int | None = field(default=None, metadata={"help": "id of the task that method extract keeps"})
    save_usage: str | None = field(
        default=None,
        metadata={"help": "JSON file to write the measured use of the experts to; a later run reads it by usage_json"},
    )
    usage_json: str | None = field(
        default=None, metadata={"help": "JSON file that an earlier run wrote by save_usage, to read in place of data"}
    )

    def check(self) -> None:
        """Refuses options that cannot be used together.

        Raises:
            UserError: if an option is refused; the message names the option and the remedy.
        """
        if self.method not in METHODS:
            raise UserError(f"method {self.method!r} is unknown: it must be one of {', '.join(METHODS)}")
        if self.method == "extract" and self.task is None:
            raise UserError("method 'extract' keeps the experts of one task: give task")
        if self.method in RANKING and not (self.data or self.usage_json):
            raise UserError(
                f"method {self.method!r} ranks the experts by their use on a text: give data or usage_json"
            )
        if self.data and self.usage_json:
            raise UserError("data measures the use of the experts, which usage_json holds: give only one of them")
        if self.save_usage and not self.data:
            raise UserError("save_usage writes the use of the experts on a text: give data")
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
        usage: usage of the experts on `options.data`, or from `options.usage_json`; None without both.
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
            raise UserError(
                f"method {self.options.method!r} ranks the experts by their use on a text: give data or usage_json"
            )
        return self.usage


class Resized(NamedTuple):
    """Holds a resized checkpoint, its configuration, and why its function differs from the source's (None if equal)."""

    state: State
    config: MoEConfig
    reason_not_exact: str | None


class ModelSize(NamedTuple):
    """Holds the size of a sparse model.

    Attributes:
        parameters: number of parameters.
        active: number of parameters that one token uses; None if unknown.
        num_experts: number of experts of each sparse layer.
        experts_per_token: number of experts that a token chooses; None if unknown.
    """

    parameters: int
    active: int | None
    num_experts: int
    experts_per_token: int | None

    @classmethod
    def of(cls, config: MoEConfig) -> "ModelSize":
        """Returns the size of a model of this package."""
        return cls(config.num_params(), config.num_active_params(), config.num_experts, config.num_experts_per_tok)


class ResizeResult(NamedTuple):
    """Holds the sizes of source and result, and why their functions differ (None if they are equal)."""

    source: ModelSize
    result: ModelSize
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


class _Text(NamedTuple):
    """Holds the texts that the use of the experts is measured on, in blocks of tokens, and the tokenizer."""

    blocks: list[dict[str, torch.Tensor]]
    tokenizer: PreTrainedTokenizerBase


def _read_text(source: Source, options: ResizeOptions, trust_remote_code: bool) -> _Text:
    """Reads the texts of `options.data`, before the model is loaded.

    Raises:
        UserError: if a text or the tokenizer cannot be read, or a domain has fewer tokens.
    """
    tokenizer = load_tokenizer(str(source.folder), source.gguf_file, trust_remote_code=trust_remote_code)
    blocks = [
        {"input_ids": block[None]}
        for name, documents in DataArguments(data=options.data or []).load().items()
        for block in token_ids(documents, tokenizer, options.tokens, name, "tokens", "data").split(BLOCK)
    ]
    return _Text(blocks, tokenizer)


def _measure(text: _Text, model: PreTrainedModel, options: ResizeOptions) -> Usage:
    """Measures how much a text uses the experts of a model, and saves it if `options` say so.

    Raises:
        UserError: if the tokenizer does not fit the model, or the model's usage cannot be measured.
    """
    refuse_misfit(text.tokenizer, model)
    usage = measure_usage(model, text.blocks)
    if options.save_usage:
        usage.save(options.save_usage)
    return usage


def _recipe(request: ResizeRequest, reason_not_exact: str | None) -> dict:
    """Returns everything that the bytes of the result depend on, and why its function differs from the source's."""
    usage, config = request.usage, request.checkpoint.config
    kept = {}
    if usage is not None and request.options.method in RANKING:
        kept = kept_experts(config, usage, request.pruning)
    return {
        "source": request.checkpoint.identity(),
        "options": asdict(request.options) | asdict(request.growth) | asdict(request.pruning),
        "load": None if usage is None else {i: layer.load.tolist() for i, layer in usage.layers.items()},
        "kept": {str(layer): experts for layer, experts in kept.items()},
        "dtype": str(config.dtype),
        "reason_not_exact": reason_not_exact,
    }


def _keeps_family(source: Source, options: ResizeOptions, trust_remote_code: bool) -> bool:
    """Returns whether a checkpoint is pruned in the format of its own family, as one that transformers loads by itself."""
    file = source.folder / "config.json"
    if options.method != "prune" or source.gguf_file or not file.is_file():
        return False
    values = read_json(file)
    model_type = values.get("model_type")
    return model_type != MoEConfig.model_type and (
        model_type in CONFIG_MAPPING or (trust_remote_code and "auto_map" in values)
    )


def _prune_family(
    source: Source,
    output_dir: str | Path,
    options: ResizeOptions,
    pruning: PruningOptions,
    dtype: str,
    overwrite: bool,
    trust_remote_code: bool,
) -> ResizeResult:
    """Prunes a checkpoint of any family in the format of its own family, see [`resize_checkpoint`]."""
    checkpoint = open_any(source, dtype, trust_remote_code=trust_remote_code)
    reduction = plan_pruning(checkpoint, pruning)
    folder = ResultFolder(output_dir, overwrite, [source.folder])
    if options.usage_json:
        usage = Usage.read(options.usage_json)
    else:
        text = _read_text(source, options, trust_remote_code)
        model = load_model(str(source.folder), dtype=dtype, trust_remote_code=trust_remote_code)
        usage = _measure(text, model, options)
        del model
    pruned = prune_any(checkpoint, reduction, usage, pruning)
    recipe = {
        "source": checkpoint.identity(),
        "options": asdict(options) | asdict(pruning),
        "kept": {str(layer): experts for layer, experts in pruned.kept.items()},
        "dtype": dtype,
        "reason_not_exact": PRUNED,
    }
    write_pruned(folder, checkpoint, pruned, recipe)
    top_k = usage.experts_per_token or None
    lower = None if top_k is None else min(top_k, reduction.most_per_token)
    sizes = [
        ModelSize(found.model.num_parameters(), found.active_parameters(chosen), found.num_experts, chosen)
        for found, chosen in ((reduction.before, top_k), (reduction.after, lower))
    ]
    return ResizeResult(sizes[0], sizes[1], PRUNED)


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

    Method `prune` keeps the family of a checkpoint that transformers loads by itself, with its names on disk. The other
    methods write a checkpoint of this package.

    Args:
        name_or_path: folder or Hub name of a model of this package, or of a sparse family of `conversion.FAMILIES`; for
            method `prune`, of any model of transformers whose experts follow its experts interface.
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
    source = open_source(name_or_path)
    if _keeps_family(source, options, trust_remote_code):
        return _prune_family(source, output_dir, options, pruning, dtype, overwrite, trust_remote_code)
    checkpoint = open_checkpoint(name_or_path, dtype=dtype, trust_remote_code=trust_remote_code)
    if len(checkpoint.config.mlp_only_layers) == checkpoint.config.num_hidden_layers:
        if checkpoint.config.routed_attention is not None:
            raise UserError(
                f"{name_or_path} has experts inside attention alone (routed_attention is "
                f"{checkpoint.config.routed_attention!r}), whose number cannot be changed: resize a model with sparse layers"
            )
        raise UserError(f"{name_or_path} has no sparse layer: upcycle it first")
    if options.method in RANKING:
        check_pruning(checkpoint.config, pruning)
    folder = result_folder(output_dir, overwrite, [checkpoint], 0)
    usage = Usage.read(options.usage_json) if options.usage_json else None
    if options.data:
        text = _read_text(checkpoint.source, options, trust_remote_code)
        usage = _measure(text, load_state(checkpoint.config, checkpoint.state), options)
    request = ResizeRequest(checkpoint, options, growth, pruning, usage)
    resized = METHODS[options.method](request)
    refuse_full_disk(folder, sum(tensor.nbytes for tensor in resized.state.values()))
    resized.config.dtype = checkpoint.config.dtype
    recipe = _recipe(request, resized.reason_not_exact)
    save_checkpoint(folder, resized.config, resized.state, checkpoint, recipe, trust_remote_code=trust_remote_code)
    return ResizeResult(ModelSize.of(checkpoint.config), ModelSize.of(resized.config), resized.reason_not_exact)
