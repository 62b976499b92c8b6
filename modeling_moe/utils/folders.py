# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""A run writes its result folder whole or not at all, and replaces only what an earlier run of this package wrote.

A run writes into `.NAME.partial`, beside the folder NAME, or inside NAME if NAME cannot be renamed. The earlier content of
NAME moves to `.NAME.replaced` until the result is in place. `conversion.json` records how a result was made. `SHA256SUMS`
lists all files of a result: a file that is not listed, or whose hash differs, belongs to somebody else and stops the run.
"""

import errno
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from filelock import FileLock, Timeout

from .. import __version__
from .atomic import write_text
from .errors import UserError
from .file_moves import arrival_order, delete_all, departure_order, move, move_all
from .folder_checks import LOCK_NAME, entries, is_record, real_path, refuse_overlap, refuse_unlisted, same_folder
from .hashes import SUMS_NAME, hash_file, read_sums, write_sums
from .json_files import json_text


RECORD_NAME = "conversion.json"
# a run first writes the files whose names it does not know in advance into this folder
STAGE_NAME = ".stage"
# an interrupted run leaves these files in the partial folder, beside the files that SHA256SUMS lists there
TRANSIENT = re.compile(
    r"\.lock|\.stage|((model|mtp)(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?|conversion\.json|SHA256SUMS)(\.\d+\.part)?"
)
# after these errors of a rename the files are moved one by one: the folder is a mount point, lies on another file system,
# or its parent is not writable
CANNOT_RENAME = (errno.EBUSY, errno.EXDEV, errno.EACCES, errno.EPERM, errno.EROFS)


def record_text(recipe: dict[str, Any], **more: str) -> str:
    """Returns the text of `conversion.json`: the package's version, the recipe, and more entries that identify a run."""
    return json_text({"modeling_moe_version": __version__, "recipe": recipe, **more})


