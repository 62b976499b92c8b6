# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module finds out whether the code of a source's model reads a field of config.json, from the text of the code.

A field that the configuration's class does not declare and that no code reads cannot change what the model computes. In
doubt the answer is that the field is read. The code is parsed and never run.
"""

import ast
import functools
import inspect
from collections.abc import Iterator
from pathlib import Path

import transformers
from transformers import GenerationConfig, PreTrainedConfig


ROOT = Path(transformers.__file__).parent
# transformers' own files, outside the folders of the models, that see a configuration while a model computes
SHARED = (
    "modeling_*.py",
    "configuration_utils.py",
    "cache_utils.py",
    "masking_utils.py",
    "generation/*.py",
    "integrations/*attention*.py",
    "integrations/*paged*.py",
    "integrations/moe.py",
    "loss/*.py",
)


def reads(config: PreTrainedConfig, name: str) -> bool:
    """Returns whether the model of a configuration may read a field.

    Args:
        config: configuration of the source. If transformers has no such class, the class and the Python code in the
            source's folder are judged, provided that the user trusts them: see [`trusted_code`].
        name: name of a top-level field.

    Returns:
        False only if neither the class declares the field nor the code reads it.
    """
    cls = type(config)
    if cls.__module__.startswith("transformers.models."):
        return _declares(cls, name) or name in _names_in_model(Path(inspect.getfile(cls)).parent) | _shared_names()
    code = trusted_code(config)
    files = sorted(code.glob("**/*.py")) if code is not None else []
    if not files or _declares(cls, name) or name in _shared_names():
        return True
    try:
        return any(name in _words(file.read_text(encoding="utf-8")) for file in files)
    except (SyntaxError, ValueError):
        return True  # nothing is known of code that is not Python's or not UTF-8


def trusted_code(config: PreTrainedConfig) -> Path | None:
    """Returns the folder with the Python code that a source brings, or None if no such code is there and trusted.

    transformers loads a configuration's class from a source only if the user trusts the code. For a family without a class,
    [`source_config`] keeps the folder in the class that it makes.
    """
    folder = getattr(type(config), "trusted_code", None)
    if type(config).__module__.startswith("transformers_modules."):
        folder = Path(config.name_or_path or "")
    return folder if folder is not None and (folder / "config.json").is_file() else None


def _declares(cls: type[PreTrainedConfig], name: str) -> bool:
    """Returns whether a class or a parent of the class has a field, a parameter, an alias or a property of a name."""
    if hasattr(cls, name) or name in cls.attribute_map or name in cls.attribute_map.values():
        return True
    return any(
        name in getattr(parent, "__annotations__", ()) or name in inspect.signature(parent.__init__).parameters
        for parent in cls.__mro__
        if issubclass(parent, PreTrainedConfig)
    )


def _words(text: str) -> set[str]:
    """Returns every name and every string constant of a program that a checkpoint brings.

    Raises:
        SyntaxError: if the text is not Python.
    """
    words = set()
    for node in ast.walk(ast.parse(text)):
        match node:
            case ast.Constant(value=str(value)):
                words.add(value)
            case ast.Attribute(attr=value) | ast.Name(id=value) | ast.arg(arg=value) | ast.keyword(arg=str(value)):
                words.add(value)
    return words


def _read_names(text: str, any_object: bool) -> set[str]:
    """Returns the attributes and the string constants of a program.

    Args:
        text: the program.
        any_object: whether an attribute of any object counts, or only of an expression with `config` in it.
    """
    names = set()
    for node in ast.walk(ast.parse(text)):
        match node:
            case ast.Constant(value=str(value)) if value.isidentifier():
                names.add(value)
            case ast.Attribute(value=owner, attr=attribute) if any_object or "config" in ast.unparse(owner).lower():
                names.add(attribute)
    return names


@functools.cache
def _names_in_model(folder: Path) -> frozenset[str]:
    """Returns what the modules of a model's folder, and the models that they import, read of any object."""
    names, seen, waiting = set[str](), set[Path](), [folder]
    while waiting:
        if (found := waiting.pop()) in seen:
            continue
        seen.add(found)
        for file in [*found.glob("modeling_*.py"), *found.glob("configuration_*.py")]:
            text = file.read_text(encoding="utf-8")
            names |= _read_names(text, any_object=True)
            waiting += _imported_models(text)
    return frozenset(names)


def _imported_models(text: str) -> Iterator[Path]:
    """Yields the folders of the other models that a module of a model imports from, as `from ..llama.x import y` does."""
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.ImportFrom) or not node.module:
            continue
        parts = node.module.removeprefix("transformers.models.").split(".")
        if node.level == 2 or node.module.startswith("transformers.models."):
            yield ROOT / "models" / parts[0]
        elif node.level == 3 and node.module.startswith("models."):
            yield ROOT / "models" / node.module.split(".")[1]


@functools.cache
def _shared_names() -> frozenset[str]:
    """Returns what transformers' shared modules read of a configuration, and the fields of a generation config."""
    names = set(GenerationConfig().to_dict())
    for pattern in SHARED:
        for file in ROOT.glob(pattern):
            names |= _read_names(file.read_text(encoding="utf-8"), any_object=False)
    return frozenset(names)
