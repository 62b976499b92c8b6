# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module lets the gate of any experts be evaluated apart from its module, and notes what the gate reads.

A gate may depend on anything that its module holds: a limit, a mode, a learned tensor, a counter. [`GateReader`] stands
in for the module. It gives the gate what is immutable, notes it, and refuses the rest. What was noted tells later whether
the gate still computes what it computed before.
"""

import dis
import functools
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn


CONSTANTS = (bool, int, float, str, torch.dtype, types.NoneType)


class UnreadableGate(Exception):
    """UnreadableGate says what a gate does that cannot be evaluated apart from its module."""


class Note(NamedTuple):
    """Note records one attribute that a gate has read.

    Attributes:
        path: the names that lead from the experts module to the attribute.
        value: what [`mark_of`] returns for the attribute.
    """

    path: tuple[str, ...]
    value: Any


class ModuleMark(NamedTuple):
    """ModuleMark tells whether a submodule computes what its class defines.

    Attributes:
        kind: the class of the submodule.
        hooked: True if the submodule has hooks on its forward.
        patched: True if the submodule has a forward of its own.
    """

    kind: type
    hooked: bool
    patched: bool


def mark_of(value: Any) -> Any:
    """Returns the [`ModuleMark`] of a submodule, the function of a method, and any other attribute itself."""
    if isinstance(value, types.MethodType):
        return value.__func__
    if not isinstance(value, nn.Module):
        return value
    return ModuleMark(type(value), bool(value._forward_hooks or value._forward_pre_hooks), "forward" in vars(value))


def unchanged(module: nn.Module, notes: Iterable[Note]) -> bool:
    """Returns True if each attribute that was noted is what it was."""
    for path, value in notes:
        found: Any = module
        for name in path:
            found = getattr(found, name, UnreadableGate)
        if mark_of(found) != value:
            return False
    return True


def numbers_in(notes: Iterable[Note]) -> list[float]:
    """Returns the distinct numbers among what was noted, in increasing order."""
    values = (value for _, noted in notes for value in (noted if isinstance(noted, tuple) else (noted,)))
    return sorted(
        {float(value) for value in values if isinstance(value, (int, float)) and not isinstance(value, bool)}
    )


def _of_torch(function: Any) -> bool:
    module = getattr(function, "__module__", None)
    return (module is not None and module.split(".")[0] == "torch") or isinstance(function, types.BuiltinFunctionType)


def _globals_of(code: types.CodeType) -> Iterator[str]:
    """Yields the names of the global variables that a function and the functions inside it use."""
    for instruction in dis.get_instructions(code):
        if instruction.opname.endswith("_GLOBAL"):
            yield instruction.argval
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _globals_of(constant)


def require_pure(function: Callable[..., Any], seen: frozenset[Any] = frozenset()) -> None:
    """Refuses a function that is neither torch's nor written with nothing but arguments, constants and such functions.

    Raises:
        UnreadableGate: for a closure, another kind of callable, and a global variable that may change.
    """
    if function in seen or _of_torch(function):
        return
    name = getattr(function, "__qualname__", type(function).__name__)
    if isinstance(function, functools.partial):
        return require_pure(function.func, seen)
    if not isinstance(function, types.FunctionType):
        raise UnreadableGate(f"calls {name}, which is no plain function")
    defaults = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
    if not all(isinstance(default, CONSTANTS) for default in defaults):
        raise UnreadableGate(f"calls {name}, which has a default that may change")
    if function.__closure__:
        raise UnreadableGate(f"calls {name}, which reads variables of another function")
    for used in _globals_of(function.__code__):
        value = function.__globals__.get(used)
        if isinstance(value, types.FunctionType):
            require_pure(value, seen | {function})
        elif not isinstance(value, (*CONSTANTS, types.ModuleType, type)) and not _of_torch(value):
            raise UnreadableGate(f"uses the global variable {used}")


class GateReader:
    """A GateReader stands in for a module while its gate is evaluated.

    Args:
        module: experts, or a submodule of them.
        notes: the list to which each attribute is added that is read.
        path: the names that lead from the experts to the module.
    """

    def __init__(self, module: nn.Module, notes: list[Note], path: tuple[str, ...] = ()):
        vars(self).update(_module=module, _notes=notes, _path=path)

    def __getattr__(self, name: str) -> Any:
        module, path = self._module, (*self._path, name)
        if name in module._parameters or name in module._buffers:
            raise UnreadableGate(f"reads the tensor {'.'.join(path)}")
        value = vars(module).get(name, module._modules.get(name, UnreadableGate))
        if value is UnreadableGate:
            value = self._of_class(name)
        elif isinstance(value, types.MethodType) and value.__self__ is module:
            require_pure(value.__func__)
            self._append(Note(path, mark_of(value)))
            return types.MethodType(value.__func__, self)
        self._note(path, value)
        return GateReader(value, self._notes, path) if isinstance(value, nn.Module) else value

    def _of_class(self, name: str) -> Any:
        for base in type(self._module).__mro__:
            if name in vars(base):
                value = vars(base)[name]
                if isinstance(value, types.FunctionType):
                    require_pure(value)
                    return types.MethodType(value, self)
                return value.__func__ if isinstance(value, staticmethod) else value
        raise AttributeError(name)

    def _note(self, path: tuple[str, ...], value: Any) -> None:
        if isinstance(value, types.MethodType) and value.__self__ is self:
            return  # a method of the class
        if callable(value) and not isinstance(value, nn.Module):
            require_pure(value)
        elif not isinstance(value, (*CONSTANTS, nn.Module)) and not (
            isinstance(value, tuple) and all(isinstance(each, CONSTANTS) for each in value)
        ):
            raise UnreadableGate(f"reads {'.'.join(path)}, which is a {type(value).__name__}")
        self._append(Note(path, mark_of(value)))

    def _append(self, note: Note) -> None:
        if note not in self._notes:
            self._notes.append(note)

    def __setattr__(self, name: str, value: Any) -> None:
        raise UnreadableGate(f"changes {'.'.join((*self._path, name))}")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the forward that the submodule's class defines."""
        module = self._module
        kind, hooked, patched = mark_of(module)
        # transformers may give such a class a faster kernel that computes what its forward does
        if hooked or (patched and not hasattr(kind, "kernel_layer_name")):
            raise UnreadableGate(f"calls {'.'.join(self._path)}, which has hooks or a forward of its own")
        require_pure(kind.forward)
        return kind.forward(self, *args, **kwargs)
