# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module drops experts of any sparse checkpoint that transformers loads, and keeps its family and names on disk.

# E experts
"""

import json
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.utils import logging

from ..checkpoints import (
    LazyTensor,
    Source,
    State,
    fingerprint,
    refuse_full_disk,
    refuse_quantised,
    write_checkpoint,
)
from ..utils.companions import copy_companions, find_companions
from ..utils.disk_names import DiskNames, Place, Tensors
from ..utils.errors import UserError
from ..utils.folders import ResultFolder
from ..utils.json_files import read_json, write_json
from ..utils.lineage import lineage_of
from ..utils.loading import load_config, one_line_for, parse_dtype
from ..utils.locations import leads_outside
from .pruning import PruningOptions, best_experts, refuse_other_usage
from .skeleton import (
    Axis,
    Reduction,
    Skeleton,
    fields_of,
    groups_of,
    model_without_data,
    reduce,
    shapes,
    skeleton,
    text_config,
)
from .usage import SCORES, Usage


logger = logging.get_logger(__name__)
Kept = dict[int, list[int]]
"""Maps the index of a sparse layer to the ids of the experts that stay, ascending."""


@dataclass(frozen=True)
class AnyCheckpoint:
    """A sparse checkpoint of any family, with no tensor read.

    Attributes:
        source: the files that hold the tensors.
        skeleton: the model without data, and its sparse layers.
        state: the tensors under their names on disk, in the dtype of the result.
        dtype: dtype to which the tensors are cast; None keeps the source's.
        trust_remote_code: whether Python code that the checkpoint brings may run.
    """

    source: Source
    skeleton: Skeleton
    state: State
    dtype: torch.dtype | None = None
    trust_remote_code: bool = False

    def identity(self) -> dict[str, Any]:
        """Returns name, file hashes and configuration of the source, for a result's recipe; reads all weights.

        Raises:
            UserError: if a file differs from the hash beside it.
        """
        files = fingerprint(self.source.folder, self.source.files)
        return {"name": self.source.folder.name, "files": files, "config": self.skeleton.config.to_diff_dict()}


@dataclass(frozen=True)
class Pruned:
    """A checkpoint with fewer experts, with no tensor read.

    Attributes:
        state: the tensors, under the source's names on disk.
        values: the content of config.json.
        reduction: what changed.
        kept: ids of the kept experts.
        left_out: names of the source's tensors that the model does not take.
    """

    state: State
    values: dict[str, Any]
    reduction: Reduction
    kept: Kept
    left_out: list[str]


def open_any(source: Source, dtype: str = "auto", *, trust_remote_code: bool = False) -> AnyCheckpoint:
    """Describes a sparse checkpoint of any family from its configuration.

    Args:
        source: the files.
        dtype: dtype to which tensors are cast while they are read, except those that the model keeps in fp32; `auto` keeps
            the source's.
        trust_remote_code: whether Python code that the checkpoint brings may run.

    Raises:
        UserError: if the configuration is damaged, or the model is dense, quantised, or has no experts that can be reached.
    """
    config = load_config(str(source.folder), trust_remote_code=trust_remote_code)
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(
            f"{source.folder} is quantised, as its config.json says: take the model that it was quantised from, or dequantise "
            "it first"
        )
    with one_line_for("the model", str(source.folder), trust_remote_code):
        found = skeleton(config, trust_remote_code=trust_remote_code)
    integers = {name for name, tensor in found.model.state_dict().items() if not tensor.is_floating_point()}
    refuse_quantised({name: tensor for name, tensor in source.state.items() if name not in integers})
    wanted = parse_dtype(dtype)
    return AnyCheckpoint(source, found, _cast(source.state, found, wanted), wanted, trust_remote_code)


def _cast(state: State, found: Skeleton, dtype: torch.dtype | None) -> State:
    """Casts floating tensors to `dtype`, except those that the model keeps in fp32; None keeps all dtypes."""
    if dtype is None:
        return state
    kept = set(found.model._keep_in_fp32_modules_strict or ())
    return {
        name: tensor if not tensor.dtype.is_floating_point or kept & set(name.split(".")) else tensor.to(dtype)
        for name, tensor in state.items()
    }


def kept_of_any(checkpoint: AnyCheckpoint, usage: Usage, options: PruningOptions) -> Kept:
    """Returns the kept expert ids of each sparse layer, ascending: equally many of each group, those with the best scores.

    Raises:
        UserError: if the usage is of another model.
    """
    found = checkpoint.skeleton
    kept = {}
    for layer in found.layers:
        scores = SCORES[options.score](usage.of(layer.layer))
        refuse_other_usage(scores, layer.layer, found.num_experts)
        kept[layer.layer] = best_experts(scores, options.keep, groups_of(found.config).count)
    return kept


class _Selection:
    """Selects the kept experts in groups of tensors on disk that transformers converts together."""

    def __init__(self, checkpoint: AnyCheckpoint, reduction: Reduction, kept: Kept):
        self.state, self.reduction, self.kept = checkpoint.state, reduction, kept
        self.names = DiskNames(reduction.before.model)
        self.places = self.names.places(self.state)
        self.num_experts = reduction.before.num_experts
        self.wanted = shapes(reduction.after.model)

    def made(self, names: Iterable[str], state: State | None = None) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of the model's tensors that tensors on disk are converted to, by name."""
        source, after = (self.state, False) if state is None else (state, True)
        tensors: Tensors = {
            name: torch.empty(source[name].shape, dtype=source[name].dtype, device="meta") for name in names
        }
        model = self.reduction.after.model if after else self.reduction.before.model
        converted = self.names.convert(model, tensors, self.places)
        return {name: tuple(tensor.shape) for name, tensor in converted.items()}

    def rows(self, axis: Axis, size: int) -> list[int]:
        """Returns the kept entries of a dimension; entries behind the experts, which are no experts, all stay."""
        return self.kept[axis.layer] + list(range(self.num_experts, size))

    def selected(self, tensor: LazyTensor, axis: Axis) -> LazyTensor:
        """Returns a tensor with the kept entries of a dimension; large tensors are read expert by expert."""
        rows = self.rows(axis, tensor.shape[axis.dim])
        if axis.dim == 0 and len(tensor.shape) > 2:
            return LazyTensor.stack([tensor[row] for row in rows])
        shape = (*tensor.shape[: axis.dim], len(rows), *tensor.shape[axis.dim + 1 :])
        return tensor.map(lambda old: old.index_select(axis.dim, torch.tensor(rows)), shape=shape)

    def converted(self, names: list[str], layer: int) -> State:
        """Selects experts in tensors that transformers converts to others: one tensor for each expert, or all in one.

        Raises:
            UserError: if the tensors do not show where the experts are.
        """
        patterns: dict[Place, list[str]] = {}
        for name in names:
            patterns.setdefault(self.places[name], []).append(name)
        result: State = {}
        whole = []
        for group in patterns.values():
            if len(group) == self.num_experts:
                result |= {new: self.state[group[old]] for new, old in zip(group, self.kept[layer], strict=False)}
            else:
                whole += group
        fitting = []
        for dim in range(3):
            if all(dim < len(shape := self.state[name].shape) and shape[dim] == self.num_experts for name in whole):
                chosen = result | {name: self.selected(self.state[name], Axis(layer, dim)) for name in whole}
                made = self.made(chosen, chosen)
                if all(self.wanted.get(name) == shape for name, shape in made.items()):
                    fitting.append(chosen)
            if not whole:
                break
        if len(fitting) != 1:
            raise UserError(
                f"{names[0]} does not show which part of it belongs to which expert: this checkpoint cannot be pruned"
            )
        return fitting[0]


