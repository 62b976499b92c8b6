# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""Writing a checkpoint tensor by tensor, whole or not at all, so that an interrupted run can go on where it was."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import split_state_dict_into_shards_factory

from ..utils.atomic import part_of, write_text
from ..utils.errors import Interrupted, UserError
from ..utils.folders import RECORD_NAME, STAGE_NAME, ResultFolder, describe
from ..utils.hashes import hash_file, read_sums, write_sums
from ..utils.progress import byte_progress
from ..utils.sizes import size_text
from .damage import UnusableError, refuse_not_finite
from .lazy_tensor import State
from .safetensors_format import make_header


INDEX_NAME = "model.safetensors.index.json"


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
                refuse_not_finite(chunk, f"{name} of the result", "it overflows in this dtype: choose another dtype")
                count += chunk.numel()
                yield chunk.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
            if count != tensor.numel:
                raise RuntimeError(f"{name} has {count} elements where {tensor.numel} were announced")


def write_checkpoint(
    output_dir: str | Path | ResultFolder,
    state: State,
    recipe: dict,
    finish: Callable[[Path], None],
    overwrite: bool = False,
    max_shard_size: int | str = "5GB",
    progress: bool = True,
    sources: Sequence[str | Path] = (),
    check: Callable[[Path], None] | None = None,
) -> None:
    """Writes a checkpoint that transformers loads; memory holds about one tensor at a time.

    The shards grow in a hidden folder, which takes the place of `output_dir` at the end, see [`ResultFolder`]. After an
    interruption the same call goes on after the last whole shard, and ends with the same bytes.

    Args:
        output_dir: written whole or not at all; of a `ResultFolder` its own `overwrite` and sources count.
        state: names to tensors; read in this order, but for those of a shard with larger elements, which come first.
        recipe: what the tensors were made from and how, in JSON's types. It is kept in `conversion.json`, and tells
            whether an interrupted run was the same: name in it all that changes a byte.
        finish: writes what else belongs into the empty folder that it is given: configuration, tokenizer.
        overwrite: replace what an earlier run wrote at `output_dir`, and an interrupted run of another recipe.
        max_shard_size: as transformers' `save_pretrained` takes it; a larger tensor gets a file of its own.
        progress: show a progress bar on stderr.
        sources: folders that are read; none may be, hold or lie in `output_dir`.
        check: looks at the whole folder before it takes its place, and raises if it will not do.

    Raises:
        UserError: if `output_dir` may not be written, an interrupted run had another recipe, the disk is or becomes full,
            or another process writes there.
        UnusableError: if a tensor has a value that is not finite; nothing is left then.
        Interrupted: on Ctrl-C; whole shards are kept.
    """
    folder = output_dir if isinstance(output_dir, ResultFolder) else ResultFolder(output_dir, overwrite, sources)
    shards, index = _plan(state, max_shard_size)
    layout = hashlib.sha256(b"".join(shard.name.encode() + shard.header for shard in shards)).hexdigest()
    description = describe(recipe, layout=layout)
    refuse_full_disk(folder, sum(shard.nbytes for shard in shards))
    with folder.writing() as partial:
        _refuse_other_run(folder, description)
        sums: dict[str, str] = {}
        try:
            with byte_progress("writing", sum(shard.nbytes for shard in shards), progress) as advance:
                sums |= _whole_shards(folder, shards, advance)
                write_text(partial / RECORD_NAME, description)
                for shard in shards:
                    if shard.name not in sums:
                        sums[shard.name] = _write_shard(partial / shard.name, shard, advance)
                        write_sums(partial, sums)
            _finish(folder, index, sums, finish, check)
        except BaseException as error:
            _give_up(folder, shards, sums, error)
            raise
        folder.commit()


