# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""A result folder is written whole or not at all, and replaces nothing but what an earlier run of this package wrote.

A run writes into `.NAME.partial` beside the folder NAME, or in it where NAME cannot be renamed. What the folder held moves
to `.NAME.replaced` until the result is in place. `conversion.json` says how a result was made, and `SHA256SUMS` lists all
of its files: a file that is not listed, or differs from its hash, is somebody else's and stops the run.
"""

import errno
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from filelock import FileLock, Timeout

from .. import __version__
from .atomic import write_text
from .errors import UserError
from .hashes import SUMS_NAME, hash_file, read_sums, write_sums
from .progress import byte_progress


RECORD_NAME = "conversion.json"
LOCK_NAME = ".lock"
# where a run puts files whose names are not known before they are there
STAGE_NAME = ".stage"
# what an interrupted run leaves in the partial folder, beside the files that its SHA256SUMS lists
TRANSIENT = re.compile(
    r"\.lock|\.stage|(model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?|conversion\.json|SHA256SUMS)(\.\d+\.part)?"
)
# bytes that take so long to read that a progress bar says so
SHOWN = 10**9
# errors of a rename that moving the files one by one avoids: a mount point, another file system, a folder that is closed
CANNOT_RENAME = (errno.EBUSY, errno.EXDEV, errno.EACCES, errno.EPERM, errno.EROFS)


def refuse_overlap(output_dir: str | Path, source: str | Path, name: str = "model_name_or_path") -> None:
    """Refuses a folder to write that is a folder to read, contains it, or lies in it, through links and `..` too.

    Args:
        output_dir: to be written; it need not exist.
        source: folder or file to be read; a name that is no path here is another machine's and passes.
        name: of the argument that gave `source`, for the message.

    Raises:
        UserError: if one contains the other.
    """
    source = os.path.expanduser(source)
    if not os.path.exists(source):
        return
    output, read = _real(output_dir), Path(os.path.realpath(source))
    for inner, outer in ((output, read), (read, output)):
        if any(_same(folder, outer) for folder in (inner, *inner.parents)):
            raise UserError(
                f"output_dir {output_dir} and {name} {source} contain each other: choose another output_dir"
            )


def refuse_foreign(folder: str | Path, patterns: Iterable[str], remedy: str = "choose another output_dir") -> None:
    """Refuses a folder that holds something else than a command of this package puts there, before it is overwritten.

    Args:
        folder: to be overwritten; one that does not exist, or is empty, passes.
        patterns: shell patterns of the names that the command writes into it, files and folders, such as `checkpoint-*`.
        remedy: end of the message.

    Raises:
        UserError: names the first file or folder that no pattern matches.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output_dir {folder} is a file: {remedy}")
    patterns = list(patterns)
    for entry in sorted(folder.iterdir()) if folder.is_dir() else ():
        if entry.is_symlink() or not any(fnmatch(entry.name, pattern) for pattern in patterns):
            raise UserError(f"output_dir {folder} holds {entry.name}, which --overwrite must not delete: {remedy}")


def describe(recipe: dict, **more: str) -> str:
    """The text of `conversion.json`: recipe and version, and what else tells one run from another."""
    return json.dumps({"modeling_moe_version": __version__, "recipe": recipe, **more}, indent=2) + "\n"