def select_experts(checkpoint: AnyCheckpoint, reduction: Reduction, kept: Kept) -> State:
    """Returns a checkpoint with the kept experts and their entries in the routers, under the source's names on disk.

    Tensors that the model does not take, such as those of a head that predicts several tokens, are left out: they may hold
    experts, too.

    Args:
        checkpoint: the source.
        reduction: which tensors change, and where.
        kept: ids of the kept experts of each sparse layer.

    Raises:
        UserError: if the checkpoint does not fit its configuration, or the result would not.
    """
    selection = _Selection(checkpoint, reduction, kept)
    before = shapes(reduction.before.model)
    groups: dict[str, list[str]] = {}
    for name, place in selection.places.items():
        if place.target in before:
            groups.setdefault(place.target, []).append(name)
    result: State = {}
    for target, names in groups.items():
        made = selection.made(names)
        for name, shape in made.items():
            if before.get(name) != shape:
                raise UserError(
                    f"the checkpoint {checkpoint.source.folder} has {name} of shape {shape} where its config.json asks for "
                    f"{before.get(name)}: the two do not belong together, download both again"
                )
        axes = [reduction.axes[name] for name in made if name in reduction.axes]
        if not axes:
            result |= {name: selection.state[name] for name in names}
        elif selection.places[names[0]].pattern is None:
            result[names[0]] = selection.selected(selection.state[names[0]], reduction.axes[target])
        else:
            result |= selection.converted(names, axes[0].layer)
    _refuse_misfit(selection, result)
    return {name: result[name] for name in selection.state if name in result}


