# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module records what the operators of a run cost: arithmetic, bytes moved, and the memory that is live.

A run on fake tensors (`torch._subclasses.FakeTensorMode`) calls the operators of the real run with their shapes and
dtypes, and computes nothing. Memory is tracked as torch's own `MemTracker` does it, by the life of each storage.
"""

import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .operators import flops_of, moved_bytes, scratch_bytes


class OperatorCost(NamedTuple):
    """The cost of one call of an operator.

    Attributes:
        name: name of the operator.
        flops: number of additions and multiplications of matrix products; 0 for other operators.
        nbytes: bytes that are read and written; 0 for an operator that only makes a view.
    """

    name: str
    flops: int
    nbytes: int


@dataclass
class RunCost:
    """What one run of a model costs.

    Attributes:
        operators: the calls that move bytes, in order.
        peak: largest number of bytes that tensors made in the run took at one time, gradients of weights included.
        activation_peak: largest number of bytes without the gradients of weights that are complete.
    """

    operators: list[OperatorCost] = field(default_factory=list)
    peak: int = 0
    activation_peak: int = 0

    @property
    def flops(self) -> int:
        """Number of additions and multiplications of all matrix products."""
        return sum(operator.flops for operator in self.operators)

    @property
    def nbytes(self) -> int:
        """Bytes that all operators read and write."""
        return sum(operator.nbytes for operator in self.operators)


class CostRecorder(TorchDispatchMode):
    """Records the operators that run inside the block, and the memory of the tensors that they make.

    Args:
        existing: tensors from before the run, such as weights, whose memory is not counted.

    Attributes:
        cost: what was recorded.
    """

    def __init__(self, existing: Iterable[torch.Tensor]):
        super().__init__()
        self.cost = RunCost()
        self._live = self._gradients = 0
        self._storages: dict[int, weakref.ref[Any]] = {}
        for tensor in existing:
            storage = tensor.untyped_storage()
            self._storages[storage._cdata] = weakref.ref(storage)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operator and records its cost."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func.namespace == "prim":
            return result  # a question about a device, which costs nothing
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        for output in outputs:
            self._count(output)
        live = self._live + scratch_bytes(func, args)
        self.cost.activation_peak = max(self.cost.activation_peak, live)
        self.cost.peak = max(self.cost.peak, live + self._gradients)
        if moved := moved_bytes(func, args, inputs, outputs):
            self.cost.operators.append(OperatorCost(str(func), flops_of(func, args, kwargs, result), moved))
        return result

    def drop_gradient(self, parameter: torch.Tensor) -> None:
        """Frees the gradient of a weight, and counts it as kept; a hook for `register_post_accumulate_grad_hook`."""
        if parameter.grad is not None:
            self._gradients += parameter.grad.numel() * parameter.grad.element_size()
            parameter.grad = None

    def _count(self, tensor: torch.Tensor) -> None:
        """Counts a tensor's storage as live until it is freed."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        known = self._storages.get(key)
        if known is not None and known() is not None:
            return

        def free(reference: object) -> None:
            self._live -= size
            if self._storages.get(key) is reference:
                del self._storages[key]

        self._storages[key] = weakref.ref(storage, free)
        self._live += size
