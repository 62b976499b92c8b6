# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module refuses a checkpoint in which a tensor is missing or unexpected, by the tensor's name.

transformers would make new weights for the tensor and go on.
"""

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
from transformers.configuration_utils import PreTrainedConfig
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import logging
from transformers.utils.hub import cached_file

from .attention_catalogue import stacked_attention_experts


logger = logging.get_logger(__name__)

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_EXPERT = re.compile(r"(?P<before>.*\.experts\.)(?P<expert>\d+)(?P<after>\..+)")
# arguments of `from_pretrained` that locate the files
_PLACE = ("cache_dir", "revision", "token", "local_files_only", "subfolder")


class CheckpointError(ValueError, RuntimeError):
    """Reports a checkpoint that does not fit its configuration; it is a RuntimeError too, as transformers raises one."""


def misfit(name: Any, problem: Any) -> CheckpointError:
    """Returns the error for a checkpoint (folder or Hub name) with a problem."""
    return CheckpointError(
        f"the checkpoint {name} does not fit its config.json: {problem}. Restore the file or correct the field."
    )


def refuse_missing(
    model: Any, loading_info: dict[str, Any], name: Any, saved_config: Any = None, new_head: bool = True
) -> None:
    """Refuses a loaded model for which transformers made a new tensor because the checkpoint has none.

    A new tensor is accepted if it is not a parameter of the decoder, and the class and configuration that the checkpoint was
    saved with have no tensor of that name: a head for another task, or a buffer of a router that was chosen at loading.

    Args:
        model: the model that `from_pretrained` returned, of any class.
        loading_info: the second result of `from_pretrained(..., output_loading_info=True)`.
        name: folder or Hub name of the checkpoint, for the message.
        saved_config: the configuration in the checkpoint, if another one was given at loading; None means `model.config`.
        new_head: accepts a new head.

    Raises:
        CheckpointError: names the first missing tensor.
    """
    # with an adapter, `loading_info` describes the adapter
    missing = set(loading_info["missing_keys"]) | vars(model).pop("_missing_at_load", set())
    if not missing:
        return
    allowed: set[str] = set()
    # all keys of an adapter must be in its checkpoint
    if not getattr(model, "_hf_peft_config_loaded", False):
        prefix, buffers = base_prefix(model), {key for key, _ in model.named_buffers()}
        heads = {key for key in missing if new_head and not key.startswith(prefix)}
        saved = saved_names(model, saved_config or model.config)
        allowed = {key for key in heads | (missing & buffers) if bare(model, key) not in saved}
    if lacking := names_on_disk(model, sorted(missing - allowed, key=_natural)):
        raise misfit(name, f"it has no {_first_of(lacking)}")


def refuse_unexpected(model: Any, loading_info: dict[str, Any], name: Any, saved_config: Any) -> None:
    """Refuses a checkpoint with a tensor of the decoder for which the checkpoint's own configuration has no parameter.

    Without that tensor, such as a bias, the model would compute another function. Tensors that an argument of
    `from_pretrained` made superfluous are left out, and so are layers beyond the last one, which a warning names.

    Raises:
        CheckpointError: names the first unexpected tensor.
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
    """Refuses new weights for a decoder tensor of another shape under `ignore_mismatched_sizes=True`, which is for heads.

    A new embedding is accepted, because the vocabulary can differ.
    """
    for key, found, wanted in sorted(loading_info["mismatched_keys"], key=lambda mismatch: _natural(mismatch[0])):
        if key.startswith(base_prefix(model)) and not key.endswith("embed_tokens.weight"):
            problem = f"{key} has shape {tuple(found)} where config.json asks for {tuple(wanted)}"
            raise misfit(name, f"{problem}, and ignore_mismatched_sizes is for heads")


def _first_of(names: list[str]) -> str:
    return f"{names[0]} (and {len(names) - 1} more)" if len(names) > 1 else names[0]


def base_prefix(model: Any) -> str:
    """Returns the beginning of the names of the decoder's tensors; empty for a decoder without a head."""
    prefix = model.base_model_prefix
    return f"{prefix}." if prefix and hasattr(model, prefix) else ""


def bare(model: Any, key: str) -> str:
    """Returns the name that a tensor has in the decoder without a head, for a model of any class."""
    return key.removeprefix(f"{model.base_model_prefix}.") if model.base_model_prefix else key


