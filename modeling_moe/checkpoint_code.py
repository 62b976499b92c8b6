# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module saves the code of a user's router or model class in a checkpoint, or warns that the code is not saved."""

import ast
import importlib.util
import itertools
import json
import re
import shutil
import sys
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

from transformers.dynamic_module_utils import get_relative_import_files
from transformers.utils import logging
from transformers.utils.hub import cached_file

from .router_catalogue import ROUTERS, router_class


logger = logging.get_logger(__name__)

_HERE = Path(__file__).resolve().parent
# packages whose classes are not saved with a checkpoint
_LIBRARIES = {"builtins", "torch", "transformers", "peft", "accelerate", "typing", "deepspeed"}


# text that is added to the copy of router_catalogue.py; it imports late, because the user's file may import the model
_OWN_ROUTER = (
    "\n\ndef _own_router() -> type[Router]:\n    from .{file} import {cls}\n\n    return {cls}\n\n\n"
    "OWN_ROUTERS[{router_type!r}] = _own_router\n"
)


class _CannotTravel(ValueError):
    """Reports why a file would not run beside a checkpoint."""


def own_classes(model: Any) -> list[type]:
    """Returns the classes, base classes included, of a model and its router that neither this package nor a library defines."""
    classes = [*type(model).__mro__, *router_class(model.config).__mro__]
    return [cls for cls in dict.fromkeys(classes) if not _is_ours(cls)]


def _is_ours(cls: type) -> bool:
    if cls.__module__.partition(".")[0] in _LIBRARIES:
        return True
    file = getattr(sys.modules[cls.__module__], "__file__", None)
    return file is not None and Path(file).resolve().parent == _HERE


def name_own_router(config: Any) -> None:
    """Adds the file of a user's router to `config.auto_map`, if the file can be saved with a checkpoint."""
    router = router_class(config)
    if _is_ours(router):
        return
    try:
        file, _ = _travelling_file(router)
    except _CannotTravel:
        return  # `save_own_code` warns
    config.auto_map["MoERouter"] = f"{Path(file).stem}.{router.__name__}"


def _our_files() -> list[Path]:
    """Returns the files of this package that a checkpoint brings."""
    code = _HERE / "modeling_moe.py"
    return [code, *map(Path, get_relative_import_files(code))]


def save_own_code(model: Any, folder: str | Path) -> None:
    """Copies the files of a user's router and model class, and the files of this package, into a checkpoint's folder.

    A file can be copied if it imports only installed packages, and modules of this package by
    `from modeling_moe.MODULE import NAME`. A warning names each class whose file cannot be copied.

    Args:
        model: a model whose class or router is the user's.
        folder: the folder in which the model has been saved.
    """
    folder, sources = Path(folder), {}
    for file in _our_files():
        shutil.copyfile(file, folder / file.name)
    router = router_class(model.config)
    for cls in own_classes(model):
        try:
            name, source = _travelling_file(cls)
            if sources.setdefault(name, source) != source:
                raise _CannotTravel(f"two files that it needs are called {name}, so rename one")
        except _CannotTravel as reason:
            logger.warning(
                f"{cls.__name__} is saved without its code, so that nobody can load it who has not imported it: {reason}."
            )
            continue
        (folder / name).write_text(source, encoding="utf-8")
        if cls is router:
            with (folder / "router_catalogue.py").open("a", encoding="utf-8") as routers:
                fields = {"file": Path(name).stem, "cls": cls.__name__, "router_type": model.config.router_type}
                routers.write(_OWN_ROUTER.format(**fields))