class ResultFolder:
    """A folder that one run writes whole or not at all, see the module.

    Making it changes nothing, and refuses what can be refused before anything is read or written.

    Args:
        output_dir: as the user named it; links are followed, so that the result lies where the user looks for it.
        overwrite: replace what an earlier run wrote there.
        sources: folders that the run reads.

    Raises:
        UserError: if `output_dir` is a file, is not empty and may not be replaced, holds something that no run wrote, or
            contains or lies in a source; or if `.NAME.partial` or `.NAME.replaced` is somebody else's.
    """

    def __init__(self, output_dir: str | Path, overwrite: bool = False, sources: Sequence[str | Path] = ()):
        self.path, self.overwrite = _real(output_dir), overwrite
        if not self.path.name:
            raise UserError(f"output_dir {output_dir} is the root of all files: name a folder in it")
        where = self.path if _stays(self.path) else self.path.parent
        self.partial = where / f".{self.path.name}.partial"
        self.replaced = where / f".{self.path.name}.replaced"
        for folder in (self.path, self.partial, self.replaced):
            for source in sources:
                refuse_overlap(folder, source)
        self._refuse_foreign_partial()
        self._seen: dict[str, tuple[int, int, int]] = {}
        if not os.path.lexists(self.replaced):
            self._refuse_occupied()

    @contextmanager
    def writing(self) -> Iterator[Path]:
        """Yields the partial folder, which no other process writes meanwhile; what is empty in the end is removed.

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
        """Moves the stage's files into the partial folder, and lists all files in `SHA256SUMS`.

        Args:
            sums: hashes of the files that the partial folder holds already, `conversion.json` left out.
        """
        stage = self.partial / STAGE_NAME
        staged = (
            [str(file.relative_to(stage)) for file in stage.rglob("*") if file.is_file()] if stage.is_dir() else []
        )
        sums = sums | {name: hash_file(stage / name) for name in staged}
        write_sums(self.partial, sums | {RECORD_NAME: hash_file(self.partial / RECORD_NAME)})
        for name in staged:
            _move(stage / name, self.partial / name)
        shutil.rmtree(stage, ignore_errors=True)
        for file in self.partial.rglob("*"):
            if file.is_file():
                with open(file, "rb") as stream:
                    os.fsync(stream.fileno())

    def clear(self, but: Iterable[str] = ()) -> None:
        """Deletes what this run, or an interrupted one of this package, left in the partial folder.

        Args:
            but: names of files that stay, and `conversion.json` then stays too.
        """
        shutil.rmtree(self.partial / STAGE_NAME, ignore_errors=True)
        kept = {LOCK_NAME, *but, *([RECORD_NAME] if but else [])}
        names = {*read_sums(self.partial), *(file.name for file in self.partial.iterdir() if not file.is_dir())}
        _delete(self.partial, sorted(names - kept))

    def commit(self) -> None:
        """Puts the sealed partial folder in place of the result folder.

        Raises:
            UserError: if somebody changed the result folder since it was looked at.
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
        """Moves files one by one where the folder cannot be renamed; a run that is killed here goes on here.

        The old SHA256SUMS leaves last and the new one comes last, so that they tell how far it is. The configuration
        leaves first and comes after the weights: a folder that is not whole does not load.
        """
        self.replaced.mkdir(exist_ok=True)
        if old := read_sums(self.path):
            _move_all(self.path, self.replaced, sorted(old, key=_leaves))
        _move_all(self.partial, self.path, sorted(read_sums(self.partial), key=_arrives))
        self._discard_replaced()

    def _discard_replaced(self) -> None:
        if not self.replaced.exists():
            return
        _delete(self.replaced, [*read_sums(self.replaced), LOCK_NAME, SUMS_NAME])
        if self.replaced.exists():
            raise UserError(f"{self.path} is written, but files that no run wrote lie in {self.replaced}: move them")

    def _recover(self) -> None:
        """Ends what a run began that was killed while it replaced an older result."""
        if not os.path.lexists(self.replaced):
            return
        refuse_unlisted(self.replaced, read_sums(self.replaced) or read_sums(self.path))
        if not self.path.exists():
            self.replaced.rename(self.path)
        elif RECORD_NAME in read_sums(self.partial) and not (self.partial / STAGE_NAME).exists():
            self._fill()
        elif _is_record(self.path / RECORD_NAME) or not any(self.replaced.iterdir()):
            self._discard_replaced()
        else:
            raise UserError(f"{self.replaced} holds an older result, {self.path} other files: move one of them away")

    def _refuse_occupied(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"output_dir {self.path} is a file: choose another")
        found = self._snapshot()
        if found and not self.overwrite:
            raise UserError(
                f"output_dir {self.path} is not empty: choose another, or pass --overwrite to replace what an earlier run "
                "wrote there"
            )
        if found and found != self._seen:
            sums = read_sums(self.path) if _is_record(self.path / RECORD_NAME) else {}
            refuse_unlisted(self.path, sums, (self.partial, self.replaced))
        self._seen = found

    def _refuse_foreign_partial(self) -> None:
        for folder in (self.partial, self.replaced):
            if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
                raise UserError(f"{folder} is no folder that a run of this package made: move it away")
        if not self.partial.exists():
            return
        names = sorted(file.name for file in self.partial.iterdir())
        sums = {}
        if _is_record(self.partial / RECORD_NAME) or self._is_nearly_filled():
            sums = {PurePosixPath(name).parts[0] for name in read_sums(self.partial)}
        elif foreign := [name for name in names if not name.startswith((LOCK_NAME, f"{RECORD_NAME}."))]:
            raise UserError(f"{self.partial} holds {foreign[0]} and no {RECORD_NAME} of this package: move it away")
        for name in names:
            if (self.partial / name).is_symlink() or (name not in sums and not TRANSIENT.fullmatch(name)):
                raise UserError(f"{self.partial} holds {name}, which no run of this package wrote: move it away")

    def _is_nearly_filled(self) -> bool:
        """Whether a run was killed when `SHA256SUMS` alone was left to be moved into the result folder."""
        record = self.path / RECORD_NAME
        return (
            self.replaced.is_dir()
            and _is_record(record)
            and read_sums(self.partial).get(RECORD_NAME) == hash_file(record)
        )

    def _snapshot(self) -> dict[str, tuple[int, int, int]]:
        """Size, time and inode of what lies in the result folder, the run's own folders left out."""
        return {
            str(file.relative_to(self.path)): (file.lstat().st_size, file.lstat().st_mtime_ns, file.lstat().st_ino)
            for file in _entries(self.path, (self.partial, self.replaced))
        }


