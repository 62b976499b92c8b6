# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module describes the structures and functions of experts.c to Python, and checks that C has the same ones."""

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch

from ...backend import DECODE_ASSIGNMENTS


# kinds of activation.h -> numbers; the compiler is given this table
KINDS = {"SILU": 0, "GELU_TANH": 1, "RELU": 2, "RELU_SQUARED": 3, "CLAMPED_SWIGLU": 4, "CLAMPED_SILU": 5}
# dtype -> ELEMENT in vectors.h
ELEMENTS = {torch.float32: "FLOAT32", torch.bfloat16: "BFLOAT16", torch.float16: "FLOAT16"}


class NativeActivation(NamedTuple):
    """NativeActivation holds the first fields of activation.h's Activation.

    Attributes:
        kind: a number of `KINDS`.
        gated: 1 if h has two parts.
        paired: 1 if the parts of h are interleaved.
    """

    kind: int
    gated: int = 0
    paired: int = 0


_POINTWISE = {"silu": "SILU", "gelu_tanh": "GELU_TANH", "relu": "RELU", "relu2": "RELU_SQUARED"}
# key of `ACTIVATIONS` -> the activation in C
NATIVE_ACTIVATIONS = {
    **{name: NativeActivation(KINDS[kind]) for name, kind in _POINTWISE.items()},
    **{f"{name}_gated": NativeActivation(KINDS[kind], gated=1) for name, kind in _POINTWISE.items()},
    "clamped_swiglu_gated": NativeActivation(KINDS["CLAMPED_SWIGLU"], gated=1),
    "clamped_swiglu_pairs": NativeActivation(KINDS["CLAMPED_SWIGLU"], gated=1, paired=1),
    "clamped_silu_gated": NativeActivation(KINDS["CLAMPED_SILU"], gated=1),
}


class Matrices(ctypes.Structure):
    """Matrices is experts.c's structure of this name."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_long) for name in ("expert", "stride", "transposed")),
        ("slots", ctypes.c_void_p),
    )

    @classmethod
    def of(cls, tensor: torch.Tensor | None, slots: torch.Tensor | None = None) -> "Matrices":
        """Points to a tensor (E, N, M) whose rows or columns are contiguous, or to nothing.

        With `slots` (E,) int32 the tensor is (S, N, M), and `slots` says where the matrix of each expert lies.
        """
        if tensor is None:
            return cls()
        transposed = tensor.stride(2) != 1
        places = None if slots is None else slots.data_ptr()
        return cls(tensor.data_ptr(), tensor.stride(0), tensor.stride(1 + transposed), transposed, places)


def with_lines(matrices: torch.Tensor) -> torch.Tensor:
    """Returns matrices (E, N, M) whose rows or columns are contiguous."""
    return matrices if 1 in matrices.stride()[1:] else matrices.contiguous()


class Activation(ctypes.Structure):
    """Activation is activation.h's structure of this name."""

    _fields_ = (
        *((name, ctypes.c_long) for name in NativeActivation._fields),
        *((name, ctypes.c_double) for name in ("alpha", "limit")),
    )


class LowRank(ctypes.Structure):
    """LowRank is experts.c's structure of this name."""

    _fields_ = (
        ("a", Matrices),
        ("b", Matrices),
        ("rank", ctypes.c_long),
        *((name, ctypes.c_void_p) for name in ("states", "grad_states")),
    )


class Problem(ctypes.Structure):
    """Problem is experts.c's structure of this name."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "up_bias", "down_bias", "factor", "offsets", "token")),
        *((name, ctypes.c_long) for name in ("tokens", "top_k", "hidden", "columns", "width", "experts", "threads")),
        ("up", Matrices),
        ("down", Matrices),
        ("activation", Activation),
        ("up_update", LowRank),
        ("down_update", LowRank),
        *((name, ctypes.c_long) for name in ("begin", "end", "first")),
    )


class Gradients(ctypes.Structure):
    """Gradients is experts.c's structure of this name."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("grad", "h", "grad_h", "a", "slope", "grad_x")),
        ("grad_up", Matrices),
        ("grad_down", Matrices),
        *((name, ctypes.c_void_p) for name in ("grad_up_bias", "grad_down_bias")),
        *((name, Matrices) for name in ("up_a", "up_b", "down_a", "down_b")),
    )


class Outer(ctypes.Structure):
    """Outer is experts.c's structure of this name."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("left", "right", "left_index", "right_index")),
        *((name, ctypes.c_long) for name in ("n", "m")),
        ("to", Matrices),
    )


STRUCTURES: tuple[type[ctypes.Structure], ...] = (Matrices, Activation, LowRank, Problem, Gradients, Outer)
# argument types of experts.c's functions; a pointer is passed as an address
ARGUMENTS: dict[str, list[type]] = {
    "scratch_words": [ctypes.c_void_p],
    "wave_rows": [ctypes.c_void_p],
    "experts_forward": [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_long, *[ctypes.c_void_p] * 3],
    "experts_backward": [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_long, ctypes.c_void_p],
    "experts_project": [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_long, ctypes.c_void_p],
    "experts_outer": [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_long, ctypes.c_void_p],
    "experts_decode": [ctypes.c_void_p] * 5,
    "experts_decode_into": [ctypes.c_void_p] * 5,
}
COUNTING = ("scratch_words", "wave_rows")


def definitions(dtype: torch.dtype) -> list[str]:
    """Returns the compiler's options that define the constants which C shares with Python."""
    constants = {"ELEMENT": ELEMENTS[dtype], "DECODE_ASSIGNMENTS": DECODE_ASSIGNMENTS, **KINDS}
    return [f"-D{name}={value}" for name, value in constants.items()]


def expected_sizes() -> dict[str, int]:
    """Returns the size in bytes of each structure by its name, as Python lays it out."""
    return {structure.__name__: ctypes.sizeof(structure) for structure in STRUCTURES}


def expected_constants(dtype: torch.dtype) -> dict[str, int]:
    """Returns the constants that the library exports, with the size of an element first."""
    return {"sizeof(Element)": dtype.itemsize, "DECODE_ASSIGNMENTS": DECODE_ASSIGNMENTS, **KINDS}


def check_agreement(kind: str, expected: dict[str, int], found: Sequence[int]) -> None:
    """Compares numbers of Python with those of the library.

    A disagreement would corrupt memory without an exception.

    Args:
        kind: what the numbers are, for the message.
        expected: names and numbers of Python.
        found: the numbers of the library, in the order of `expected`.

    Raises:
        RuntimeError: for the first name whose numbers differ.
    """
    for (name, number), other in zip(expected.items(), found, strict=True):
        if number != other:
            raise RuntimeError(
                f"experts.c has the {kind} {other} for {name} and structures.py has {number}: reinstall modeling_moe."
            )


def _exported(library: ctypes.CDLL, name: str, number: int) -> list[int]:
    return list((ctypes.c_long * number).in_dll(library, name))


def declare(library: ctypes.CDLL, dtype: torch.dtype) -> ctypes.CDLL:
    """Checks that a library agrees with this module and sets the types of its functions.

    Raises:
        RuntimeError: if a structure or a constant differs.
    """
    sizes, constants = expected_sizes(), expected_constants(dtype)
    check_agreement("size", sizes, _exported(library, "structure_sizes", len(sizes)))
    check_agreement("constant", constants, _exported(library, "constants", len(constants)))
    for name, arguments in ARGUMENTS.items():
        function = getattr(library, name)
        function.argtypes = arguments
        function.restype = ctypes.c_long if name in COUNTING else None
    return library
