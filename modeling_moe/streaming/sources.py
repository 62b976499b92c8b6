# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""Finding a source checkpoint, and telling whether it is whole, from the headers of its files alone."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download

from ..cli import UserError
from ..files import COMPANIONS
from .gguf import read_gguf
from .safetensors_format import read_tensors
from .tensors import State


SINGLE = "model.safetensors"
READABLE = {torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool}


@dataclass(frozen=True)
class Source:
    """A checkpoint to convert.

    Attributes:
        folder: where it lies.
        state: its tensors under transformers' names, none of them read; as stored on disk, or fp32 from a GGUF file.
        gguf_file: name of the GGUF file in the folder, if it is one.
    """

    folder: Path
    state: State
    gguf_file: str | None = None


def open_source(name_or_path: str | Path, gguf_file: str | None = None) -> Source:
    """Opens a checkpoint by folder or Hub name.

    A folder has either `model.safetensors`, or shards and the index that names them.

    Args:
        name_or_path: folder, or Hub name of a model, whose safetensors files are downloaded.
        gguf_file: name of the GGUF file to take instead.

    Raises:
        UserError: if there is no such checkpoint, it is not in safetensors, a shard or tensor is missing, or a file is
            truncated.
    """
    folder = Path(name_or_path)
    if not folder.is_dir():
        folder = _download(str(name_or_path), gguf_file)
    if gguf_file:
        return Source(folder, read_gguf(folder / gguf_file), gguf_file)
    if (folder / SINGLE).is_file():
        return Source(folder, read_tensors(folder / SINGLE))
    weight_map = _weight_map(folder)
    if not weight_map:
        raise UserError(
            f"{folder} has no {SINGLE} and no index of shards: save the model as safetensors first, or name its gguf_file"
        )
    return Source(folder, _read_shards(folder, weight_map))


def _read_shards(folder: Path, weight_map: dict[str, str]) -> State:
    state = {}
    for shard in sorted(set(weight_map.values())):
        if not (folder / shard).is_file():
            raise UserError(f"{folder} lacks {shard}, which its index names: download it")
        # where two shards have a tensor, the index decides
        state |= {name: t for name, t in read_tensors(folder / shard).items() if weight_map.get(name, shard) == shard}
    for name, shard in weight_map.items():
        if name not in state:
            raise UserError(f"{folder / shard} lacks {name}, which the index promises: download it again")
    return state


def _download(name: str, gguf_file: str | None) -> Path:
    described = [gguf_file] if gguf_file else ["*.json", *COMPANIONS]
    try:
        folder = Path(snapshot_download(name, allow_patterns=described))
        if gguf_file:
            return folder
        shards = set(_weight_map(folder).values()) or {SINGLE}
        return Path(snapshot_download(name, allow_patterns=[*described, *sorted(shards)]))
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(
            f"model_name_or_path {name} is neither a folder nor a model that the Hub gives: {error}"
        ) from error


def _weight_map(folder: Path) -> dict[str, str]:
    """Tensor names to shards, as the folder's index has them; empty without an index."""
    indices = sorted(folder.glob("*.safetensors.index.json"))
    indices = [index for index in indices if index.name == f"{SINGLE}.index.json"] or indices
    if not indices:
        return {}
    if len(indices) > 1:
        raise UserError(f"{folder} has {len(indices)} indices of safetensors files: keep the model's alone")
    try:
        return json.loads(indices[0].read_text())["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{indices[0]} is not an index of safetensors files: download it again") from error


def refuse_quantised(state: State) -> None:
    """Refuses tensors that are not plain numbers.

    Args:
        state: tensors that a conversion takes as they are.

    Raises:
        UserError: names the first whose dtype is an integer of less than 64 bits or a float of 8.
    """
    for name, tensor in state.items():
        if tensor.dtype not in READABLE:
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise UserError(f"{name} is {dtype}, so this is a quantised source: dequantise it first")