def import_own_router(name_or_path: str | Path) -> None:
    """Runs the file that a checkpoint brings for its author's router, and adds the router to the catalogue.

    A process that has imported this package does not use the copy of it in a checkpoint. If you trust the checkpoint's code,
    call this function before you load the checkpoint.

    Args:
        name_or_path: folder or Hub name of the checkpoint.

    Raises:
        ValueError: if config.json names no file of a router.
    """
    config = json.loads(_file_of(name_or_path, "config.json").read_text(encoding="utf-8"))
    code = (config.get("auto_map") or {}).get("MoERouter")
    if code is None or not re.fullmatch(r"\w+\.\w+", code):
        raise ValueError(
            f"{name_or_path} brings no code of a router: import what registers {config.get('router_type')!r}."
        )
    module_name, _, class_name = code.rpartition(".")
    file = _file_of(name_or_path, f"{module_name}.py")
    # a module of this package, because its relative imports name modules of this package
    spec = importlib.util.spec_from_file_location(f"{__package__}.{module_name}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    ROUTERS[config["router_type"]] = getattr(module, class_name)


def _file_of(name_or_path: str | Path, name: str) -> Path:
    """Returns the path of a checkpoint's file, after a download for a Hub name."""
    file = cached_file(str(name_or_path), name)
    if file is None:
        raise OSError(f"{name_or_path} has no file {name}.")
    return Path(file)


def warn_of_other_class(model: Any) -> None:
    """Warns of a checkpoint that was saved from a user's model class and is loaded as a class of this package."""
    code = (getattr(model.config, "auto_map", None) or {}).get(model._auto_class, "")
    module, _, name = code.rpartition("--")[2].rpartition(".")
    if module and module != "modeling_moe" and name not in [cls.__name__ for cls in type(model).__mro__]:
        logger.warning(
            f"{model.name_or_path} was saved from the class {name} of {module}.py, and is loaded as "
            f"{type(model).__name__}, which may compute something else: import {name} and call {name}.from_pretrained."
        )


def _travelling_file(cls: type) -> tuple[str, str]:
    """Returns name and text of the file that defines a class, with relative imports from this package.

    Raises:
        _CannotTravel: if the text would not run in a checkpoint; the message says why.
    """
    module, package = sys.modules[cls.__module__], __package__ or ""
    file = getattr(module, "__file__", None)
    if module.__name__ == "__main__" or file is None:
        raise _CannotTravel("it is defined in __main__, so put it in a file of its own and import that")
    shipped = {ours.stem for ours in _our_files()}
    if (name := Path(file).stem) in shipped or not name.isidentifier():
        problem = "the name of a file of ours" if name in shipped else "a name that no import can use"
        raise _CannotTravel(f"{file} has {problem}, so rename it")
    if getattr(module, cls.__name__, None) is not cls:
        raise _CannotTravel(f"{file} has no class of that name outside its functions, so define it there")
    text = Path(file).read_text(encoding="utf-8-sig")
    relative = {}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                _refuse_local(alias.name, file, package)
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module is not None:
            if node.module.partition(".")[0] == package:
                relative[node] = "; ".join(_relative(node.module, alias, package, shipped) for alias in node.names)
            else:
                _refuse_local(node.module, file, package)
        elif isinstance(node, ast.ImportFrom) and not (node.level == 1 and node.module in shipped):
            raise _CannotTravel(f"{file} imports by a relative name, so put what it needs in it")
    return f"{name}.py", _replaced(text, relative)


def _replaced(text: str, statements: dict[Any, str]) -> str:
    """Returns the text of a file with some statements replaced; everything beside these statements is kept."""
    code = text.encode()
    starts = [0, *itertools.accumulate(map(len, code.splitlines(keepends=True)))]
    # from the last statement to the first, so that the positions of earlier statements stay valid
    for node in sorted(statements, key=lambda node: (node.lineno, node.col_offset), reverse=True):
        begin, end = starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset
        code = code[:begin] + statements[node].encode() + code[end:]
    return code.decode()


def _refuse_local(name: str, file: str, package: str) -> None:
    root = name.partition(".")[0]
    if root == package:
        raise _CannotTravel(f"{file} has `import {name}`, so write `from {package}.MODULE import NAME`")
    if root not in sys.stdlib_module_names and root not in packages_distributions():
        raise _CannotTravel(f"{file} imports {name}, which no installed package has, so put what it needs in the file")


def _relative(module: str, alias: ast.alias, package: str, shipped: set[str]) -> str:
    """Returns the statement that imports one name from the file of this package that defines it."""
    if module == package:
        module = getattr(getattr(sys.modules[package], alias.name, None), "__module__", module)
    home = module.removeprefix(f"{package}.")
    if home not in shipped or module == home:
        raise _CannotTravel(f"it imports {alias.name} from {module}, which does not travel with a checkpoint")
    return f"from .{home} import {alias.name}" + (f" as {alias.asname}" if alias.asname else "")