def _finish(
    folder: ResultFolder,
    index: str,
    sums: dict[str, str],
    finish: Callable[[Path], None],
    check: Callable[[Path], None] | None,
) -> None:
    """Adds what is not a shard, and has the whole result looked at."""
    stage = folder.partial / STAGE_NAME
    stage.mkdir()
    if index:
        write_text(stage / INDEX_NAME, index)
    finish(stage)
    folder.seal(sums)
    if check is None:
        return
    try:
        check(folder.partial)
    except UserError as error:
        # the next run would write the same bytes and fail here again
        raise UnusableError(str(error)) from error


def _give_up(folder: ResultFolder, shards: list[_Shard], sums: dict[str, str], error: BaseException) -> None:
    """Keeps whole shards for the next run where it can use them, and says so."""
    if not sums or isinstance(error, UnusableError):
        folder.clear()
    else:
        folder.clear(but=sums)
        write_sums(folder.partial, sums)
    rest = f", it goes on after shard {len(sums)} of {len(shards)}" if sums else ""
    if isinstance(error, KeyboardInterrupt):
        raise Interrupted(f"give the same command again{rest}") from error
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        needed = sum(shard.nbytes for shard in shards if shard.name not in sums)
        lacking = max(0, needed - free_bytes(folder))
        raise UserError(
            f"No space left for output_dir {folder.path}: free {size_text(lacking)} and run the same command again{rest}"
        ) from error


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


def _refuse_other_run(folder: ResultFolder, description: str) -> None:
    """Removes what an interrupted run of another recipe left, if that may be replaced."""
    recipe = folder.partial / RECORD_NAME
    if recipe.exists() and recipe.read_text(encoding="utf-8") == description:
        return
    if recipe.exists() and not folder.overwrite:
        raise UserError(
            f"{folder.partial} holds an interrupted run with other options, another source or another version: remove it, "
            "or pass --overwrite to start afresh"
        )
    folder.clear()


def _whole_shards(folder: ResultFolder, shards: list[_Shard], advance: Callable[[int], None]) -> dict[str, str]:
    """The finished shards of an interrupted run, with their hashes; all else that it left is removed."""
    listed, sums = read_sums(folder.partial), {}
    for shard in shards:
        file = folder.partial / shard.name
        if shard.name not in listed or not file.exists() or file.stat().st_size != shard.nbytes:
            continue
        if hash_file(file, advance) == listed[shard.name]:
            sums[shard.name] = listed[shard.name]
        else:
            advance(-shard.nbytes)
    folder.clear(but=sums)
    if sums:
        write_sums(folder.partial, sums)
    return sums


def free_bytes(folder: ResultFolder) -> int:
    """Bytes that the disk has for a result."""
    return shutil.disk_usage(next(parent for parent in folder.partial.parents if parent.exists())).free


def refuse_full_disk(folder: ResultFolder, nbytes: int) -> None:
    """Refuses a result that does not fit, what an interrupted run has written of it deducted.

    Args:
        folder: where it goes.
        nbytes: of the whole result.

    Raises:
        UserError: names what is needed and what is free.
    """
    written = folder.partial.glob("*.safetensors") if folder.partial.is_dir() else ()
    needed, free = nbytes - sum(file.stat().st_size for file in written), free_bytes(folder)
    if needed > free:
        raise UserError(
            f"output_dir {folder.path} needs {size_text(needed)} where {size_text(free, up=False)} are free: free "
            f"{size_text(needed - free)} or choose another"
        )


def _write_shard(file: Path, shard: _Shard, advance: Callable[[int], None]) -> str:
    """Writes a shard and returns its SHA-256 in hex; the file appears under its name when it is whole.

    It hashes in this thread, at some loss of speed: whoever waits for another thread when Ctrl-C comes can wait forever.
    """
    digest, part = hashlib.sha256(), part_of(file)
    try:
        with open(part, "wb") as stream:
            for piece in shard.pieces():
                digest.update(piece)
                stream.write(piece)
                advance(len(piece))
            stream.flush()
            os.fsync(stream.fileno())
        part.rename(file)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    return digest.hexdigest()
