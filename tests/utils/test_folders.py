"""A result replaces only what an earlier run of this package wrote, wherever the user wants the result."""

import errno
import json
import os
import subprocess
import threading
from pathlib import Path

import pytest
import torch

from modeling_moe.checkpoints import LazyTensor, write_checkpoint
from modeling_moe.utils import file_moves, folders
from modeling_moe.utils.errors import UserError
from modeling_moe.utils.folder_checks import refuse_foreign
from modeling_moe.utils.folders import ResultFolder, whole_folder
from tests.builders import add_small_files, folder_contents


def write(folder, value: float = 1.0, **options) -> None:
    """Writes two shards and three small files."""
    state = {name: LazyTensor.of(torch.full((100,), float(value))) for name in "ab"}
    write_checkpoint(
        folder, state, {"value": float(value)}, add_small_files, max_shard_size=400, progress=False, **options
    )


@pytest.fixture
def expected(tmp_path_factory):
    """Returns the files of an undisturbed `write(..., value)` for the values 1 and 2."""
    folder = tmp_path_factory.mktemp("expected")
    for value in (1, 2):
        write(folder / str(value), value)
    return {value: folder_contents(folder / str(value)) for value in (1, 2)}


@pytest.fixture
def out(tmp_path):
    return tmp_path / "work" / "out"


