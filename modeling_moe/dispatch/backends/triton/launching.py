# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""Every launch of a Triton kernel passes through this module, so that tools can count, time or compile launches."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch


class Launch(NamedTuple):
    """Launch is one call of a kernel.

    Attributes:
        kernel: the `triton.jit` function.
        grid: the numbers of programs.
        arguments: tensors, numbers and None, by the kernel's names.
        options: the kernel's constants by name, with num_warps and num_stages.
    """

    kernel: Any  # Triton's classes of functions have no common type
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        """The name of the kernel."""
        return self.kernel.fn.__name__

    def run(self) -> None:
        """Launches the kernel."""
        self.kernel[self.grid](**self.arguments, **self.options)


Handler = Callable[[Launch], object]
# a list rather than a context variable: autograd calls backward in a thread of its own
_handlers: list[Handler] = []


@contextmanager
def intercepted(handler: Handler) -> Iterator[None]:
    """Hands each launch of any thread to a handler instead of running it; `Launch.run` in the handler runs it.

    Example:
        >>> launches = []
        >>> with intercepted(launches.append):
        ...     pass  # what is called here launches nothing
    """
    _handlers.append(handler)
    try:
        yield
    finally:
        _handlers.remove(handler)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Runs launches although an outer `intercepted` is open."""
    with intercepted(Launch.run):
        yield


def launch(kernel: Any, grid: tuple[int, ...], options: dict[str, Any], **arguments: Any) -> None:
    """Launches a kernel, unless the grid is empty.

    Args:
        kernel: the `triton.jit` function.
        grid: the numbers of programs.
        options: the kernel's constants by name, with num_warps and num_stages.
        arguments: the kernel's other arguments by name.
    """
    if 0 in grid:
        return
    call = Launch(kernel, grid, arguments, options)
    if _handlers:
        _handlers[-1](call)
    else:
        call.run()


def strides_of(name: str, dimensions: str, tensor: torch.Tensor) -> dict[str, int]:
    """Returns a tensor's strides as kernel arguments: `strides_of("stride", "ech", up)` has the keys stride_e, ..."""
    return {f"{name}_{letter}": stride for letter, stride in zip(dimensions, tensor.stride(), strict=True)}
