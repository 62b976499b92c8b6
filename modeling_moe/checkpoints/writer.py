# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module writes a checkpoint tensor by tensor, whole or not at all; an interrupted run can be continued."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory

from ..utils.atomic import part_of, write_text
from ..utils.errors import Interrupted, UserError
from ..utils.folders import RECORD_NAME, STAGE_NAME, ResultFolder, record_text
from ..utils.hashes import hash_file, read_sums, write_sums
from ..utils.json_files import read_json, write_json
from ..utils.lineage import VERIFICATION
from ..utils.prediction_files import STEM
from ..utils.progress import byte_progress
from ..utils.sizes import size_text
from .damage import UnusableError, refuse_not_finite
from .lazy_tensor import State
from .safetensors_format import make_header


INDEX_NAME = "model.safetensors.index.json"


@dataclass(frozen=True)
class _Shard:
    """A file of the checkpoint: name, tensors in the order of the file, and header."""

    name: str
    tensors: State
    header: bytes

    @property
    def nbytes(self) -> int:
        """Size of the file in bytes."""
        return len(self.header) + sum(tensor.nbytes for tensor in self.tensors.values())

    def pieces(self) -> Iterator[memoryview]:
        """Yields the bytes of the file in order."""
        yield memoryview(self.header)
        for name, tensor in self.tensors.items():
            count = 0
            for chunk in tensor.chunks():
                if chunk.dtype != tensor.dtype:
                    raise RuntimeError(f"{name} is {chunk.dtype} where {tensor.dtype} was announced")
                refuse_not_finite(chunk, f"{name} of the result", "it overflows in this dtype: choose another dtype")
                count += chunk.numel()
                yield chunk.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
            if count != tensor.numel:
                raise RuntimeError(f"{name} has {count} elements where {tensor.numel} were announced")


def write_checkpoint(
    output_dir: str | Path | ResultFolder,
    state: State,
    recipe: dict[str, Any],
    finish: Callable[[Path], None],
    overwrite: bool = False,
    max_shard_size: int | str = "5GB",
    progress: bool = True,
    sources: Sequence[str | Path] = (),
    check: Callable[[Path], Mapping[str, Any] | None] | None = None,
    beside: State | None = None,
) -> None:
    """Writes a checkpoint that transformers loads; memory holds about one tensor at a time.

    The shards are written into a hidden folder that replaces `output_dir` at the end, see [`ResultFolder`]. After an
    interruption, the same call continues after the last complete shard and produces the same bytes.

    Args:
        output_dir: folder that is written whole or not at all; `overwrite` and `sources` are ignored if it is a
            `ResultFolder`, which has them already.
        state: names to tensors, read in this order; within a shard, tensors of larger elements come first.
        recipe: sources and options of the result, in JSON's types. It is kept in `conversion.json` and decides
            whether an interrupted run may be continued: include everything that changes a byte of the result.
        finish: writes all other files (configuration, tokenizer) into the empty folder that it receives.
        overwrite: whether to replace an earlier run's result, and an interrupted run of another recipe.
        max_shard_size: size limit of a file, as in transformers' `save_pretrained`; a larger tensor gets its own file.
        progress: whether to show a progress bar on stderr.
        sources: folders that are read; none may equal, contain or lie in `output_dir`.
        check: receives the complete folder before it replaces `output_dir`, and raises if the result is not usable. What
            it measures and returns is added to `conversion.json` as `verification`.
        beside: tensors that no model loads, in files of their own, see [`modeling_moe.utils.prediction_files`]; an index is
            written then even for a single file of the model.

    Raises:
        UserError: if `output_dir` may not be written, an interrupted run had another recipe, the disk is or becomes full,
            or another process writes there.
        UnusableError: if a tensor has a value that is not finite; all files of the run are deleted then.
        Interrupted: on Ctrl-C; complete shards are kept.
    """
    folder = output_dir if isinstance(output_dir, ResultFolder) else ResultFolder(output_dir, overwrite, sources)
    shards, index = _plan_shards(state, max_shard_size, indexed=bool(beside))
    if beside:
        shards += _plan_shards(beside, max_shard_size, stem=STEM)[0]
    layout = hashlib.sha256(b"".join(shard.name.encode() + shard.header for shard in shards)).hexdigest()
    description = record_text(recipe, layout=layout)
    refuse_full_disk(folder, sum(shard.nbytes for shard in shards))
    with folder.writing():
        _refuse_other_run(folder, description)
        sums: dict[str, str] = {}
        try:
            _write_shards(folder, shards, description, sums, progress)
            _finish(folder, index, sums, finish, check)
        except BaseException as error:
            _keep_complete_shards(folder, shards, sums, error)
            raise
        folder.commit()


