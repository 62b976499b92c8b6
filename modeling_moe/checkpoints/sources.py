# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module finds a source checkpoint and checks from the files' headers that the checkpoint is complete."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download

from ..utils.companions import COMPANIONS
from ..utils.errors import UserError
from ..utils.json_files import read_json
from ..utils.locations import folder_and_gguf, refuse_outside
from ..utils.prediction_files import PATTERN
from .gguf import read_gguf
from .lazy_tensor import State
from .safetensors_format import read_tensors


SINGLE = "model.safetensors"
ADAPTER = "adapter_config.json"
READABLE = {torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool}


@dataclass(frozen=True)
class Source:
    """A checkpoint to convert.

    Attributes:
        folder: local folder of the checkpoint.
        state: unread tensors under transformers' names, as stored on disk; fp32 if they come from a GGUF file.
        files: names of the files in the folder that hold the tensors.
        gguf_file: name of the GGUF file in the folder, or None.
    """

    folder: Path
    state: State
    files: tuple[str, ...]
    gguf_file: str | None = None


def open_source(
    name_or_path: str | Path, gguf_file: str | None = None, hub: Mapping[str, Any] | None = None
) -> Source:
    """Opens a checkpoint by folder or Hub name.

    A folder holds either `model.safetensors`, or shards and the index that names them.

    Args:
        name_or_path: folder, path of a GGUF file, or Hub name of a model, whose safetensors files are downloaded.
        gguf_file: name of a GGUF file in the folder, which is read instead of safetensors files.
        hub: how a Hub model is downloaded: arguments of `huggingface_hub.snapshot_download` such as `revision`.

    Raises:
        UserError: if there is no such checkpoint or it is not in safetensors, a shard or tensor is missing, a file is
            damaged or lies outside the folder, or the folder holds an adapter.
    """
    name, gguf_file = folder_and_gguf(name_or_path, gguf_file)
    folder = Path(name) if Path(name).is_dir() else _download(name, gguf_file, hub or {})
    refuse_outside(folder)
    _refuse_adapter(folder)
    if gguf_file:
        return Source(folder, read_gguf(folder / gguf_file), (gguf_file,), gguf_file)
    if (folder / SINGLE).is_file():
        return Source(folder, read_tensors(folder / SINGLE), (SINGLE,))
    weight_map = _weight_map(folder)
    if not weight_map:
        pickled = next((file.name for file in sorted(folder.glob("*.bin")) if "model" in file.name), None)
        found = f"has the pickled {pickled} and" if pickled else "has"
        raise UserError(
            f"{folder} {found} no {SINGLE} and no index of shards: save the model as safetensors first, or name its gguf_file"
        )
    return Source(folder, _read_shards(folder, weight_map), tuple(sorted(set(weight_map.values()))))


def _refuse_adapter(folder: Path) -> None:
    """Refuses a folder with a PEFT adapter: a model converted from the folder would lack what the adapter learnt."""
    if not (folder / ADAPTER).is_file():
        return
    base = read_json(folder / ADAPTER).get("base_model_name_or_path", "a model that it does not name")
    alone = not (folder / SINGLE).is_file() and not any(folder.glob("*.safetensors.index.json"))
    what = f"is an adapter of {base}" if alone else f"holds a model and an adapter ({ADAPTER})"
    other = "" if alone else f", or move {ADAPTER} away to take the model alone"
    raise UserError(
        f"{folder} {what}: merge it first: moe merge_adapter --model_name_or_path {folder} --output_dir merged{other}"
    )


def _read_shards(folder: Path, weight_map: dict[str, str]) -> State:
    """Returns the tensors of all shards; if two shards hold a tensor of one name, the index decides which one is taken."""
    state: State = {}
    for shard in sorted(set(weight_map.values())):
        if not (folder / shard).is_file():
            raise UserError(f"{folder} lacks {shard}, which its index names: download it")
        state |= {name: t for name, t in read_tensors(folder / shard).items() if weight_map.get(name, shard) == shard}
    for name, shard in weight_map.items():
        if name not in state:
            raise UserError(f"{folder / shard} lacks {name}, which the index promises: download it again")
    return state


def _download(name: str, gguf_file: str | None, hub: Mapping[str, Any]) -> Path:
    """Downloads description, tokenizer and weights of a Hub model and returns the local folder."""
    # the model card gives the license
    described = ["README.md", *([gguf_file] if gguf_file else ["*.json", *COMPANIONS])]
    try:
        folder = Path(snapshot_download(name, allow_patterns=described, **hub))
        if gguf_file:
            return folder
        shards = set(_weight_map(folder).values()) or {SINGLE}
        return Path(snapshot_download(name, allow_patterns=[*described, PATTERN, *sorted(shards)], **hub))
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(
            f"model_name_or_path {name} is neither a folder nor a model that the Hub gives: {error}"
        ) from error


def _weight_map(folder: Path) -> dict[str, str]:
    """Returns tensor names to shard names from the folder's index; an empty dictionary if there is no index."""
    indices = sorted(folder.glob("*.safetensors.index.json"))
    indices = [index for index in indices if index.name == f"{SINGLE}.index.json"] or indices
    if not indices:
        return {}
    if len(indices) > 1:
        raise UserError(f"{folder} has {len(indices)} indices of safetensors files: keep only the model's index")
    weight_map = read_json(indices[0]).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise UserError(f"{indices[0]} is not an index of safetensors files: download it again")
    return weight_map


def refuse_quantised(state: State) -> None:
    """Refuses tensors whose dtype shows that they are quantised.

    Args:
        state: tensors that a conversion takes unchanged.

    Raises:
        UserError: names the first tensor whose dtype is an integer of less than 64 bits or a float of 8 bits.
    """
    for name, tensor in state.items():
        if tensor.dtype not in READABLE:
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise UserError(f"{name} is {dtype}, so this is a quantised source: dequantise it first")
