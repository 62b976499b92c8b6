# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""A checkpoint that lacks a tensor, or has one too many, is refused by name: transformers makes new weights and goes on."""

import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from safetensors import safe_open
from torch import nn
from transformers.configuration_utils import PreTrainedConfig
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import logging
from transformers.utils.hub import cached_file


logger = logging.get_logger(__name__)

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_EXPERT = re.compile(r"(?P<before>.*\.experts\.)(?P<expert>\d+)(?P<after>\..+)")
# arguments of `from_pretrained` that say where the files are
_PLACE = ("cache_dir", "revision", "token", "local_files_only", "subfolder")


class CheckpointError(ValueError, RuntimeError):
    """A checkpoint that does not fit its configuration; also the RuntimeError that transformers raises for it."""


def misfit(name: Any, problem: Any) -> CheckpointError:
    """The error for a checkpoint and what is wrong with it."""
    return CheckpointError(
        f"the checkpoint {name} does not fit its config.json: {problem}. Restore the file or correct the field."
    )


def refuse_missing(
    model: Any, loading_info: dict[str, Any], name: Any, saved_config: Any = None, new_head: bool = True
) -> None:
    """Refuses a model of any class whose checkpoint lacks a tensor, in the place of which transformers made a new one.

    A tensor may be new if the class and configuration that the checkpoint was saved with have none of that name, and it
    is no parameter of the decoder: a head for another task, a buffer of a router that was asked for at loading.

    Args:
        model: what `from_pretrained` has made.
        loading_info: what `from_pretrained` returns beside it under `output_loading_info=True`.
        name: folder or Hub name of the checkpoint, for the message.
        saved_config: the configuration that the checkpoint holds, where another was given at loading; `model.config`
            if None.
        new_head: whether a head may be new at all.

    Raises:
        CheckpointError: names the first tensor that is missing.
    """
    # under an adapter `loading_info` is of the adapter
    missing = set(loading_info["missing_keys"]) | vars(model).pop("_missing_at_load", set())
    if not missing:
        return
    allowed: set[str] = set()
    # the keys of an adapter are all its own
    if not getattr(model, "_hf_peft_config_loaded", False):
        prefix, buffers = base_prefix(model), {key for key, _ in model.named_buffers()}
        heads = {key for key in missing if new_head and not key.startswith(prefix)}
        saved = saved_names(model, saved_config or model.config)
        allowed = {key for key in heads | (missing & buffers) if bare(model, key) not in saved}
    if lacking := names_on_disk(model, sorted(missing - allowed, key=_natural)):
        raise misfit(name, f"it has no {_first_of(lacking)}")


def refuse_unexpected(model: Any, loading_info: dict[str, Any], name: Any, saved_config: Any) -> None:
    """Refuses a checkpoint with a tensor in a layer of the decoder for which its own configuration has no place.

    Without the tensor, a bias of a linear layer perhaps, the model would compute another function. What an argument of
    `from_pretrained` has left without a place stays out, and so do the layers beyond the last one, which a warning names.

    Raises:
        CheckpointError: names the first of them.
    """
    prefix = f"{model.base_model_prefix}."
    children = {child for child, _ in getattr(model, model.base_model_prefix, model).named_children()}
    extra = sorted(loading_info["unexpected_keys"], key=_natural)
    extra = [bare(model, key) for key in extra if key.startswith(prefix) or key.split(".")[0] in children]
    layers = model.config.num_hidden_layers
    beyond = [key for key in extra if (layer := _LAYER.search(key)) and int(layer[1]) >= layers]
    if beyond:
        logger.warning(f"{name} has more than the {layers} layers asked for: {_first_of(beyond)} is not loaded.")
    extra = [key for key in extra if key not in beyond]
    if extra and (extra := [key for key in extra if key not in saved_names(model, saved_config)]):
        raise misfit(name, f"nothing takes its {_first_of(extra)}")


def _refuse_mismatched(model: Any, loading_info: dict[str, Any], name: Any) -> None:
    """Refuses new weights for a tensor of another shape under `ignore_mismatched_sizes=True`: that is for a head.

    The embedding may be new too, with another vocabulary.
    """
    for key, found, wanted in sorted(loading_info["mismatched_keys"], key=lambda mismatch: _natural(mismatch[0])):
        if key.startswith(base_prefix(model)) and not key.endswith("embed_tokens.weight"):
            problem = f"{key} has shape {tuple(found)} where config.json asks for {tuple(wanted)}"
            raise misfit(name, f"{problem}, and ignore_mismatched_sizes is for heads")


def _first_of(names: list[str]) -> str:
    return f"{names[0]} (and {len(names) - 1} more)" if len(names) > 1 else names[0]


def base_prefix(model: Any) -> str:
    """What the names of the decoder's tensors begin with; empty for a decoder without a head."""
    prefix = model.base_model_prefix
    return f"{prefix}." if prefix and hasattr(model, prefix) else ""


