# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module computes the two products of experts inside attention, by the back ends, as operators with a gradient.

Attention stands between the products, where experts of a feed-forward network have their activation, so that each product
is an operator of its own; both read one expert order.

# T tokens, K experts per token, A = T*K assignments, E experts; N rows and M columns of an expert's matrix
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from .backend import DECODE_ASSIGNMENTS, DECODE_TOKENS
from .backends import BACKENDS, choose_products
from .backends.grouped_passes import GroupedUpdate, Products, add_update
from .expert_order import ExpertOrder, by_assignment
from .low_rank import FactorGradients, LowRank
from .operator import is_plain


class Half(NamedTuple):
    """Half is a product of states with the matrices of their experts, and its low-rank update.

    Attributes:
        states: (T, M), a row for each token, if there is no weight; else (A, M), a row for each assignment.
        matrices: (E, N, M) in the dtype of the states.
        weight: (T, K) in fp32 or fp64, by which the products of a token are summed; None to keep them apart.
        update: the low-rank update of the matrices, or None.
    """

    states: torch.Tensor
    matrices: torch.Tensor
    weight: torch.Tensor | None = None
    update: LowRank | None = None

    def tensors(self) -> dict[str, torch.Tensor]:
        """Returns the tensors that are present, by the names that an operator's `layout` lists."""
        tensors = {"states": self.states, "matrices": self.matrices, "weight": self.weight}
        if self.update is not None:
            tensors |= {"a": self.update.a, "b": self.update.b, "kept": self.update.kept}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}

    @classmethod
    def of(cls, tensors: Sequence[torch.Tensor], layout: str, scaling: float) -> "Half":
        """Rebuilds a half from its tensors, their names separated by spaces, and the scaling of the update."""
        named = dict(zip(layout.split(), tensors, strict=True))
        update = LowRank(named["a"], named["b"], scaling, kept=named.get("kept")) if "a" in named else None
        return cls(named["states"], named["matrices"], named.get("weight"), update)


class _HalfPass:
    """_HalfPass computes one forward or one backward of a half.

    Args:
        half: the product.
        products: the products of a back end.
        needs: the names of the tensors whose gradients are needed.
    """

    def __init__(self, half: Half, products: Products, needs: Sequence[str] = ()):
        self.half, self.products, self.needs = half, products, needs
        self.update: GroupedUpdate | None = None
        if half.update is not None:
            factors = "a" in needs, "b" in needs
            self.update = GroupedUpdate(half.update, products, half.states.dtype, half.weight is None, factors)

    def _multiply(self, states: torch.Tensor) -> torch.Tensor:
        """Returns the products (A, N) in expert order."""
        half = self.half
        if half.weight is None:
            rows = self.products.gathered(states, half.matrices, None)
        else:
            rows = self.products.rows(states, half.matrices, None)
        return rows if self.update is None else add_update(self.products, rows, self.update.forward(states))

    def forward(self) -> torch.Tensor:
        """Returns (A, N) in the order of the assignments without a weight, else (T, N)."""
        half, order = self.half, self.products.order
        if half.weight is None:
            return by_assignment(self._multiply(half.states), order)
        rows = self._multiply(half.states[order.assignment])
        return self.products.combine(rows, half.weight).to(half.states.dtype)

    def backward(self, grad: torch.Tensor) -> dict[str, torch.Tensor | None]:
        """Returns the gradients that are needed, from that of the output."""
        return self._of_each(grad) if self.half.weight is None else self._of_sum(grad, self.half.weight)

    def _of_each(self, grad: torch.Tensor) -> dict[str, torch.Tensor | None]:
        half, products = self.half, self.products
        grad = grad[products.order.assignment]
        found: dict[str, torch.Tensor | None] = {}
        if "matrices" in self.needs:
            found["matrices"] = products.outer(grad, half.states, half.matrices, "right")
        if "states" in self.needs:
            rows = products.rows(grad, half.matrices.transpose(1, 2), None)
            if self.update is not None:
                rows = add_update(products, rows, self.update.backward(grad))
            found["states"] = products.combine(rows, None).to(half.states.dtype)
        return found | self._factors(grad, half.states)

    def _of_sum(self, grad: torch.Tensor, weight: torch.Tensor) -> dict[str, torch.Tensor | None]:
        half, products, order = self.half, self.products, self.products.order
        states, factor = half.states[order.assignment], weight.flatten()[order.assignment][:, None]
        found: dict[str, torch.Tensor | None] = {}
        if "states" in self.needs or "weight" in self.needs:
            back = products.gathered(grad, half.matrices.transpose(1, 2), None)  # without the weight
            if self.update is not None:
                back = add_update(products, back, self.update.backward(grad))
            back = back.to(weight.dtype)
            slope = (back * states).sum(dim=-1, keepdim=True)
            found["weight"] = by_assignment(slope, order).view_as(weight)
            found["states"] = by_assignment((back * factor).to(states.dtype), order)
        weighted = (states * factor).to(states.dtype)
        if "matrices" in self.needs:
            found["matrices"] = products.outer(grad, weighted, half.matrices, "left")
        return found | self._factors(grad, weighted)

    def _factors(self, grad: torch.Tensor, states: torch.Tensor) -> dict[str, torch.Tensor | None]:
        if self.update is None or not {"a", "b"}.intersection(self.needs):
            return {}
        self.update.accumulate(grad, states)
        return FactorGradients(*self.update.gradients())._asdict()