def test_every_file_of_a_result_is_listed_with_its_hash(out):
    write(out)
    listed = {line.split("  ")[1] for line in (out / "SHA256SUMS").read_text().splitlines()}
    assert listed == folder_contents(out).keys() - {"SHA256SUMS"}
    assert subprocess.run(["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=out, check=False).returncode == 0


def test_overwrite_replaces_what_a_run_wrote(out, expected):
    write(out, 1)
    write(out, 2, overwrite=True)
    assert folder_contents(out) == expected[2]
    assert [file.name for file in out.parent.iterdir()] == ["out"]


FOREIGN = {
    "a file": lambda out: (out / "thesis.tex").write_text("x"),
    "a hidden file": lambda out: (out / ".env").write_text("x"),
    "a card": lambda out: (out / "README.md").write_text("x"),
    "an empty folder": lambda out: (out / "notes").mkdir(),
    "a file in a folder of the result": lambda out: (out / "templates" / "mine.jinja").write_text("x"),
    "a link in the place of a listed file": lambda out: _link(out / "config.json"),
    "a link": lambda out: (out / "data").symlink_to("/tmp"),
    "a changed configuration": lambda out: (out / "config.json").write_text('{"edited": 1}'),
    "trained weights": lambda out: _flip(out / "model-00001-of-00002.safetensors"),
    "a checkpoint": lambda out: (out / "checkpoint-7").mkdir(),
    "no record": lambda out: (out / "conversion.json").unlink(),
    "another's record": lambda out: (out / "conversion.json").write_text('{"recipe": 1}'),
    "no hashes": lambda out: (out / "SHA256SUMS").unlink(),
    "somebody's hashes": lambda out: (out / "SHA256SUMS").write_text(""),
}


def _link(file: Path) -> None:
    file.rename(file.parent.parent / "elsewhere.json")
    file.symlink_to("../elsewhere.json")


def _flip(file: Path) -> None:
    data, stat = bytearray(file.read_bytes()), file.stat()
    data[-1] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize("name", FOREIGN)
def test_overwrite_deletes_nothing_that_no_run_wrote(out, name):
    write(out)
    FOREIGN[name](out)
    before = folder_contents(out.parent)
    with pytest.raises(
        UserError, match=r"no run of this package wrote|was changed after a run|that sha256sum did not"
    ):
        write(out, 2, overwrite=True)
    assert folder_contents(out.parent) == before


def test_overwrite_does_not_delete_a_folder_of_other_things(out):
    out.mkdir(parents=True)
    (out / "photos").mkdir()
    (out / "photos" / "1.jpg").write_text("x")
    with pytest.raises(UserError, match=r"holds photos, which no run of this package wrote"):
        write(out, overwrite=True)
    assert folder_contents(out.parent) == {"out/photos/1.jpg": b"x"}


def test_hashes_that_name_files_elsewhere_delete_nothing(out):
    precious = out.parent.parent / "precious"
    precious.write_text("x")
    partial = out.parent / ".out.partial"
    partial.mkdir(parents=True)
    (partial / "conversion.json").write_text('{"recipe": {}, "modeling_moe_version": "1"}')
    (partial / "SHA256SUMS").write_text(f"{'0' * 64}  ../../precious\n")
    with pytest.raises(UserError, match="precious"):
        write(out, overwrite=True)
    assert precious.exists()


@pytest.mark.parametrize("what", ["partial", "replaced"])
@pytest.mark.parametrize("kind", ["folder", "file", "link", "beside a record"])
def test_a_hidden_folder_of_somebody_else_is_not_deleted(out, what, kind):
    hidden = out.parent / f".out.{what}"
    hidden.parent.mkdir()
    if kind == "file":
        hidden.write_text("mine")
    elif kind == "link":
        (out.parent / "mine").mkdir()
        (out.parent / "mine" / "notes").write_text("mine")
        hidden.symlink_to("mine")
    else:
        if kind == "beside a record":
            write(hidden)
        hidden.mkdir(exist_ok=True)
        (hidden / "notes").write_text("mine")
    before = folder_contents(out.parent)
    for overwrite in (False, True):
        with pytest.raises(UserError, match=rf"\.out\.{what}"):
            write(out, overwrite=overwrite)
        assert folder_contents(out.parent) == before


@pytest.mark.parametrize(
    "place", ["source", "source/out", ".", "source/../source", "link", "link/out", "source/", "./link/../source"]
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_source_and_result_that_contain_each_other_are_refused(tmp_path, place, overwrite, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "source")
    Path("link").symlink_to("source")
    before = folder_contents(tmp_path)
    with pytest.raises(UserError, match=r"contain each other: choose another output_dir"):
        write(place, 2, overwrite=overwrite, sources=[Path("source")])
    assert folder_contents(tmp_path) == before


def test_a_source_in_the_hidden_folder_is_refused(out):
    write(out.parent / ".out.partial")
    with pytest.raises(UserError, match="contain each other"):
        write(out, 2, sources=[out.parent / ".out.partial"], overwrite=True)


@pytest.mark.parametrize("name", ["link", "work/out/../out", "work/out/", "./work/new/../out", "."])
@pytest.mark.parametrize("old", [None, "empty", "result"])
def test_result_lands_in_the_folder_that_the_user_named(tmp_path, out, name, old, expected, monkeypatch):
    if old == "result":
        write(out)
    elif old == "empty" or name == ".":
        out.mkdir(parents=True)
    (tmp_path / "link").symlink_to("work/out")
    monkeypatch.chdir(out if name == "." else tmp_path)
    inode = out.stat().st_ino if name == "." else None
    write(name, 2, overwrite=old == "result")
    assert folder_contents(out) == expected[2]
    assert (tmp_path / "link").is_symlink()
    assert sorted(file.name for file in out.parent.iterdir()) == ["out"]
    assert inode in (None, out.stat().st_ino)


def test_a_tilde_in_a_recipe_is_the_home_folder(tmp_path, expected, monkeypatch):
    """`output_dir: ~/out` in a recipe names the home folder, and makes no folder called `~`."""
    home = tmp_path / "home"
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path)
    write("~/out", 1)
    assert folder_contents(home / "out") == expected[1]
    with pytest.raises(UserError, match="contain each other"):
        ResultFolder(home / "out" / "x", sources=["~/out"])
    assert not (tmp_path / "~").exists()


def test_root_and_files_are_no_output_dir(tmp_path):
    (tmp_path / "file").write_text("x")
    for name, message in (("/", "root of all files"), ("", "output_dir is empty"), (tmp_path / "file", "is a file")):
        with pytest.raises(UserError, match=message):
            write(name, overwrite=True)


@pytest.fixture
def mount(tmp_path):
    """Returns a folder that is a mount point of another file system."""
    folder = tmp_path / "volume"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], capture_output=True, check=False)
    if made.returncode:
        pytest.skip("needs the right to mount a file system")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_result_lands_in_a_mount_point(mount, expected):
    write(mount, 1)
    assert folder_contents(mount) == expected[1]
    write(mount, 2, overwrite=True)
    assert folder_contents(mount) == expected[2]
    assert [file.name for file in mount.parent.iterdir()] == ["volume"]


@pytest.fixture
def unmovable(monkeypatch, out):
    """Makes the rename of the result folder fail, as for a bind mount, which cannot be detected in advance."""
    rename, real_replace = Path.rename, os.replace

    def refuse(path, target):
        if out in (path, Path(target)):
            raise OSError(errno.EBUSY, "Device or resource busy")
        return rename(path, target)

    def other_device(source, target):
        if (out in Path(source).parents) != (out in Path(target).parents):
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        return real_replace(source, target)

    monkeypatch.setattr(Path, "rename", refuse)
    monkeypatch.setattr(os, "replace", other_device)


@pytest.mark.usefixtures("unmovable")
@pytest.mark.parametrize("old", ["empty", "result"])
def test_result_lands_in_a_folder_that_cannot_be_renamed(out, expected, old):
    out.mkdir(parents=True)
    if old == "result":
        write(out, 1)
    write(out, 2, overwrite=True)
    assert folder_contents(out) == expected[2]
    assert [file.name for file in out.parent.iterdir()] == ["out"]