class ResultFolder:
    """A folder that one run writes whole or not at all.

    Creating the object changes nothing on disk; it raises the errors that can be found before anything is read or written.

    Args:
        output_dir: path that the user gave; links are followed, so the result appears where the user looks for it.
        overwrite: whether to replace the result of an earlier run.
        sources: folders that the run reads.

    Raises:
        UserError: if `output_dir` is a file, is not empty and may not be replaced, holds a file that no run wrote, or
            contains or lies in a source; or if `.NAME.partial` or `.NAME.replaced` was not made by a run.
    """

    def __init__(self, output_dir: str | Path, overwrite: bool = False, sources: Sequence[str | Path] = ()):
        self.path, self.overwrite = real_path(output_dir), overwrite
        if not self.path.name:
            raise UserError(f"output_dir {output_dir} is the root of all files: name a folder in it")
        parent = self.path if _must_stay(self.path) else self.path.parent
        self.partial = parent / f".{self.path.name}.partial"
        self.replaced = parent / f".{self.path.name}.replaced"
        for folder in (self.path, self.partial, self.replaced):
            for source in sources:
                refuse_overlap(folder, source)
        self._refuse_foreign_partial()
        self._seen: dict[str, tuple[int, int, int]] = {}
        if not os.path.lexists(self.replaced):
            self._refuse_occupied()

    @contextmanager
    def writing(self) -> Iterator[Path]:
        """Locks and yields the partial folder; at the end, folders that are still empty are removed.

        Raises:
            UserError: if another process writes the same result.
        """
        made = [folder for folder in (self.partial, *self.partial.parents) if not folder.exists()]
        self.partial.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.partial / LOCK_NAME)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            raise UserError(
                f"output_dir {self.path} is being written by another process: wait for it, or choose another"
            ) from None
        try:
            self._recover()
            self._refuse_occupied()
            yield self.partial
        finally:
            (self.partial / LOCK_NAME).unlink(missing_ok=True)
            lock.release()
            for folder in (self.partial, *made):
                if folder.is_dir() and not any(folder.iterdir()):
                    folder.rmdir()

    def seal(self, sums: dict[str, str]) -> None:
        """Moves the stage's files into the partial folder and lists all files in `SHA256SUMS`.

        Args:
            sums: hashes of the files that are already in the partial folder, without `conversion.json`.
        """
        stage = self.partial / STAGE_NAME
        staged = (
            [str(file.relative_to(stage)) for file in stage.rglob("*") if file.is_file()] if stage.is_dir() else []
        )
        sums = sums | {name: hash_file(stage / name) for name in staged}
        write_sums(self.partial, sums | {RECORD_NAME: hash_file(self.partial / RECORD_NAME)})
        for name in staged:
            move(stage / name, self.partial / name)
        shutil.rmtree(stage, ignore_errors=True)
        for file in self.partial.rglob("*"):
            if file.is_file():
                with open(file, "rb") as stream:
                    os.fsync(stream.fileno())

    def clear(self, but: Iterable[str] = ()) -> None:
        """Deletes the files that this run, or an interrupted run of this package, left in the partial folder.

        Args:
            but: names of files that stay; if there are any, `conversion.json` stays too.
        """
        shutil.rmtree(self.partial / STAGE_NAME, ignore_errors=True)
        kept = {LOCK_NAME, *but, *([RECORD_NAME] if but else [])}
        names = {*read_sums(self.partial), *(file.name for file in self.partial.iterdir() if not file.is_dir())}
        delete_all(self.partial, sorted(names - kept))

    def commit(self) -> None:
        """Replaces the result folder by the sealed partial folder.

        Raises:
            UserError: if the result folder was changed since this run checked it.
        """
        now = self._snapshot()
        if now != self._seen:
            name = min(name for name in {*now, *self._seen} if now.get(name) != self._seen.get(name))
            raise UserError(
                f"{self.path / name} was changed while the new result was written, which stays in {self.partial}: move "
                "the changed file away and give the same command again"
            )
        if self.partial.parent == self.path:
            self._fill()
            return
        try:
            if self.path.exists():
                shutil.copymode(self.path, self.partial)
                try:
                    self.path.rename(self.replaced)
                except OSError as error:
                    if error.errno not in CANNOT_RENAME:
                        raise
                    self._fill()
                    return
            self.partial.rename(self.path)
            (self.path / LOCK_NAME).unlink()
        finally:
            if self.replaced.exists() and not self.path.exists():
                self.replaced.rename(self.path)
        self._discard_replaced()

    def _fill(self) -> None:
        """Moves the files one by one if the folder cannot be renamed; after a kill, another run continues here.

        The old `SHA256SUMS` leaves last and the new one arrives last, so they show how far the run came. The configuration
        leaves first and arrives after the weights: an incomplete folder does not load.
        """
        self.replaced.mkdir(exist_ok=True)
        if old := read_sums(self.path):
            move_all(self.path, self.replaced, sorted(old, key=departure_order))
        move_all(self.partial, self.path, sorted(read_sums(self.partial), key=arrival_order))
        self._discard_replaced()

    def _discard_replaced(self) -> None:
        """Deletes the earlier result, after the new one is in place."""
        if not self.replaced.exists():
            return
        delete_all(self.replaced, [*read_sums(self.replaced), LOCK_NAME, SUMS_NAME])
        if self.replaced.exists():
            raise UserError(f"{self.path} is written, but files that no run wrote lie in {self.replaced}: move them")

    def _recover(self) -> None:
        """Finishes or undoes the replacement of an earlier result during which a run was killed."""
        if not os.path.lexists(self.replaced):
            return
        refuse_unlisted(self.replaced, read_sums(self.replaced) or read_sums(self.path))
        if not self.path.exists():
            self.replaced.rename(self.path)
        elif RECORD_NAME in read_sums(self.partial) and not (self.partial / STAGE_NAME).exists():
            self._fill()
        elif is_record(self.path / RECORD_NAME) or not any(self.replaced.iterdir()):
            self._discard_replaced()
        else:
            raise UserError(f"{self.replaced} holds an older result, {self.path} other files: move one of them away")

    def _refuse_occupied(self) -> None:
        """Refuses a result folder that may not be replaced, and remembers the content that may be."""
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"output_dir {self.path} is a file: choose another")
        found = self._snapshot()
        if found and not self.overwrite:
            raise UserError(
                f"output_dir {self.path} is not empty: choose another, or pass --overwrite to replace what an earlier run "
                "wrote there"
            )
        if found and found != self._seen:
            sums = read_sums(self.path) if is_record(self.path / RECORD_NAME) else {}
            refuse_unlisted(self.path, sums, (self.partial, self.replaced))
        self._seen = found

    def _refuse_foreign_partial(self) -> None:
        """Refuses a partial or replaced folder that holds files which no run of this package wrote."""
        for folder in (self.partial, self.replaced):
            if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
                raise UserError(f"{folder} is no folder that a run of this package made: move it away")
        if not self.partial.exists():
            return
        names = sorted(file.name for file in self.partial.iterdir())
        sums = {}
        if is_record(self.partial / RECORD_NAME) or self._is_nearly_filled():
            sums = {PurePosixPath(name).parts[0] for name in read_sums(self.partial)}
        elif foreign := [name for name in names if not name.startswith((LOCK_NAME, f"{RECORD_NAME}."))]:
            raise UserError(f"{self.partial} holds {foreign[0]} and no {RECORD_NAME} of this package: move it away")
        for name in names:
            if (self.partial / name).is_symlink() or (name not in sums and not TRANSIENT.fullmatch(name)):
                raise UserError(f"{self.partial} holds {name}, which no run of this package wrote: move it away")

    def _is_nearly_filled(self) -> bool:
        """Returns whether a run was killed when only `SHA256SUMS` was left to be moved into the result folder."""
        record = self.path / RECORD_NAME
        return (
            self.replaced.is_dir()
            and is_record(record)
            and read_sums(self.partial).get(RECORD_NAME) == hash_file(record)
        )

    def _snapshot(self) -> dict[str, tuple[int, int, int]]:
        """Returns size, time and inode of every file in the result folder, without the folders of the run."""
        return {
            str(file.relative_to(self.path)): (file.lstat().st_size, file.lstat().st_mtime_ns, file.lstat().st_ino)
            for file in entries(self.path, (self.partial, self.replaced))
        }


