# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""The back ends compute the experts: native C, Triton kernels, torch's grouped GEMM, and a loop over experts."""

import torch

from ..backend import Backend
from ..problem import ExpertsProblem
from .grouped_mm import GroupedMMBackend
from .loop import LoopBackend
from .native import NativeBackend


try:
    from .triton.backend import TritonBackend
except ImportError:  # Triton is not installed
    _triton: dict[str, Backend] = {}
else:
    _triton = {"triton": TritonBackend()}

# every name that can be asked for, whether it is installed here or not
NAMES = ("native", "triton", "grouped_mm", "loop")
# the installed ones, in order of preference
BACKENDS: dict[str, Backend] = {
    "native": NativeBackend(),
    **_triton,
    "grouped_mm": GroupedMMBackend(),
    "loop": LoopBackend(),
}


def choose_products(asked: str | None, states: torch.Tensor, matrices: torch.Tensor) -> Backend:
    """Returns the back end that multiplies by the experts' matrices one by one: the one asked for, or the first default.

    Args:
        asked: a key of `BACKENDS`, or None. A back end that computes whole experts alone is not taken.
        states: (., M) in the dtype of the products.
        matrices: (E, N, M).
    """
    if asked in BACKENDS and BACKENDS[asked].multiplies(states, matrices):
        return BACKENDS[asked]
    device = states.device.type
    return next(
        backend
        for backend in BACKENDS.values()
        if (backend.default_devices is None or device in backend.default_devices)
        and backend.multiplies(states, matrices)
    )


def choose(asked: str | None, problem: ExpertsProblem) -> Backend:
    """Returns the back end that was asked for by name, if it serves the problem; else the first default that does.

    Raises:
        ValueError: for a name that is not in `NAMES`.
    """
    if asked is not None and asked not in NAMES:
        raise ValueError(f"backend {asked!r} is unknown: choose one of {', '.join(NAMES)}")
    if asked in BACKENDS and BACKENDS[asked].serves(problem):
        return BACKENDS[asked]
    device = problem.x.device.type
    return next(
        backend
        for backend in BACKENDS.values()
        if (backend.default_devices is None or device in backend.default_devices) and backend.serves(problem)
    )
