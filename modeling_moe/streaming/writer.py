# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""Writing a checkpoint tensor by tensor, whole or not at all, so that an interrupted run can go on where it was."""

import errno
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import split_state_dict_into_shards_factory

from .. import __version__
from ..cli import UserError
from ..files import put_in_place, refuse_occupied
from .hashes import SUMS_NAME, hash_file, read_sums
from .progress import byte_progress
from .safetensors_format import make_header
from .tensors import State


RECIPE_NAME = "conversion.json"


@dataclass(frozen=True)
class _Shard:
    name: str
    tensors: State
    header: bytes

    @property
    def nbytes(self) -> int:
        return len(self.header) + sum(tensor.nbytes for tensor in self.tensors.values())

    def pieces(self) -> Iterator[np.ndarray]:
        """The bytes of the file, in order."""
        yield np.frombuffer(self.header, np.uint8)
        for name, tensor in self.tensors.items():
            count = 0
            for chunk in tensor.chunks():
                if chunk.dtype != tensor.dtype:
                    raise RuntimeError(f"{name} is {chunk.dtype} where {tensor.dtype} was announced")
                count += chunk.numel()
                yield chunk.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
            if count != tensor.numel:
                raise RuntimeError(f"{name} has {count} elements where {tensor.numel} were announced")


def write_checkpoint(
    output_dir: str | Path,
    state: State,
    recipe: dict,
    finish: Callable[[Path], None],
    overwrite: bool = False,
    max_shard_size: int | str = "5GB",
    progress: bool = True,
) -> None:
    """Writes a checkpoint that transformers loads; memory holds about one tensor at a time.

    The shards grow in a hidden folder beside `output_dir`, which takes its place at the end. After an interruption the
    same call goes on after the last whole shard, and ends with the same bytes.

    Args:
        output_dir: written whole or not at all.
        state: names to tensors; read in this order, but for those of a shard with larger elements, which come first.
        recipe: what the tensors were made from and how, in JSON's types. It is kept in `conversion.json`, and tells
            whether an interrupted run was the same: name in it all that changes a byte.
        finish: writes what else belongs into the folder that it is given: configuration, tokenizer.
        overwrite: replace `output_dir`, and an interrupted run of another recipe.
        max_shard_size: as transformers' `save_pretrained` takes it; a larger tensor gets a file of its own.
        progress: show a progress bar on stderr.

    Raises:
        UserError: if `output_dir` is not empty, an interrupted run had another recipe, or the disk is or becomes full.
    """
    output_dir = Path(output_dir)
    refuse_occupied(output_dir, overwrite)
    shards, index = _plan(state, max_shard_size)
    description = _describe(recipe, shards)
    partial = output_dir.with_name(f".{output_dir.name}.partial")
    _refuse_other_run(partial, description, overwrite)
    with byte_progress("writing", sum(shard.nbytes for shard in shards), progress) as advance:
        sums = _whole_shards(partial, shards, advance)
        missing = [shard for shard in shards if shard.name not in sums]
        _refuse_full_disk(output_dir, sum(shard.nbytes for shard in missing))
        try:
            partial.mkdir(parents=True, exist_ok=True)
            _write_text(partial / RECIPE_NAME, description)
            for shard in missing:
                sums[shard.name] = _write_shard(partial / shard.name, shard, advance)
                _write_sums(partial, sums)
            if index:
                _write_text(partial / "model.safetensors.index.json", index)
            finish(partial)
            _sync(partial)
        except BaseException as error:
            if not sums:
                shutil.rmtree(partial, ignore_errors=True)
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise _disk_full(output_dir, shards, sums) from error
            raise
    put_in_place(partial, output_dir)


def _plan(state: State, max_shard_size: int | str) -> tuple[list[_Shard], str]:
    """The files of the checkpoint, and the text of their index; empty for a single file."""
    try:
        split = split_state_dict_into_shards_factory(
            state,
            get_storage_size=lambda tensor: tensor.nbytes,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=max_shard_size,
        )
    except ValueError as error:
        raise UserError(f"max_shard_size {max_shard_size!r} is no size: write it like 5GB") from error
    shards = []
    for file, names in split.filename_to_tensors.items():
        # readers want each tensor aligned to its elements
        tensors = {name: state[name] for name in sorted(names, key=lambda name: -state[name].dtype.itemsize)}
        shards.append(_Shard(file, tensors, make_header(tensors)))
    if not split.is_sharded:
        return shards, ""
    metadata = {"total_parameters": sum(tensor.numel for tensor in state.values()), **split.metadata}
    index = {"metadata": metadata, "weight_map": split.tensor_to_filename}
    return shards, json.dumps(index, indent=2, sort_keys=True) + "\n"


