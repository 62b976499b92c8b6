# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""ExpertsProblem is the one argument that the operator flattens and that every back end takes.

# T tokens, K experts per token, A = T*K assignments, E experts, H hidden size, I expert width
# C columns of the first projection: 2I for gated experts, else I
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from .low_rank import LowRank


class FlatProblem(NamedTuple):
    """FlatProblem is an [`ExpertsProblem`] in the types that a torch operator takes.

    Attributes:
        tensors: the tensors that are present. A list of optional tensors would lose its gradients.
        layout: the names of `tensors`, separated by spaces.
        activation: the field of the problem.
        numbers: the scalings of the updates of `up` and `down`, then the constants. It is one list because torch takes
            an empty list for one of tensors.
    """

    tensors: Sequence[torch.Tensor]
    layout: str
    activation: str
    numbers: Sequence[float]


class ExpertsProblem(NamedTuple):
    """ExpertsProblem holds what the experts of one layer compute with. It is immutable.

    The expert ids and the expert order are separate arguments of the back ends: decoding needs only the ids, and
    backward needs only the order.

    Attributes:
        x: (T, H) tokens.
        weight: (T, K) combine weights in fp32, or in fp64 beside fp64 tokens.
        up: (E, C, H) first matrices. Matrices and biases have the dtype of `x`; for a back end with `casts_matrices`
            they may be fp32 beside an `x` of 16 bits.
        down: (E, H, I) second matrices.
        up_bias: (E, C) or None.
        down_bias: (E, H) or None.
        activation: a key of [`~modeling_moe.dispatch.activations.ACTIVATIONS`].
        constants: the constants of the activation.
        up_update: the low-rank update of `up`, or None.
        down_update: the low-rank update of `down`, or None.
        slots: (E,) int32 on the CPU, where each expert's matrices and biases lie; these then are (S, ...) with S slots
            in the place of E experts, and get no gradient. Back ends with `serves_slots` take it. None if expert e lies at
            e.
    """

    x: torch.Tensor
    weight: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor
    up_bias: torch.Tensor | None
    down_bias: torch.Tensor | None
    activation: str
    constants: Sequence[float]
    up_update: LowRank | None = None
    down_update: LowRank | None = None
    slots: torch.Tensor | None = None

    @property
    def num_experts(self) -> int:
        """The number E of experts."""
        return len(self.up) if self.slots is None else len(self.slots)

    @property
    def updated(self) -> bool:
        """True if a matrix has a low-rank update."""
        return self.up_update is not None or self.down_update is not None

    @property
    def drops(self) -> bool:
        """True if a low-rank update has dropout."""
        return any(update is not None and update.dropout > 0 for update in (self.up_update, self.down_update))

    @property
    def top_k(self) -> int:
        """The number K of experts per token."""
        return self.weight.shape[1]

    @property
    def wide_dtype(self) -> torch.dtype:
        """The dtype of sums over experts: fp32, or fp64 for fp64 tokens."""
        return torch.promote_types(self.x.dtype, torch.float32)

    def refuse_gradients_of_slots(self, needs: "Needs") -> None:
        """Raises ValueError if gradients are needed of matrices or biases that lie in slots."""
        if self.slots is not None and (needs.up or needs.down or needs.up_bias or needs.down_bias):
            raise ValueError("matrices in slots get no gradient: pass the matrices of all experts")

    def requires_grad(self) -> bool:
        """Returns True if autograd will ask for the gradient of an input."""
        if not torch.is_grad_enabled():
            return False
        return any(tensor.requires_grad for tensor in self.named_tensors().values())

    def named_tensors(self) -> dict[str, torch.Tensor]:
        """Returns the tensors that are present, by the names that `FlatProblem.layout` lists."""
        tensors = {
            "x": self.x,
            "weight": self.weight,
            "up": self.up,
            "down": self.down,
            "up_bias": self.up_bias,
            "down_bias": self.down_bias,
            "slots": self.slots,
        }
        for name, update in (("up", self.up_update), ("down", self.down_update)):
            if update is not None:
                tensors |= {f"{name}_a": update.a, f"{name}_b": update.b, f"{name}_kept": update.kept}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}

    def with_dropout(self) -> "ExpertsProblem":
        """Draws the dropout masks of the low-rank updates."""
        if not self.drops:
            return self
        tokens, top_k = self.weight.shape
        return self._replace(
            up_update=self.up_update and self.up_update.drop(tokens),
            down_update=self.down_update and self.down_update.drop(tokens * top_k),
        )

    def with_matrices_in(self, dtype: torch.dtype) -> "ExpertsProblem":
        """Casts matrices and biases."""
        return self._replace(
            up=self.up.to(dtype),
            down=self.down.to(dtype),
            up_bias=None if self.up_bias is None else self.up_bias.to(dtype),
            down_bias=None if self.down_bias is None else self.down_bias.to(dtype),
        )

    def flatten(self) -> FlatProblem:
        """Returns the problem in the types that a torch operator takes; [`ExpertsProblem.unflatten`] inverts it.

        `LowRank.dropout` is not kept: [`ExpertsProblem.with_dropout`] has turned it into masks.
        """
        tensors = self.named_tensors()
        scalings = [1.0 if update is None else update.scaling for update in (self.up_update, self.down_update)]
        return FlatProblem(list(tensors.values()), " ".join(tensors), self.activation, [*scalings, *self.constants])

    @classmethod
    def unflatten(cls, flat: FlatProblem) -> "ExpertsProblem":
        """Rebuilds a problem from its flat form."""
        tensors = dict(zip(flat.layout.split(), flat.tensors, strict=True))
        up_scaling, down_scaling, *constants = flat.numbers

        def update(name: str, scaling: float) -> LowRank | None:
            if f"{name}_a" not in tensors:
                return None
            return LowRank(tensors[f"{name}_a"], tensors[f"{name}_b"], scaling, kept=tensors.get(f"{name}_kept"))

        return cls(
            x=tensors["x"],
            weight=tensors["weight"],
            up=tensors["up"],
            down=tensors["down"],
            up_bias=tensors.get("up_bias"),
            down_bias=tensors.get("down_bias"),
            activation=flat.activation,
            constants=constants,
            up_update=update("up", up_scaling),
            down_update=update("down", down_scaling),
            slots=tensors.get("slots"),
        )