def saved_names(model: Any, config: Any) -> set[str]:
    """Returns the [`bare`] names of all tensors of a model with this configuration and the class that it was saved from.

    `config.architectures` names that class; without a name, a language model is assumed. If the class cannot be found, only
    the names of the decoder are returned.
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
    """Returns the model class of a name, from the modules of the classes of `model` or from transformers."""
    modules = [sys.modules[cls.__module__] for cls in type(model).__mro__ if cls.__module__ in sys.modules]
    found = next((getattr(module, name) for module in [*modules, transformers] if hasattr(module, name)), None)
    return found if isinstance(found, type) and issubclass(found, PreTrainedModel) else None


def names_on_disk(model: PreTrainedModel, keys: Iterable[str]) -> list[str]:
    """Returns the names that tensors of the model have in a checkpoint, where each expert has tensors of its own."""
    names: list[str] = []
    for key in keys:
        if ".experts." not in key:
            names.append(key)
            continue
        # a loaded model knows only the conversions that it went through
        with torch.device("meta"):
            new = type(model)(model.config)
        tensors = new.state_dict()
        names.extend(revert_weight_conversion(new, {key: tensors[key]}) if key in tensors else [key])
    return names


def _natural(key: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", key)]


def folder_of(name_or_path: Any, options: dict[str, Any]) -> Path | None:
    """Returns the folder of a checkpoint's files, which is in transformers' cache for a Hub name.

    Args:
        name_or_path: folder or Hub name.
        options: arguments of `from_pretrained`.

    Returns:
        The folder, or None for a repository without a config.json.
    """
    if (folder := Path(str(name_or_path))).is_dir():
        return folder / (options.get("subfolder") or "")
    place = {name: options[name] for name in _PLACE if options.get(name)}
    try:
        return Path(str(cached_file(str(name_or_path), "config.json", **place))).parent
    except OSError:
        return None


class OnDisk(NamedTuple):
    """Shape and kind of a tensor in a file, known before the tensor is read."""

    shape: tuple[int, ...]
    floating: bool


def tensors_on_disk(name_or_path: Any, options: dict[str, Any]) -> dict[str, OnDisk]:
    """Returns shape and kind of a checkpoint's tensors by name; empty if the checkpoint is not in transformers' files.

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
                # safetensors names floating types with an F, other types I64, U8 or BOOL
                found |= {name: OnDisk(tuple(x.get_shape()), "F" in x.get_dtype()) for name, x in slices.items()}
        else:
            tensors = torch.load(file, map_location="meta", weights_only=True)
            found |= {name: OnDisk(tuple(x.shape), x.is_floating_point()) for name, x in tensors.items()}
    return found


def _weight_files(folder: Path, variant: str | None, safetensors: bool) -> list[Path]:
    """Returns the weight files that transformers reads: those of the first kind that exists."""
    kinds = ["model.safetensors", "model.safetensors.index.json"] if safetensors else []
    for kind in [*kinds, "pytorch_model.bin", "pytorch_model.bin.index.json"]:
        stem, _, suffix = kind.rpartition(".")
        file = folder / (f"{stem}.{variant}.{suffix}" if variant else kind)
        if file.is_file():
            if suffix != "json":
                return [file]
            return [folder / shard for shard in sorted(set(json.loads(file.read_text())["weight_map"].values()))]
    return []


def _expert_problem(names: Iterable[str], config: Any) -> str:
    """Returns which expert is missing or unexpected among names on disk, or an empty text.

    transformers numbers the experts by their order in the file and does not notice a gap.
    """
    found: dict[str, set[int]] = {}
    for name in names:
        if match := _EXPERT.fullmatch(name):
            found.setdefault(f"{match['before']}{{}}{match['after']}", set()).add(int(match["expert"]))
    for pattern in sorted(found, key=_natural):
        field, number = "num_experts", config.num_experts
        if ".self_attn." in pattern:
            field, number = "the experts of attention", stacked_attention_experts(config)
        numbers = set(range(number))
        if lacking := numbers - found[pattern]:
            return f"it has no {pattern.format(min(lacking))}"
        if extra := found[pattern] - numbers:
            return f"it has {pattern.format(min(extra))}, beyond {field} = {len(numbers)}"
    return ""


def _integer_problem(model: Any, tensors: dict[str, OnDisk], unexpected: Iterable[str]) -> str:
    """Returns which weight has an integer type on disk, or an empty text; transformers would use the integers as weights."""
    integers = {bare(model, name) for name, tensor in model.state_dict().items() if not tensor.is_floating_point()}
    for name, tensor in tensors.items():
        if not tensor.floating and name not in unexpected and bare(model, name) not in integers:
            return f"{name} is of integers or truth values"
    return ""


def _shape_problem(model_class: type, config: Any, tensors: dict[str, OnDisk]) -> str:
    """Returns which tensor is missing on disk or has a wrong shape, or an empty text."""
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
    """Returns the configuration in a checkpoint, with or without the changes that `from_pretrained` was given."""
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
    """Returns the base checkpoint that an adapter's folder names; for another checkpoint, the checkpoint itself."""
    file = Path(str(name_or_path)) / "adapter_config.json"
    if not file.is_file() or (file.parent / "config.json").is_file():
        return name_or_path
    return json.loads(file.read_text())["base_model_name_or_path"]


@contextmanager
def refuse_damaged(model_class: Any, name_or_path: Any, options: dict[str, Any]) -> Iterator[Callable]:
    """Names the missing or unexpected tensor of a damaged checkpoint; a context around transformers' loading.

    transformers makes new weights for a missing tensor, reports a missing expert as a failed conversion, and closes a gap in
    the numbers of experts. The context yields `check(model, loading_info)`, to be called with the results of the loading.

    Args:
        model_class: the class to load.
        name_or_path: folder or Hub name.
        options: the other arguments of `from_pretrained`.

    Raises:
        CheckpointError: names the first tensor that is missing, misshapen or too many.
    """

    def check(model: Any, info: dict[str, Any]) -> None:
        if options.get("state_dict") == {}:
            # an empty state dict asks for a new model, so that no tensor is missing
            vars(model).pop("_missing_at_load", None)
            return
        source = "state_dict" if name_or_path is None else model.name_or_path
        tensors = {} if options.get("gguf_file") else tensors_on_disk(source, options)
        problem = _expert_problem(tensors, model.config)
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
        # a missing tensor is named for the adapter's folder, unless the base lacks it
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
        # quantized matrices have other shapes on disk
        plain = getattr(config, "quantization_config", None) is None and options.get("quantization_config") is None
        problem = _shape_problem(model_class, config, tensors) if tensors and plain else ""
        problem = problem or _expert_problem(tensors, config)
        raise misfit(source or "state_dict", problem or error) from error