def bare(model: Any, key: str) -> str:
    """A tensor's name in the decoder without a head, whichever class it belongs to."""
    return key.removeprefix(f"{model.base_model_prefix}.") if model.base_model_prefix else key


def saved_names(model: Any, config: Any) -> set[str]:
    """The bare names of all tensors that a model of this configuration has, in the class that the checkpoint is of.

    `config.architectures` names the class. Without a name the checkpoint is taken for a language model's; of a class
    that is not to be found nothing but the decoder is known.
    """
    saved_class = next(filter(None, (_find_class(model, name) for name in config.architectures or [])), None)
    with torch.device("meta"):
        saved = (saved_class or type(model))(config)
    names = set(saved.state_dict())
    if saved_class is None:
        prefix, head = base_prefix(saved), saved.get_output_embeddings() if not config.architectures else None
        kept = {key for key, tensor in saved.named_parameters() if head is not None and tensor is head.weight}
        names = {key for key in names if key.startswith(prefix)} | kept
    return {bare(saved, key) for key in names}


def _find_class(model: Any, name: str) -> type | None:
    """The model class of that name: beside one that `model` is an instance of, or in transformers."""
    modules = [sys.modules[cls.__module__] for cls in type(model).__mro__ if cls.__module__ in sys.modules]
    found = next((getattr(module, name) for module in [*modules, transformers] if hasattr(module, name)), None)
    return found if isinstance(found, type) and issubclass(found, PreTrainedModel) else None


def names_on_disk(model: nn.Module, keys: Iterable[str]) -> list[str]:
    """The names under which a checkpoint holds tensors of the model: those of experts lie one by one."""
    names: list[str] = []
    for key in keys:
        if ".experts." not in key:
            names.append(key)
            continue
        # a loaded model remembers no more than the conversions that it went through
        with torch.device("meta"):
            new = type(model)(model.config)
        tensors = new.state_dict()
        names.extend(revert_weight_conversion(new, {key: tensors[key]}) if key in tensors else [key])
    return names


