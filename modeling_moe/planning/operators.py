# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module gives the arithmetic, the moved bytes and the scratch memory of one call of an operator.

# T tokens, K experts per token, A = T*K assignments, E experts, H hidden size, I expert width
# C columns of the first projection; R rank of a low-rank update
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry


EXPERTS = "modeling_moe.experts.default"
EXPERTS_BACKWARD = "modeling_moe.experts_backward.default"
EXPERTS_DECODE = "modeling_moe.experts_decode.default"
FLASH = "aten._scaled_dot_product_flash_attention_for_cpu.default"
FLASH_BACKWARD = "aten._scaled_dot_product_flash_attention_for_cpu_backward.default"
GROUPED_MM = "aten._grouped_mm.default"
# these read from their first tensor only as many elements as they return
GATHERS = {"aten.embedding.default", "aten.index.Tensor", "aten.index_select.default", "aten.gather.default"}
# these return memory without writing to it
UNWRITTEN = {
    "aten.empty.memory_format",
    "aten.empty_like.default",
    "aten.empty_strided.default",
    "aten.new_empty.default",
    "aten.new_empty_strided.default",
}


def bytes_of(tensor: torch.Tensor) -> int:
    """Returns the bytes that reading a tensor moves; an expanded one has fewer than elements times element size."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def expected_experts(num_experts: int, top_k: int, tokens: int) -> float:
    """Returns the expected number of experts that get a token, if each token draws `top_k` of them at random.

    That is E (1 - (1 - K / E)^T).
    """
    return num_experts * (1 - (1 - min(1.0, top_k / num_experts)) ** tokens)


def moved_bytes(
    func: Any, args: Sequence[Any], inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]
) -> int:
    """Returns the bytes that a call reads and writes, each tensor once; 0 if it only makes views."""
    name = str(func)
    if name in UNWRITTEN or not outputs:
        return 0
    if name in (EXPERTS, EXPERTS_BACKWARD, EXPERTS_DECODE):
        return _experts_bytes(name, args, outputs)
    if name in GATHERS:
        return 2 * sum(map(bytes_of, outputs))
    places = {tensor.untyped_storage()._cdata for tensor in inputs}
    if not func._schema.is_mutable and all(output.untyped_storage()._cdata in places for output in outputs):
        return 0
    return sum(map(bytes_of, [*inputs, *outputs]))


def flops_of(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> int:
    """Returns the additions and multiplications of a call's matrix products; 0 for an operator without any."""
    name = str(func)
    if name in OWN_FLOPS:
        return OWN_FLOPS[name](args)
    count = flop_registry.get(func._overloadpacket)
    return int(count(*args, **kwargs, out_val=result)) if count is not None else 0


def scratch_bytes(func: Any, args: Sequence[Any]) -> int:
    """Returns the memory that a call takes and frees, so that no tensor shows it: the experts' fp32 sums (T, H)."""
    if str(func) not in (EXPERTS, EXPERTS_BACKWARD):
        return 0
    x = _named(args)["x"]
    return 4 * x.numel() if x.element_size() < 4 else 0


def _named(args: Sequence[Any]) -> dict[str, torch.Tensor]:
    """Returns the tensors of an [`~modeling_moe.dispatch.problem.ExpertsProblem`] by name."""
    tensors, layout = args[0], args[1]
    return dict(zip(layout.split(), tensors, strict=True))


def _experts_bytes(name: str, args: Sequence[Any], outputs: Sequence[torch.Tensor]) -> int:
    """Returns the bytes of a call of the experts, which reads the matrices of the experts with tokens alone."""
    tensors = _named(args)
    num_experts, (tokens, top_k) = len(tensors["up"]), tensors["weight"].shape
    share = expected_experts(num_experts, top_k, tokens) / num_experts
    moved = sum(map(bytes_of, outputs))
    for part, tensor in tensors.items():
        of_experts = tensor.shape[:1] == (num_experts,) and part not in ("x", "weight")
        moved += round(bytes_of(tensor) * share) if of_experts else bytes_of(tensor)
    if name == EXPERTS_BACKWARD:
        moved += sum(map(bytes_of, args[4:8]))
    return moved


def _experts_flops(args: Sequence[Any]) -> int:
    """Returns the arithmetic of the experts' forward pass: 2 A (C H + H I), and both products of each update."""
    tensors = _named(args)
    assignments = tensors["weight"].numel()
    return 2 * assignments * sum(map(sum, _products(tensors)))


def _products(tensors: Mapping[str, torch.Tensor]) -> tuple[list[int], list[int]]:
    """Returns the elements per expert of the two matrices, and those of the factors of their updates."""
    num_experts = len(tensors["up"])
    matrices = [tensors[name].numel() // num_experts for name in ("up", "down")]
    factors = [
        tensors[f"{name}_{factor}"].numel() // num_experts
        for name in ("up", "down")
        for factor in ("a", "b")
        if f"{name}_{factor}" in tensors
    ]
    return matrices, factors


def _experts_backward_flops(args: Sequence[Any]) -> int:
    """Returns the arithmetic of the experts' backward pass.

    The gradients of the rows take as much as the forward pass, and so do those of matrices and of factors that train;
    the first projection is computed again where it was not kept.
    """
    tensors, needs, h = _named(args), dict(zip(args[1].split(), args[9], strict=True)), args[5]
    assignments, num_experts = tensors["weight"].numel(), len(tensors["up"])
    (up, down), factors = _products(tensors)
    elements = up + down + sum(factors) + up * (not h.numel())
    trained = ("up", "down", "up_a", "up_b", "down_a", "down_b")
    elements += sum(tensors[name].numel() // num_experts for name in trained if needs.get(name))
    return 2 * assignments * elements


def _attention_flops(args: Sequence[Any]) -> int:
    """Returns the arithmetic of attention's two products; a causal one skips half of the scores."""
    return _attention_products(*args[:3], causal=len(args) > 4 and bool(args[4]))


def _attention_backward_flops(args: Sequence[Any]) -> int:
    """Returns the arithmetic of attention's gradient, five products in the place of the two of the forward pass."""
    return _attention_products(*args[1:4], causal=bool(args[7])) * 5 // 2


def _attention_products(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, causal: bool) -> int:
    batch, heads, queries, width = query.shape
    total = 2 * batch * heads * queries * key.shape[2] * (width + value.shape[3])
    return total // 2 if causal and queries > 1 else total


def _grouped_flops(args: Sequence[Any]) -> int:
    """Returns the arithmetic of a grouped product, in which each row meets one matrix."""
    return 2 * args[0].numel() * args[1].shape[-1]


OWN_FLOPS: dict[str, Callable[[Sequence[Any]], int]] = {
    EXPERTS: _experts_flops,
    EXPERTS_DECODE: _experts_flops,
    EXPERTS_BACKWARD: _experts_backward_flops,
    FLASH: _attention_flops,
    FLASH_BACKWARD: _attention_backward_flops,
    GROUPED_MM: _grouped_flops,
}
