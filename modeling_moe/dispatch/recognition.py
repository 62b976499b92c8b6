# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module finds out what experts compute between their two matrices by evaluating their gate on fixed numbers.

The gate is served if its values and its derivatives are those of an activation of
[`~modeling_moe.dispatch.activations`], with constants among the numbers that the gate reads from its module. The names
of classes and attributes decide nothing, so experts of unknown models are served too, and a class that changes what it
computes is not mistaken for what it was. The numbers lie on both sides of each constant, and up to 1e9.

# R rows, I expert width, C columns of the first projection
"""

import itertools
import math
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from .activations import ACTIVATIONS
from .gate_reader import GateReader, ModuleMark, Note, UnreadableGate, mark_of, numbers_in, unchanged


# no zero of a function or of a derivative is near; the largest ones find limits that no attribute holds
MAGNITUDES = (
    1e-3, 0.03, 0.1, 0.3, 0.5, 0.9, 1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 15, 20, 30, 50, 1e3, 1e5, 1e7, 1e9,
)  # fmt: skip
# beside a constant and never on it, since releases of torch differ in the derivative of a clamp at its limit
SIDES = (0.999, 1.001)
POINTS = 4096
UNKNOWN_WIDTH = 16
# more constants than a gate has; each of them multiplies the candidates
MOST_NUMBERS = 6
# a gate that computes in float32 is as right as the back ends, which do so too
TOLERANCE, SMALLEST = 3e-6, 1e-20


class ActivationChoice(NamedTuple):
    """ActivationChoice names the activation of a module.

    Attributes:
        name: a key of [`~modeling_moe.dispatch.activations.ACTIVATIONS`].
        constants: the constants of the activation.
    """

    name: str
    constants: tuple[float, ...]


class Recognition(NamedTuple):
    """Recognition says what experts compute. Exactly one of its fields is None.

    Attributes:
        activation: the activation, or None if the operator cannot compute the experts.
        reason: why it cannot.
    """

    activation: ActivationChoice | None
    reason: str | None


class _Known(NamedTuple):
    """_Known holds a recognition and what it rests on: the expert width, the gate, and what the gate has read."""

    width: int | None
    gated: bool
    gate: Any
    notes: list[Note]
    recognition: Recognition

    def holds_for(self, module: Any, width: int | None) -> bool:
        """Returns True if nothing that the recognition rests on differs in a module of its class."""
        alike = self.width == width and self.gated == module.has_gate and self.gate is _gate_function(module)
        return alike and unchanged(module, self.notes)


# of a module, with its class; and the last activation that was recognised in a class, which all its layers share
_of_module: weakref.WeakKeyDictionary[nn.Module, tuple[type, _Known]] = weakref.WeakKeyDictionary()
_of_class: weakref.WeakKeyDictionary[type, _Known] = weakref.WeakKeyDictionary()


def recognise(module: Any) -> Recognition:
    """Returns what experts compute between their two matrices, or why the operator cannot compute them.

    A gate is evaluated on the CPU when the first module of a class is met, and again where a module differs in what the
    gate has read. `torch.compile` does this while it traces, and compiles anew after such a change.

    Args:
        module: experts that follow transformers' experts interface.
    """
    if torch.compiler.is_dynamo_compiling():
        traced = _know_while_traced(module)
        for path, constant in traced.reads:
            found: Any = module
            for name in path:
                found = getattr(found, name)
            if constant is None:
                getattr(found, "__name__", None)  # torch compiles anew after a change of what is read
            elif found != constant:  # never true while traced
                raise RuntimeError("the experts' gate changed while it was traced: call the model again")
        return traced.recognition
    return _know(module).recognition


class _Traced(NamedTuple):
    """_Traced holds a recognition and what compiled code depends on.

    Attributes:
        recognition: what the experts compute.
        reads: the paths that the gate has read, each with its constant, or with None for a function or a submodule.
    """

    recognition: Recognition
    reads: list[tuple[tuple[str, ...], Any]]


@torch.compiler.assume_constant_result
def _know_while_traced(module: Any) -> _Traced:
    known = _know(module)
    reads = [
        (path, None if isinstance(value, ModuleMark) or callable(value) else value) for path, value in known.notes
    ]
    return _Traced(known.recognition, reads)


def _know(module: Any) -> _Known:
    kind, width = type(module), _plain_width(module)
    known_kind, known = _of_module.get(module, (None, None))
    if known is not None and known_kind is kind and known.holds_for(module, width):
        return known
    if reason := _reason_of_structure(module):
        known = _Known(width, bool(module.has_gate), _gate_function(module), [], Recognition(None, reason))
    else:
        known = _of_class.get(kind)
        if known is None or not known.holds_for(module, width):
            known = _evaluate_gate(module, width)
    if known.recognition.activation is not None:
        _of_class[kind] = known
    _of_module[module] = kind, known
    return known


def _gate_function(module: Any) -> Any:
    return mark_of(getattr(module, "_apply_gate", None))


def _plain_width(module: Any) -> int | None:
    """Returns the expert width, or None where reading the matrix costs time or its shape is not the matrix's."""
    down = module._parameters.get("down_proj")
    return down.shape[1 if module.is_transposed else 2] if down is not None and down.dim() == 3 else None