def _natural(key: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", key)]


def folder_of(name_or_path: Any, options: dict[str, Any]) -> Path | None:
    """The folder of a checkpoint's files: its own, or that of transformers' cache after a download.

    Args:
        name_or_path: folder or Hub name.
        options: arguments of `from_pretrained`.

    Returns:
        None for a repository without a config.json.
    """
    if (folder := Path(str(name_or_path))).is_dir():
        return folder / (options.get("subfolder") or "")
    place = {name: options[name] for name in _PLACE if options.get(name)}
    try:
        return Path(str(cached_file(str(name_or_path), "config.json", **place))).parent
    except OSError:
        return None


class OnDisk(NamedTuple):
    """What a checkpoint's file says of a tensor before it is read."""

    shape: tuple[int, ...]
    floating: bool


def tensors_on_disk(name_or_path: Any, options: dict[str, Any]) -> dict[str, OnDisk]:
    """A checkpoint's tensors by their names; empty where it is not in transformers' own files.

    Args:
        name_or_path: folder or Hub name.
        options: arguments of `from_pretrained`.
    """
    if options.get("state_dict") is not None:
        return {name: OnDisk(tuple(x.shape), x.is_floating_point()) for name, x in options["state_dict"].items()}
    if (folder := folder_of(name_or_path, options)) is None:
        return {}
    found: dict[str, OnDisk] = {}
    for file in _weight_files(folder, options.get("variant"), options.get("use_safetensors") is not False):
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as tensors:
                slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
                # safetensors calls the others I64, U8, BOOL and the like
                found |= {name: OnDisk(tuple(x.get_shape()), "F" in x.get_dtype()) for name, x in slices.items()}
        else:
            tensors = torch.load(file, map_location="meta", weights_only=True)
            found |= {name: OnDisk(tuple(x.shape), x.is_floating_point()) for name, x in tensors.items()}
    return found


def _weight_files(folder: Path, variant: str | None, safetensors: bool) -> list[Path]:
    """The files that transformers reads: the first of these kinds that is there."""
    kinds = ["model.safetensors", "model.safetensors.index.json"] if safetensors else []
    for kind in [*kinds, "pytorch_model.bin", "pytorch_model.bin.index.json"]:
        stem, _, suffix = kind.rpartition(".")
        file = folder / (f"{stem}.{variant}.{suffix}" if variant else kind)
        if file.is_file():
            if suffix != "json":
                return [file]
            return [folder / shard for shard in sorted(set(json.loads(file.read_text())["weight_map"].values()))]
    return []


def _expert_problem(names: Iterable[str], num_experts: int) -> str:
    """Which expert is missing or too many among names on disk; empty if none: transformers goes by their order alone."""
    found: dict[str, set[int]] = {}
    for name in names:
        if match := _EXPERT.fullmatch(name):
            found.setdefault(f"{match['before']}{{}}{match['after']}", set()).add(int(match["expert"]))
    for pattern in sorted(found, key=_natural):
        if lacking := set(range(num_experts)) - found[pattern]:
            return f"it has no {pattern.format(min(lacking))}"
        if extra := found[pattern] - set(range(num_experts)):
            return f"it has {pattern.format(min(extra))}, beyond num_experts = {num_experts}"
    return ""


def _integer_problem(model: Any, tensors: dict[str, OnDisk], unexpected: Iterable[str]) -> str:
    """Which weight is of integers on disk, which transformers would take for its values; empty if none is."""
    integers = {bare(model, name) for name, tensor in model.state_dict().items() if not tensor.is_floating_point()}
    for name, tensor in tensors.items():
        if not tensor.floating and name not in unexpected and bare(model, name) not in integers:
            return f"{name} is of integers or truth values"
    return ""


def _shape_problem(model_class: type, config: Any, tensors: dict[str, OnDisk]) -> str:
    """Which tensor is missing or misshapen on disk; empty if none is."""
    with torch.device("meta"):
        model = model_class(config)
    found = {bare(model, name): tensor.shape for name, tensor in tensors.items()}
    tied = {bare(model, key) for key in model.all_tied_weights_keys}
    for name, tensor in revert_weight_conversion(model, model.state_dict()).items():
        shape = found.get(bare(model, name))
        if shape is None and bare(model, name) not in tied:
            return f"it has no {name}"
        if shape is not None and shape != tuple(tensor.shape):
            new = "" if name.startswith(base_prefix(model)) else " (ignore_mismatched_sizes=True makes a new one)"
            return f"{name} has shape {shape} where config.json asks for {tuple(tensor.shape)}{new}"
    return ""


def _configuration(model_class: Any, name_or_path: Any, options: dict[str, Any], overrides: bool) -> Any:
    """The configuration that the checkpoint holds, with or without what `from_pretrained` was given to change it."""
    given = options.get("config")
    folder = None if options.get("state_dict") is not None else folder_of(name_or_path, options)
    described = folder is not None and (folder / "config.json").is_file()
    if isinstance(given, PreTrainedConfig) and (overrides or not described):
        return given
    source = given if isinstance(given, str | Path) else folder or name_or_path
    changes = {key: value for key, value in options.items() if overrides and key not in ("config", *_PLACE)}
    config, _ = model_class.config_class.from_pretrained(source, return_unused_kwargs=True, **changes)
    return config


def _base_of(name_or_path: Any) -> Any:
    """The checkpoint that an adapter's folder names; another checkpoint itself."""
    file = Path(str(name_or_path)) / "adapter_config.json"
    if not file.is_file() or (file.parent / "config.json").is_file():
        return name_or_path
    return json.loads(file.read_text())["base_model_name_or_path"]


@contextmanager
def refuse_damaged(model_class: Any, name_or_path: Any, options: dict[str, Any]) -> Iterator[Callable]:
    """Around transformers' loading: names what a damaged checkpoint lacks or has too much.

    transformers makes new weights for a missing tensor, reports a missing expert as a failed conversion, and takes an
    expert of another number for the next one. Yields `check(model, loading_info)`, to be called with what was loaded.

    Args:
        model_class: the class to load.
        name_or_path: folder or Hub name.
        options: the other arguments of `from_pretrained`.

    Raises:
        CheckpointError: names the first tensor that is missing, misshapen or too many.
    """

    def check(model: Any, info: dict[str, Any]) -> None:
        if options.get("state_dict") == {}:
            # nothing was given, so that nothing lacks: a new model was asked for
            vars(model).pop("_missing_at_load", None)
            return
        source = "state_dict" if name_or_path is None else model.name_or_path
        tensors = {} if options.get("gguf_file") else tensors_on_disk(source, options)
        problem = _expert_problem(tensors, model.config.num_experts)
        quantized = getattr(model, "hf_quantizer", None) is not None
        if not quantized and not options.get("key_mapping"):
            problem = problem or _integer_problem(model, tensors, info["unexpected_keys"])
        if problem:
            raise misfit(source, problem)
        _refuse_mismatched(model, info, source)
        of_base = vars(model).get("_missing_at_load")
        if not (info["missing_keys"] or info["unexpected_keys"] or of_base):
            return
        saved_config = _configuration(model_class, source, options, overrides=False)
        # what comes of an adapter's folder lacks names of the adapter, unless the base lacks some
        refuse_missing(model, info, source if of_base or name_or_path is None else name_or_path, saved_config)
        if not quantized:
            refuse_unexpected(model, info, source, saved_config)

    try:
        yield check
    except RuntimeError as error:
        if isinstance(error, CheckpointError) or "report" not in str(error):
            raise
        source = _base_of(name_or_path)
        config = _configuration(model_class, source, options, overrides=True)
        tensors = tensors_on_disk(source, options)
        # quantized matrices have shapes of their own
        plain = getattr(config, "quantization_config", None) is None and options.get("quantization_config") is None
        problem = _shape_problem(model_class, config, tensors) if tensors and plain else ""
        problem = problem or _expert_problem(tensors, config.num_experts)
        raise misfit(source or "state_dict", problem or error) from error