@contextmanager
def whole_folder(output_dir: str | Path, recipe: dict[str, Any], overwrite: bool = False) -> Iterator[Path]:
    """Yields an empty folder; its files replace those of `output_dir` if the block succeeds, and are deleted if it fails.

    Args:
        output_dir: folder that is written whole or not at all.
        recipe: how the files were made, in JSON's types; it is kept in `conversion.json`.
        overwrite: whether to replace the result of an earlier run.

    Raises:
        UserError: as [`ResultFolder`].
    """
    folder = ResultFolder(output_dir, overwrite)
    with folder.writing() as partial:
        folder.clear()
        try:
            write_text(partial / RECORD_NAME, record_text(recipe))
            (partial / STAGE_NAME).mkdir()
            yield partial / STAGE_NAME
            folder.seal({})
        except BaseException:
            folder.clear()
            raise
        folder.commit()


def _must_stay(path: Path) -> bool:
    """Returns whether a folder must not be renamed.

    That holds for a mount point, for a folder in which this process works, and for a folder whose parent is not writable.
    """
    if not path.is_dir():
        return False
    working = Path(os.getcwd())
    return (
        os.path.ismount(path)
        or path.stat().st_dev != path.parent.stat().st_dev
        or any(same_folder(folder, path) for folder in (working, *working.parents))
        or not os.access(path.parent, os.W_OK)
        or (path / f".{path.name}.partial").is_dir()
    )