def _reason_of_structure(module: Any) -> str | None:
    if getattr(module, "has_post_expert_norm", False):
        return "it has a norm after each expert"
    up = "gate_up_proj" if module.has_gate else "up_proj"
    names = [up, "down_proj", *((f"{up}_bias", "down_proj_bias") if module.has_bias else ())]
    own = {**module._parameters, **module._buffers}
    if missing := [name for name in names if name not in own and not hasattr(module, name)]:
        return f"it has no {missing[0]}"
    others = [name for name, tensor in own.items() if tensor is not None and name not in names]
    for name, child in module.named_children():
        if name != "parametrizations":
            others += [
                f"{name}.{path}" for path, _ in itertools.chain(child.named_parameters(), child.named_buffers())
            ]
    if others:
        return f"it has the tensor {others[0]}, whose use is unknown"
    for name in (up, "down_proj"):
        matrix = own.get(name)
        # DeepSpeed leaves an empty tensor in the place of a matrix that other processes hold
        if matrix is not None and matrix.numel() and matrix.dim() != 3:
            return f"its {name} has {matrix.dim()} dimensions and not 3"
        if matrix is not None and (not matrix.is_floating_point() or matrix.element_size() == 1):
            return f"its {name} is {matrix.dtype}"
    return None


def _evaluate_gate(module: Any, width: int | None) -> _Known:
    if width is None:
        down = module.down_proj
        columns = down.shape[1 if module.is_transposed else 2] if down.dim() == 3 else UNKNOWN_WIDTH
    else:
        columns = width
    gated, gate, notes = bool(module.has_gate), _gate_function(module), []
    found: list[ActivationChoice | Exception | None] = []

    def evaluate() -> None:
        try:
            found.append(_match(_gate_of(module, GateReader(module, notes)), notes, gated, columns))
        except Exception as error:  # a gate may raise anything, and then its own class computes it
            found.append(error)

    # another thread has none of the modes of this one: no grad, autocast, fake tensors, tracing
    thread = threading.Thread(target=evaluate)
    thread.start()
    thread.join()
    (result,) = found
    if isinstance(result, ActivationChoice):
        return _Known(width, gated, gate, notes, Recognition(result, None))
    return _Known(width, gated, gate, notes, Recognition(None, f"its gate or activation {_why_not(module, result)}"))


def _why_not(module: Any, error: Exception | None) -> str:
    if isinstance(error, UnreadableGate):
        return str(error)
    if error is not None:
        return f"raises {type(error).__name__} when it is evaluated alone"
    function = getattr(module, "act_fn", module)
    return f"({getattr(function, '__name__', type(function).__name__)}) has no derivative here"