@contextmanager
def whole_folder(output_dir: str | Path, recipe: dict, overwrite: bool = False) -> Iterator[Path]:
    """Yields an empty folder whose files become those of `output_dir` if the block succeeds, and are deleted if not.

    Args:
        output_dir: written whole or not at all.
        recipe: how the files were made, in JSON's types; kept in `conversion.json`.
        overwrite: replace what an earlier run wrote there.

    Raises:
        UserError: see [`ResultFolder`].
    """
    folder = ResultFolder(output_dir, overwrite)
    with folder.writing() as partial:
        folder.clear()
        try:
            write_text(partial / RECORD_NAME, describe(recipe))
            (partial / STAGE_NAME).mkdir()
            yield partial / STAGE_NAME
            folder.seal({})
        except BaseException:
            folder.clear()
            raise
        folder.commit()


def refuse_unlisted(folder: Path, sums: dict[str, str], but: Sequence[Path] = ()) -> None:
    """Refuses a folder with a file that its hashes do not prove to be a run's.

    Args:
        folder: all that lies in it is looked at, and listed files are read.
        sums: names to SHA-256 in hex.
        but: folders to leave out.

    Raises:
        UserError: names the first that is not listed or differs.
    """
    parents = {str(parent) for name in sums for parent in PurePosixPath(name).parents}
    listed = []
    for file in _entries(folder, but):
        name = file.relative_to(folder).as_posix()
        if file.is_symlink() or (name not in parents if file.is_dir() else name not in sums and name != SUMS_NAME):
            raise UserError(
                f"{folder} holds {name}, which no run of this package wrote: move it, or choose another folder"
            )
        listed += [name] if name in sums else []
    nbytes = sum((folder / name).stat().st_size for name in listed)
    with byte_progress("checking", nbytes, show=nbytes > SHOWN) as advance:
        for name in listed:
            if hash_file(folder / name, advance) != sums[name]:
                raise UserError(
                    f"{folder / name} was changed after a run of this package wrote it: move it, or choose another folder"
                )