def _left_out(checkpoint: AnyCheckpoint) -> list[str]:
    """Returns the names of the tensors on disk that the model does not take."""
    names = DiskNames(checkpoint.skeleton.model)
    return [name for name, place in names.places(checkpoint.state).items() if place.target not in names.own]


def _without_heads(reduction: Reduction, left_out: list[str]) -> Reduction:
    """Sets the number of heads that predict further tokens to 0, if the result lacks their tensors.

    A server that finds another number in config.json looks for the tensors. Families name the number differently, such as
    `num_nextn_predict_layers` and `mtp_num_hidden_layers`; a tensor of such a head says `mtp`, or belongs to a layer behind the
    last one.
    """
    config = reduction.before.config
    layers = getattr(text_config(config), "num_hidden_layers", None)
    numbers = [re.search(r"\blayers\.(\d+)\.", name) for name in left_out]
    behind = isinstance(layers, int) and any(number and int(number[1]) >= layers for number in numbers)
    if not behind and not any("mtp" in name for name in left_out):
        return reduction
    heads = {
        name: 0
        for name, value in fields_of(config).items()
        if type(value) is int and "num" in name and ("nextn" in name or "mtp" in name)
    }
    return replace(reduction, fields=reduction.fields | heads)


def _refuse_misfit(selection: _Selection, result: State) -> None:
    """Refuses a result whose tensors transformers would not convert to those of the smaller model, all of them."""
    model = selection.reduction.after.model
    made = selection.made(result, result)
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    missing = sorted(selection.wanted.keys() - made.keys() - tied)
    if missing:
        raise UserError(f"the checkpoint lacks {missing[0]}, which its config.json asks for: download both again")
    wrong = sorted(name for name, shape in made.items() if selection.wanted[name] != shape)
    if wrong:
        raise UserError(
            f"{wrong[0]} would not have the shape that the smaller model has: this checkpoint cannot be pruned"
        )


def _text_values(values: dict[str, Any], config: PreTrainedConfig, text: PreTrainedConfig) -> dict[str, Any] | None:
    """Returns the part of a config.json that describes the language model; None if it is not in `config`."""
    if config is text:
        return values
    for name in getattr(config, "sub_configs", {}):
        part = getattr(config, name, None)
        if isinstance(part, PreTrainedConfig):
            inner = values.get(name) or {}
            found = _text_values(inner, part, text)
            if found is not None:
                values[name] = inner
                return found
    return None


def changed_values(folder: Path, reduction: Reduction, *, trust_remote_code: bool = False) -> dict[str, Any]:
    """Returns the content of the source's config.json with the changed fields, under all names that the file has for them.

    Raises:
        UserError: if a model of the changed file would not have the tensors of the smaller model.
    """
    values = read_json(folder / "config.json")
    config = reduction.before.config
    text = text_config(config)
    part = _text_values(values, config, text)
    if part is None:
        raise UserError(f"{folder / 'config.json'} does not show which part of it describes the language model")
    aliases = getattr(text, "attribute_map", {})
    for name, value in reduction.fields.items():
        for key in [key for key in part if key == name or aliases.get(key) == name] or [name]:
            part[key] = value
    with TemporaryDirectory() as temporary:
        write_json(Path(temporary) / "config.json", values)
        changed = type(config).from_pretrained(temporary)
    changed.name_or_path = config.name_or_path  # where transformers looks for a checkpoint's own code
    if shapes(model_without_data(changed, trust_remote_code=trust_remote_code)) != shapes(reduction.after.model):
        raise UserError(
            f"{folder / 'config.json'} gives the number of experts in a way that cannot be changed: this checkpoint cannot be "
            "pruned"
        )
    return values


def _name_dtype(values: dict[str, Any], dtype: str) -> None:
    """Writes the dtype into the content of a config.json, also where the parts of the model have one each."""
    values["dtype"] = dtype
    for part in [values, *(value for value in values.values() if isinstance(value, dict))]:
        part |= {name: dtype for name in ("dtype", "torch_dtype") if name in part}