@torch.library.custom_op("modeling_moe::expert_order", mutates_args=())
def expert_order(index: torch.Tensor, num_experts: int, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the fields of [`~modeling_moe.dispatch.expert_order.ExpertOrder`] for `index` (T, K)."""
    order = BACKENDS[backend].order_by_expert(index, num_experts)
    return order.assignment, order.offsets


@expert_order.register_fake
def _(index: torch.Tensor, num_experts: int, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    return index.new_empty(index.numel(), dtype=torch.int32), index.new_empty(num_experts + 1, dtype=torch.int32)


@torch.library.custom_op("modeling_moe::half_experts", mutates_args=())
def half_experts(
    tensors: Sequence[torch.Tensor],
    layout: str,
    scaling: float,
    assignment: torch.Tensor,
    offsets: torch.Tensor,
    top_k: int,
    backend: str,
) -> torch.Tensor:
    """Computes a [`Half`].

    Args:
        tensors, layout, scaling: the half, as [`Half.of`] takes it.
        assignment, offsets: the expert order.
        top_k: the number K of experts per token.
        backend: a key of [`~modeling_moe.dispatch.backends.BACKENDS`] that multiplies by single matrices.

    Returns:
        (A, N) in the order of the assignments without a weight, else (T, N); in the dtype of the states.
    """
    half = Half.of(tensors, layout, scaling)
    if not len(assignment):
        return half.states.new_zeros(len(half.states), half.matrices.shape[1])
    products = BACKENDS[backend].products(ExpertOrder(assignment, offsets), top_k)
    with torch.autocast(half.states.device.type, enabled=False):
        return _HalfPass(half, products).forward()


@half_experts.register_fake
def _(
    tensors: Sequence[torch.Tensor],
    layout: str,
    scaling: float,
    assignment: torch.Tensor,
    offsets: torch.Tensor,
    top_k: int,
    backend: str,
) -> torch.Tensor:
    half = Half.of(tensors, layout, scaling)
    rows = len(half.states) * top_k if half.weight is None else len(half.weight)
    return half.states.new_empty(rows, half.matrices.shape[1])


@torch.library.custom_op("modeling_moe::half_experts_backward", mutates_args=())
def half_experts_backward(
    tensors: Sequence[torch.Tensor],
    layout: str,
    scaling: float,
    assignment: torch.Tensor,
    offsets: torch.Tensor,
    top_k: int,
    backend: str,
    grad: torch.Tensor,
    needs: Sequence[bool],
) -> list[torch.Tensor]:
    """Computes the gradients of [`half_experts`] that `needs` asks for, in the order of `tensors`."""
    names = [name for name, needed in zip(layout.split(), needs, strict=True) if needed]
    half = Half.of(tensors, layout, scaling)
    if not len(assignment):
        return [torch.zeros_like(tensor) for tensor, needed in zip(tensors, needs, strict=True) if needed]
    products = BACKENDS[backend].products(ExpertOrder(assignment, offsets), top_k)
    with torch.autocast(half.states.device.type, enabled=False):
        found = _HalfPass(half, products, names).backward(grad.contiguous())
    return [gradient for name in names if (gradient := found[name]) is not None]


@half_experts_backward.register_fake
def _(
    tensors: Sequence[torch.Tensor],
    layout: str,
    scaling: float,
    assignment: torch.Tensor,
    offsets: torch.Tensor,
    top_k: int,
    backend: str,
    grad: torch.Tensor,
    needs: Sequence[bool],
) -> list[torch.Tensor]:
    return [torch.empty_like(tensor) for tensor, needed in zip(tensors, needs, strict=True) if needed]


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    tensors, ctx.layout, ctx.scaling, assignment, offsets, ctx.top_k, ctx.backend = inputs
    ctx.save_for_backward(assignment, offsets, *tensors)


def _differentiate(ctx: Any, grad: torch.Tensor) -> tuple[list[torch.Tensor | None] | None, ...]:
    needs, *others = ctx.needs_input_grad
    assignment, offsets, *tensors = ctx.saved_tensors  # checkpointing allows one access
    order = assignment, offsets, ctx.top_k, ctx.backend
    computed = iter(half_experts_backward(tensors, ctx.layout, ctx.scaling, *order, grad, needs))
    return [next(computed) if needed else None for needed in needs], *(None for _ in others)


def _refuse(ctx: Any, *_: Any) -> None:
    raise NotImplementedError(
        "The experts' gradient cannot be differentiated again: load the model with experts_implementation='eager'."
    )


half_experts.register_autograd(_differentiate, setup_context=_save)
half_experts_backward.register_autograd(_refuse)


class OperatorProjections:
    """Computes [`~modeling_moe.attention_experts.Projections`] by the back ends of this package.

    Args:
        experts: module with the parameters, `num_experts`, and perhaps `low_rank`, updates by name of a parameter.
        index: (T, K) ids of experts; an id outside [0, E) marks an empty assignment.
        backend: a key of `BACKENDS` to ask for; None for the fastest one.
    """

    def __init__(self, experts: Any, index: torch.Tensor, backend: str | None = None):
        self.experts, self.index, self.asked = experts, index, backend
        self.order: tuple[torch.Tensor, torch.Tensor] | None = None
        self.ids: list[int] | None = None

    def each(self, name: str, states: torch.Tensor) -> torch.Tensor:
        """Returns the product of each assignment, (T, K, N)."""
        tokens, top_k = self.index.shape
        if states.dim() == 3:  # a row for each assignment: as many tokens with one expert each
            alone = OperatorProjections(self.experts, self.index.reshape(-1, 1), self.asked)
            return alone.each(name, states.flatten(0, 1)).flatten(0, 1).unflatten(0, (tokens, top_k))
        half = self._half(name, states, None)
        rows = self._decode(half) if self._decodes(half) else self._compute(half)
        return rows.view(tokens, top_k, rows.shape[1]).to(states.dtype)

    def weighted_sum(self, name: str, states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Returns the sum over a token's assignments of `weight` (T, K) times the product: (T, N)."""
        if states.dim() == 2:
            rows = self.each(name, states).to(weight.dtype)
            return (rows * weight[..., None]).sum(dim=1).to(states.dtype)
        half = self._half(name, states.flatten(0, 1), weight)
        if not self._decodes(half):
            return self._compute(half).to(states.dtype)
        rows = self._decode(half).to(weight.dtype).view(*self.index.shape, -1)
        # no product of matrices, which autocast would compute in its own dtype
        return (rows * weight[..., None]).sum(dim=1).to(states.dtype)

    def _half(self, name: str, states: torch.Tensor, weight: torch.Tensor | None) -> Half:
        """Brings the operands into one dtype, that of autocast or of the matrices, and takes up a low-rank update."""
        matrices: torch.Tensor = getattr(self.experts, name)
        device = states.device.type
        autocast = not states.is_meta and torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else matrices.dtype
        update: LowRank | None = (getattr(self.experts, "low_rank", None) or {}).get(name)
        if weight is not None:
            weight = weight.to(torch.promote_types(dtype, torch.float32)).contiguous()
        return Half(states.to(dtype).contiguous(), matrices.to(dtype), weight, update)

    def _compute(self, half: Half) -> torch.Tensor:
        backend = choose_products(self.asked, half.states, half.matrices).name
        if self.order is None:
            self.order = expert_order(self.index.long(), self.experts.num_experts, backend)
        if half.update is not None:
            half = half._replace(update=half.update.drop(len(half.states)))
        tensors = half.tensors()
        scaling = 1.0 if half.update is None else half.update.scaling
        order = *self.order, self.index.shape[1], backend
        return half_experts(list(tensors.values()), " ".join(tensors), scaling, *order)

    def _decodes(self, half: Half) -> bool:
        """Returns True for a few assignments on a CPU to as many experts, without gradient and without update."""
        tokens, top_k = self.index.shape
        few = 0 < tokens <= DECODE_TOKENS and tokens * top_k <= DECODE_ASSIGNMENTS
        if not few or half.states.device.type != "cpu" or half.update is not None or not is_plain(half.states):
            return False
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in half.tensors().values()):
            return False
        if self.ids is None:
            self.ids = self.index.flatten().tolist()
        return len(set(self.ids)) == len(self.ids)

    def _decode(self, half: Half) -> torch.Tensor:
        """Returns the products (A, N) in the order of the assignments: one matrix after another is read."""
        assert self.ids is not None  # `_decodes` has read them
        rows = half.states.new_empty(len(self.ids), half.matrices.shape[1])
        repeats, number = len(self.ids) // len(half.states), self.experts.num_experts
        for place, expert in enumerate(self.ids):
            if 0 <= expert < number:
                torch.mv(half.matrices[expert], half.states[place // repeats], out=rows[place])
            else:
                rows[place].zero_()
        return rows