def _gate_of(module: Any, reader: GateReader) -> Callable[[torch.Tensor], torch.Tensor]:
    """Returns what transformers calls between the two matrices, with `reader` in the place of the module."""
    if not module.has_gate:
        return lambda h: reader.act_fn(h)
    if "_apply_gate" in vars(module):
        raise UnreadableGate("is an attribute of the module, not of its class")
    return lambda h: reader._apply_gate(h)


class _Evaluation(NamedTuple):
    """_Evaluation holds h (R, C), a (R, I), a direction like a, and the gradient (R, C) of their inner product."""

    h: torch.Tensor
    a: torch.Tensor
    direction: torch.Tensor
    grad_h: torch.Tensor


def _match(
    gate: Callable[[torch.Tensor], torch.Tensor], notes: list[Note], gated: bool, width: int
) -> ActivationChoice | None:
    """Returns the activation whose values and derivatives a gate has, or None."""
    columns = 2 if gated else 1
    gate(_draw(columns * width, []))  # to learn its constants
    numbers = numbers_in(notes)
    notes.clear()
    evaluation = _evaluate(gate, _draw(columns * width, numbers), width)
    if len(numbers) > MOST_NUMBERS:
        raise UnreadableGate("reads more numbers than an activation has")
    return next((each for each in _candidates(columns, numbers) if _agrees(evaluation, each)), None)


def _draw(columns: int, numbers: list[float]) -> torch.Tensor:
    """Returns (R, C) float64 in which values below, between and above all limits meet in both layouts of a gate."""
    constants = {1.0, *map(abs, numbers)}
    magnitudes = {*MAGNITUDES, *(constant * side for constant in constants for side in SIDES)} - constants
    values = [each for each in sorted(magnitudes) if 0 < each < 1e10]
    values = torch.tensor(values, dtype=torch.float64, device="cpu")
    generator = torch.Generator("cpu").manual_seed(0)
    shape = (math.ceil(POINTS / columns), columns)
    return torch.cat([values, -values])[torch.randint(2 * len(values), shape, generator=generator, device="cpu")]


def _evaluate(gate: Callable[[torch.Tensor], torch.Tensor], h: torch.Tensor, width: int) -> _Evaluation:
    leaf = h.clone().requires_grad_()
    a = gate(leaf.clone())  # a gate may overwrite its input
    if a.shape != (len(h), width) or a.dtype != h.dtype:
        raise UnreadableGate(f"turns {tuple(h.shape)} {h.dtype} into {tuple(a.shape)} {a.dtype}")
    direction = torch.linspace(0.5, 1.5, a.numel(), dtype=h.dtype, device="cpu").view_as(a)
    (grad_h,) = torch.autograd.grad((a * direction).sum(), leaf)
    return _Evaluation(h, a.detach(), direction, grad_h)


def _candidates(columns: int, numbers: list[float]) -> Iterator[ActivationChoice]:
    numbers = sorted({1.0, *numbers})  # SiLU's alpha is 1, and written nowhere
    for name, activation in ACTIVATIONS.items():
        if activation.columns == columns:
            for constants in itertools.product(numbers, repeat=len(activation.constants)):
                yield ActivationChoice(name, constants)


def _agrees(evaluation: _Evaluation, candidate: ActivationChoice) -> bool:
    """Returns True if an activation has the values and the gradient of an evaluation."""
    h, a, direction, grad_h = evaluation
    activation, mine, gradient = ACTIVATIONS[candidate.name], torch.empty_like(a), torch.empty_like(h)
    activation.forward(h, candidate.constants, mine)
    if not torch.allclose(a, mine, TOLERANCE, SMALLEST):
        return False
    activation.backward(h, direction.clone(), candidate.constants, mine, gradient)
    return torch.allclose(grad_h, gradient, TOLERANCE, SMALLEST)