def _entries(folder: Path, but: Sequence[Path] = ()) -> Iterator[Path]:
    """What lies in a folder, in the folders in it too, links not followed."""
    if not folder.is_dir():
        return
    for entry in sorted(folder.iterdir()):
        if entry not in but and not _is_lock(entry):
            yield entry
            if entry.is_dir() and not entry.is_symlink():
                yield from _entries(entry)


def _is_lock(file: Path) -> bool:
    """Whether a file is the lock of a run that was killed; it is empty."""
    return file.name == LOCK_NAME and not file.is_symlink() and file.is_file() and not file.stat().st_size


def _real(output_dir: str | Path) -> Path:
    if not str(output_dir):
        raise UserError("output_dir is empty: name a folder")
    # a recipe's `~` meets no shell
    return Path(os.path.realpath(os.path.expanduser(output_dir)))


def _same(first: Path, second: Path) -> bool:
    """Whether two paths are one folder; a mount can give it two."""
    return first == second or (first.exists() and second.exists() and os.path.samefile(first, second))


def _stays(path: Path) -> bool:
    """Whether a folder must not be renamed: a mount point, one that a process stands in, or one in a closed folder."""
    if not path.is_dir():
        return False
    working = Path(os.getcwd())
    return (
        os.path.ismount(path)
        or path.stat().st_dev != path.parent.stat().st_dev
        or any(_same(folder, path) for folder in (working, *working.parents))
        or not os.access(path.parent, os.W_OK)
        or (path / f".{path.name}.partial").is_dir()
    )


def _is_record(file: Path) -> bool:
    """Whether a file is a `conversion.json` of this package."""
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(record, dict) and isinstance(record.get("recipe"), dict) and "modeling_moe_version" in record


def _arrives(name: str) -> tuple[int, str]:
    """Order in which a result's files come: what makes a folder a model last."""
    last = ("model.safetensors.index.json", "config.json", RECORD_NAME)
    return (last.index(name) if name in last else -1, name)


def _leaves(name: str) -> tuple[int, str]:
    """Order in which a result's files leave: what makes a folder a model first."""
    first = ("config.json", "model.safetensors.index.json")
    return (first.index(name) if name in first else len(first), name)


def _move(source: Path, target: Path) -> None:
    """Moves a file; between file systems it is copied under another name first, so that it is whole or not there."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.replace(source, target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        shutil.copy2(source, target.with_name(f".{target.name}.moving"))
        os.replace(target.with_name(f".{target.name}.moving"), target)
        source.unlink()


def _move_all(source: Path, target: Path, names: Sequence[str]) -> None:
    """Moves files in this order, and removes the folders that are empty then.

    `SHA256SUMS` moves last, since after a kill it alone tells whose the files and folders are that are still there.
    """
    for name in names:
        if (source / name).exists():
            _move(source / name, target / name)
    _remove_empty(source, names)
    if (source / SUMS_NAME).exists():
        _move(source / SUMS_NAME, target / SUMS_NAME)
    _remove_empty(source, ())


def _delete(folder: Path, names: Sequence[str]) -> None:
    """Deletes files of a folder, the folders that are empty then, and `SHA256SUMS` last, see [`_move_all`]."""
    for name in sorted(names, key=_leaves):
        if name != SUMS_NAME:
            (folder / name).unlink(missing_ok=True)
    _remove_empty(folder, names)
    if SUMS_NAME in names:
        (folder / SUMS_NAME).unlink(missing_ok=True)
    _remove_empty(folder, ())


def _remove_empty(folder: Path, names: Iterable[str]) -> None:
    """Removes the folders that held these files, and `folder`, where nothing is left in them."""
    parents = {folder / parent for name in names for parent in PurePosixPath(name).parents}
    for parent in sorted({folder, *parents}, key=lambda path: -len(path.parts)):
        if parent.is_dir() and not any(parent.iterdir()):
            parent.rmdir()