def dies_at(step: int, out: Path) -> bool:
    """Writes result 2 over result 1 in a process that dies before a step; returns whether the process died.

    A step is a rename, a move or a deletion of a file or folder, counted from the moment the new result is complete.
    """
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1] != 0
    count, seal = 0, ResultFolder.seal

    def counted(function):
        def wrapped(*args, **kwargs):
            nonlocal count
            count += 1
            if count > step:
                os._exit(9)
            return function(*args, **kwargs)

        return wrapped

    def sealed(self, sums):
        seal(self, sums)
        file_moves.move = counted(file_moves.move)
        for name in ("rename", "unlink", "mkdir", "rmdir"):
            setattr(Path, name, counted(getattr(Path, name)))

    try:
        ResultFolder.seal = sealed
        write(out, 2, overwrite=True)
    except BaseException:
        os._exit(7)
    os._exit(0)


@pytest.mark.parametrize("rename", [True, False])
@pytest.mark.parametrize("old", [True, False])
def test_a_kill_during_the_replacement_loses_no_result(tmp_path, expected, monkeypatch, rename, old):
    """After a kill at any step both results still exist, and the same command then succeeds."""
    monkeypatch.setattr(folders, "_must_stay", lambda path: path.is_dir() and not rename)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    died, found = True, []
    while died:
        out = tmp_path / str(len(found)) / "out"
        out.mkdir(parents=True)
        if old:
            write(out, 1)
        died = dies_at(len(found), out)
        held = [data for data in folder_contents(out.parent).values() if data]
        assert all(data in held for data in expected[2].values())
        if old and not (out / "config.json").exists():
            assert all(data in held for data in expected[1].values())
        found.append(
            {name: data for name, data in folder_contents(out).items() if data and not name.startswith(".out.")}
        )
        write(out, 2, overwrite=True)
        assert folder_contents(out) == expected[2]
        assert [file.name for file in out.parent.iterdir()] == ["out"]
    assert len(found) > (4 if rename else 10)
    assert found[-1] == expected[2]
    if old:
        assert found[0] == expected[1]


def test_a_file_that_comes_while_the_result_is_written_is_kept(out, expected):
    write(out, 1)

    def busy(folder):
        add_small_files(folder)
        (out / "thesis.tex").write_text("x")

    state = {name: LazyTensor.of(torch.full((100,), 2.0)) for name in "ab"}
    with pytest.raises(UserError, match=r"thesis\.tex was changed while the new result was written"):
        write_checkpoint(out, state, {"value": 2.0}, busy, True, 400, False)
    assert folder_contents(out) == expected[1] | {"thesis.tex": b"x"}
    (out / "thesis.tex").unlink()
    write(out, 2, overwrite=True)
    assert folder_contents(out).keys() == expected[2].keys()


def test_two_processes_cannot_write_one_result(out, expected):
    waiting, go = threading.Event(), threading.Event()

    def slow(folder):
        waiting.set()
        assert go.wait(30)
        add_small_files(folder)

    state = {name: LazyTensor.of(torch.full((100,), 1.0)) for name in "ab"}
    first = threading.Thread(target=write_checkpoint, args=(out, state, {"value": 1.0}, slow, False, 400, False))
    first.start()
    assert waiting.wait(30)
    with pytest.raises(UserError, match="is being written by another process"):
        write(out, 2, overwrite=True)
    go.set()
    first.join()
    assert folder_contents(out) == expected[1]


def test_whole_folder_is_there_or_not(out):
    def half(folder):
        (folder / "one.txt").write_text("half")
        raise RuntimeError

    with pytest.raises(RuntimeError), whole_folder(out, {"seed": 1}) as folder:
        half(folder)
    assert not out.parent.exists()
    for text in ("1", "2"):
        with whole_folder(out, {"seed": 1}, overwrite=True) as folder:
            (folder / "one.txt").write_text(text)
        assert (out / "one.txt").read_text() == text
    assert json.loads((out / "conversion.json").read_text())["recipe"] == {"seed": 1}
    (out / "two.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds two\.txt"), whole_folder(out, {}, overwrite=True):
        pytest.fail("it was let in")


def test_refuse_foreign_names_what_no_pattern_matches(tmp_path):
    refuse_foreign(tmp_path / "none", ["*.json"])
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "config.json").write_text("x")
    refuse_foreign(tmp_path, ["*.json", "checkpoint-*"])
    (tmp_path / "checkpoint-4").symlink_to("/tmp")
    with pytest.raises(UserError, match="holds checkpoint-4, which --overwrite must not delete"):
        refuse_foreign(tmp_path, ["*.json", "checkpoint-*"])
    with pytest.raises(UserError, match=r"holds checkpoint-3, "):
        refuse_foreign(tmp_path, ["*.json"])
