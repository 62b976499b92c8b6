# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""Every launch of a Triton kernel passes through this module, so that a tool can count, time or compile the launches."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple


class Launch(NamedTuple):
    """One call of a kernel.

    Attributes:
        kernel: the `triton.jit` function.
        grid: numbers of programs.
        arguments: tensors, numbers and None, in the kernel's order.
        options: the constants by name, with num_warps and num_stages.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple
    options: dict[str, Any]

    @property
    def name(self) -> str:
        """The kernel's name."""
        return self.kernel.fn.__name__

    def run(self) -> None:
        """Launches the kernel."""
        self.kernel[self.grid](*self.arguments, **self.options)


# a list and no context variable: autograd calls backward from a thread of its own
_handlers: list[Callable[[Launch], Any]] = []


@contextmanager
def intercepted(handler: Callable[[Launch], Any]) -> Iterator[None]:
    """Hands each launch of any thread to `handler` instead of running it; `Launch.run` in the handler runs it.

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
    """Runs launches whatever an open `intercepted` would do with them."""
    with intercepted(Launch.run):
        yield


def launch(kernel, grid: tuple[int, ...], *arguments, **options) -> None:
    """Launches `kernel`, unless `grid` is empty."""
    if 0 in grid:
        return
    call = Launch(kernel, grid, arguments, options)
    if _handlers:
        _handlers[-1](call)
    else:
        call.run()