def _write_shards(
    folder: ResultFolder, shards: list[_Shard], description: str, sums: dict[str, str], progress: bool
) -> None:
    """Writes the shards that an interrupted run has not completed, and enters each hash into `sums`."""
    with byte_progress("writing", sum(shard.nbytes for shard in shards), progress) as advance:
        sums |= _complete_shards(folder, shards, advance)
        write_text(folder.partial / RECORD_NAME, description)
        for shard in shards:
            if shard.name not in sums:
                sums[shard.name] = _write_shard(folder.partial / shard.name, shard, advance)
                write_sums(folder.partial, sums)


def _finish(
    folder: ResultFolder,
    index: str | None,
    sums: dict[str, str],
    finish: Callable[[Path], None],
    check: Callable[[Path], Mapping[str, Any] | None] | None,
) -> None:
    """Adds the files that are not shards, and runs `check` on the complete result."""
    stage = folder.partial / STAGE_NAME
    stage.mkdir()
    if index is not None:
        write_text(stage / INDEX_NAME, index)
    finish(stage)
    folder.seal(sums)
    if check is None:
        return
    try:
        measured = check(folder.partial)
    except UserError as error:
        # another run would write the same bytes and fail here again, so the shards are not kept
        raise UnusableError(str(error)) from error
    if measured is not None:
        record = folder.partial / RECORD_NAME
        write_json(record, read_json(record) | {VERIFICATION: dict(measured)})
        write_sums(folder.partial, read_sums(folder.partial) | {RECORD_NAME: hash_file(record)})


def _is_record_of(text: str, description: str) -> bool:
    """Returns whether `conversion.json` has the text `description`, or that text and what a check measured after it."""
    begin = description.removesuffix("\n}\n")
    return text == description or text.startswith(f'{begin},\n  "{VERIFICATION}":')


def _keep_complete_shards(
    folder: ResultFolder, shards: list[_Shard], sums: dict[str, str], error: BaseException
) -> None:
    """Keeps complete shards if another run can use them, and turns Ctrl-C and a full disk into an error that says how to
    continue.
    """
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


def _plan_shards(
    state: State, max_shard_size: int | str, stem: str = "model", indexed: bool = False
) -> tuple[list[_Shard], str | None]:
    """Returns files whose names begin with `stem`, and the text of the index; None for a single file if not `indexed`."""
    try:
        split = split_state_dict_into_shards_factory(
            state,
            get_storage_size=lambda tensor: tensor.nbytes,
            filename_pattern=stem + "{suffix}.safetensors",
            max_shard_size=max_shard_size,
        )
    except ValueError as error:
        raise UserError(f"max_shard_size {max_shard_size!r} is no size: write it like 5GB") from error
    shards = []
    for file, names in split.filename_to_tensors.items():
        # larger elements come first, so that each tensor is aligned to the size of an element
        tensors = {name: state[name] for name in sorted(names, key=lambda name: -state[name].dtype.itemsize)}
        shards.append(_Shard(file, tensors, make_header(tensors)))
    if not split.is_sharded and not indexed:
        return shards, None
    metadata = {"total_parameters": sum(tensor.numel for tensor in state.values()), **split.metadata}
    index = {"metadata": metadata, "weight_map": split.tensor_to_filename}
    return shards, json.dumps(index, indent=2, sort_keys=True) + "\n"


def _refuse_other_run(folder: ResultFolder, description: str) -> None:
    """Deletes the files of an interrupted run of another recipe, or refuses if they may not be replaced."""
    recipe = folder.partial / RECORD_NAME
    if recipe.exists() and _is_record_of(recipe.read_text(encoding="utf-8"), description):
        return
    if recipe.exists() and not folder.overwrite:
        raise UserError(
            f"{folder.partial} holds an interrupted run with other options, another source or another version: remove it, "
            "or pass --overwrite to start afresh"
        )
    folder.clear()


def _complete_shards(folder: ResultFolder, shards: list[_Shard], advance: Callable[[int], None]) -> dict[str, str]:
    """Returns name and hash of each shard that an interrupted run completed, and deletes all other files of that run."""
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
    """Returns the free bytes on the disk of a result folder."""
    return shutil.disk_usage(next(parent for parent in folder.partial.parents if parent.exists())).free


def refuse_full_disk(folder: ResultFolder, nbytes: int) -> None:
    """Refuses a result that does not fit on the disk; bytes that an interrupted run has written already count as there.

    Args:
        folder: folder of the result.
        nbytes: size of the result in bytes.

    Raises:
        UserError: names the bytes that are needed and free.
    """
    written = folder.partial.glob("*.safetensors") if folder.partial.is_dir() else ()
    needed, free = nbytes - sum(file.stat().st_size for file in written), free_bytes(folder)
    if needed > free:
        raise UserError(
            f"output_dir {folder.path} needs {size_text(needed)} where {size_text(free, up=False)} are free: free "
            f"{size_text(needed - free)} or choose another"
        )


def _write_shard(file: Path, shard: _Shard, advance: Callable[[int], None]) -> str:
    """Writes a shard and returns the SHA-256 in hex; the file appears under `file` when it is complete.

    Hashing runs in this thread, which is slower: a Ctrl-C while this thread waits for another one could hang for ever.
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