class Needs(NamedTuple):
    """Needs says which gradients backward computes: those of the tensors with the same names."""

    x: bool = False
    weight: bool = False
    up: bool = False
    down: bool = False
    up_bias: bool = False
    down_bias: bool = False
    up_a: bool = False
    up_b: bool = False
    down_a: bool = False
    down_b: bool = False

    @property
    def up_factors(self) -> tuple[bool, bool]:
        """The needs of the factors a and b of the update of `up`."""
        return self.up_a, self.up_b

    @property
    def down_factors(self) -> tuple[bool, bool]:
        """The needs of the factors a and b of the update of `down`."""
        return self.down_a, self.down_b


class Gradients(NamedTuple):
    """Gradients holds the gradient of each tensor of a problem, under the tensor's name. A gradient that is not needed is None.

    Each has the shape and the dtype of its tensor. Gradients of idle experts and of the weights of empty assignments
    are zero.
    """

    x: torch.Tensor | None = None
    weight: torch.Tensor | None = None
    up: torch.Tensor | None = None
    down: torch.Tensor | None = None
    up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None
    up_a: torch.Tensor | None = None
    up_b: torch.Tensor | None = None
    down_a: torch.Tensor | None = None
    down_b: torch.Tensor | None = None


class Combined(NamedTuple):
    """Combined is the result of a back end's forward.

    Attributes:
        output: (T, H) in the dtype of `x`: each token's weighted sum over its experts, added up in `wide_dtype`.
        h: (A, C) the first projection in expert order, or (0, C) if backward computes it again.
    """

    output: torch.Tensor
    h: torch.Tensor