def _describe(recipe: dict, shards: list[_Shard]) -> str:
    """What `conversion.json` says: the recipe, the version, and a fingerprint of the layout."""
    layout = hashlib.sha256()
    for shard in shards:
        layout.update(shard.name.encode() + shard.header)
    description = {"modeling_moe_version": __version__, "recipe": recipe, "layout": layout.hexdigest()}
    return json.dumps(description, indent=2) + "\n"


def _refuse_other_run(partial: Path, description: str, overwrite: bool) -> None:
    """Removes what an interrupted run of another recipe left, if that may be replaced."""
    recipe = partial / RECIPE_NAME
    if not partial.exists() or (recipe.exists() and recipe.read_text() == description):
        return
    if recipe.exists() and not overwrite:
        raise UserError(
            f"{partial} holds an interrupted run with other options, another source or another version: remove it, or "
            "pass --overwrite to start afresh"
        )
    shutil.rmtree(partial)


def _whole_shards(partial: Path, shards: list[_Shard], advance: Callable[[int], None]) -> dict[str, str]:
    """The finished shards of an interrupted run, with their hashes; all else that it left is removed."""
    if not partial.exists():
        return {}
    listed, sums = read_sums(partial), {}
    for shard in shards:
        file = partial / shard.name
        if shard.name not in listed or not file.exists() or file.stat().st_size != shard.nbytes:
            continue
        if hash_file(file, advance) == listed[shard.name]:
            sums[shard.name] = listed[shard.name]
        else:
            advance(-shard.nbytes)
    for file in partial.iterdir():
        if file.name not in (RECIPE_NAME, *sums):
            shutil.rmtree(file) if file.is_dir() else file.unlink()
    _write_sums(partial, sums)
    return sums


def _refuse_full_disk(output_dir: Path, needed: int) -> None:
    free = _free_bytes(output_dir)
    if needed > free:
        raise UserError(
            f"output_dir {output_dir} needs {_gigabytes(needed)} where {_gigabytes(free)} are free: free "
            f"{_gigabytes(needed - free)} or choose another"
        )


def _disk_full(output_dir: Path, shards: list[_Shard], sums: dict[str, str]) -> UserError:
    needed = sum(shard.nbytes for shard in shards if shard.name not in sums)
    lacking = max(0, needed - _free_bytes(output_dir))
    rest = f", it goes on after shard {len(sums)} of {len(shards)}" if sums else ""
    return UserError(
        f"No space left for output_dir {output_dir}: free {_gigabytes(lacking)} and run the same command again{rest}"
    )


def _free_bytes(output_dir: Path) -> int:
    return shutil.disk_usage(next(folder for folder in output_dir.absolute().parents if folder.exists())).free


def _gigabytes(count: int) -> str:
    return f"{math.ceil(count / 1e8) / 10} GB"


def _write_shard(file: Path, shard: _Shard, advance: Callable[[int], None]) -> str:
    """Writes a shard and returns its SHA-256 in hex; the file appears under its name when it is whole."""
    digest, part = hashlib.sha256(), _part(file)
    try:
        with open(part, "wb") as stream, ThreadPoolExecutor(1) as hasher:
            hashed = hasher.submit(digest.update, b"")
            for piece in shard.pieces():
                hashed.result()  # of the piece before, so that no more than two are in memory
                hashed = hasher.submit(digest.update, piece)
                stream.write(piece)
                advance(len(piece))
            hashed.result()
            stream.flush()
            os.fsync(stream.fileno())
        part.rename(file)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    return digest.hexdigest()


def _part(file: Path) -> Path:
    """Where a file grows; of each process its own, so that two of them cannot mix their bytes."""
    return file.with_name(f"{file.name}.{os.getpid()}.part")


def _write_text(file: Path, text: str) -> None:
    part = _part(file)
    with open(part, "w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    part.rename(file)


def _write_sums(folder: Path, sums: dict[str, str]) -> None:
    _write_text(folder / SUMS_NAME, "".join(f"{sums[name]}  {name}\n" for name in sorted(sums)))


def _sync(folder: Path) -> None:
    """Makes sure that all files are on the disk before the folder is taken for whole."""
    for file in folder.rglob("*"):
        if file.is_file():
            with open(file, "rb") as stream:
                os.fsync(stream.fileno())