def plan_pruning(checkpoint: AnyCheckpoint, options: PruningOptions) -> Reduction:
    """Finds out how the checkpoint gets fewer experts, before anything is measured or written.

    Raises:
        UserError: if an option is out of range, or the model cannot be pruned by selecting experts; the message says why.
    """
    if options.score not in SCORES:
        raise UserError(f"score {options.score!r} is unknown: it must be one of {', '.join(SCORES)}")
    reduction = reduce(checkpoint.skeleton, options.keep, trust_remote_code=checkpoint.trust_remote_code)
    # every layer keeps the first experts here, to find a checkpoint that does not fit before a text is measured
    groups = groups_of(checkpoint.skeleton.config).count
    first = best_experts(torch.zeros(checkpoint.skeleton.num_experts), options.keep, groups)
    select_experts(checkpoint, reduction, {layer.layer: first for layer in checkpoint.skeleton.layers})
    changed_values(checkpoint.source.folder, reduction, trust_remote_code=checkpoint.trust_remote_code)
    return reduction


def prune_any(checkpoint: AnyCheckpoint, reduction: Reduction, usage: Usage, options: PruningOptions) -> Pruned:
    """Drops all but the best experts of each layer, with their entries in the router, and keeps everything else.

    The result has the source's family, names and layout on disk, so that whatever loads the source loads the result. On a
    text whose tokens choose no dropped expert, the logits are unchanged if the router has no groups and its weights of a
    token depend on the chosen experts alone. On any text they are those of the source with the dropped experts' router logits
    at minus infinity.

    Args:
        checkpoint: the source; no weight is read.
        reduction: the result of [`plan_pruning`].
        usage: usage of the checkpoint's experts, see [`~modeling_moe.resizing.usage.measure_usage`].
        options: how many experts are kept, and by what score (`reap` is that of arXiv:2510.13999).

    Raises:
        UserError: if the usage is of another model, or no field of the configuration lowers the number of experts per token.
    """
    most = reduction.most_per_token
    if usage.experts_per_token > most and not reduction.lowers_top_k:
        raise UserError(
            f"a token of this model chooses {usage.experts_per_token} experts and could choose at most {most}, and no field of "
            f"its configuration lowers that: keep more experts"
        )
    kept = kept_of_any(checkpoint, usage, options)
    left_out = _left_out(checkpoint)
    reduction = _without_heads(reduction, left_out)
    values = changed_values(checkpoint.source.folder, reduction, trust_remote_code=checkpoint.trust_remote_code)
    if checkpoint.dtype is not None:
        _name_dtype(values, str(checkpoint.dtype).removeprefix("torch."))
    state = select_experts(checkpoint, reduction, kept)
    return Pruned(state, values, reduction, kept, left_out)


def write_pruned(
    folder: ResultFolder,
    checkpoint: AnyCheckpoint,
    pruned: Pruned,
    recipe: dict[str, Any],
    max_shard_size: str = "5GB",
) -> None:
    """Writes a pruned checkpoint with the source's tokenizer, chat template, generation config and code.

    A warning names tensors of the source that the result lacks, since the model does not take them.

    Args:
        folder: folder that is written whole or not at all, where an interrupted run continues.
        checkpoint: the source.
        pruned: the result.
        recipe: source and options of the result; it is kept in conversion.json.
        max_shard_size: size limit of a file; a larger tensor gets its own file.

    Raises:
        UserError: if a file beside the source's weights leads outside the folder, or `folder` cannot be written.
    """
    source = checkpoint.source.folder
    find_companions(source)
    code = sorted(source.glob("*.py")) if pruned.values.get("auto_map") else []
    for file in code:
        if leads_outside(file, source):
            raise UserError(f"{file} is a link that leads outside the folder: put the file itself there")

    def finish(result: Path) -> None:
        write_json(result / "config.json", pruned.values)
        copy_companions(source, result)
        for file in code:
            shutil.copyfile(file, result / file.name)

    refuse_full_disk(folder, sum(tensor.nbytes for tensor in pruned.state.values()))
    if pruned.left_out:
        shown = ", ".join(pruned.left_out[:3])
        logger.warning(f"Left out, since the model does not take them: {shown} ({len(pruned.left_out)} tensors).")
    recipe = json.loads(json.dumps(recipe | {"lineage": lineage_of(source)}, default=str))
    write_checkpoint(folder, pruned.state, recipe, finish, max_shard_size=max_shard_size, sources=(source,))
