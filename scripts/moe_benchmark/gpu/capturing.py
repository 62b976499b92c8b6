# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module holds checks of part `correctness`: a training step as a CUDA graph, and under `torch.compile`."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .models import half_of, make_ids, make_model, worst_difference
from .results import Results
from .sizes import Size


WARM, STEPS = 2, 2
TOLERANCE = 1e-4


class Training:
    """Holds a module with its optimizer, one step of which may become a CUDA graph.

    Attributes:
        inputs: tensor that each step reads; new inputs are copied into it.
    """

    def __init__(
        self, module: nn.Module, loss: Callable[[nn.Module, torch.Tensor], torch.Tensor], inputs: torch.Tensor
    ):
        self.module, self.loss, self.inputs = module, loss, inputs.clone()
        self.optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3, fused=True, capturable=True)

    def step(self) -> None:
        """Runs forward, backward, and the update of all parameters."""
        self.optimizer.zero_grad(set_to_none=True)
        self.loss(self.module, self.inputs).backward()
        self.optimizer.step()

    def state(self) -> dict[str, torch.Tensor]:
        """Returns parameters and the optimizer's moments, by name."""
        found = dict(self.module.named_parameters())
        for name, parameter in self.module.named_parameters():
            for key, tensor in self.optimizer.state[parameter].items():
                found[f"{name} {key}"] = tensor
        return {name: tensor.detach() for name, tensor in found.items()}


def capture(call: Callable[[], Any]) -> Callable[[], None]:
    """Captures a call as a CUDA graph without running it; the call must have run before on a side stream."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


@contextmanager
def side_stream() -> Iterator[None]:
    """Runs the body on a side stream, which a later capture requires."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        yield
    torch.cuda.current_stream().wait_stream(side)


@contextmanager
def deterministic() -> Iterator[None]:
    """Makes torch's own operators return equal bits in each run."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def _block_loss(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return block(x)[0].float().square().mean()


def _model_loss(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def training_step_in_a_graph(results: Results, size: Size) -> None:
    """Checks that steps replayed from a graph leave the bits of eager steps: of a sparse block, then of a whole
    model.
    """
    model = make_model(size, half_of(size))
    block = copy.deepcopy(model.model.layers[0].mlp)
    shape = (*size.batch, size.model["hidden_size"])
    states = [torch.randn(shape, device="cuda", dtype=half_of(size)) for _ in range(1 + STEPS)]
    ids = [make_ids(size, seed) for seed in range(1 + STEPS)]
    for name, module, loss, inputs in (("block", block, _block_loss, states), ("model", model, _model_loss, ids)):
        with results.attempt(check=f"training step of a {name} in a CUDA graph"), deterministic():
            different = _different_bits(module, loss, inputs)
            results.check(f"training step of a {name} in a CUDA graph", not different, different=different[:5])


def _different_bits(
    module: nn.Module, loss: Callable[[nn.Module, torch.Tensor], torch.Tensor], inputs: list[torch.Tensor]
) -> list[str]:
    """Returns the tensors that differ between a module trained eagerly and one trained by a graph, on equal inputs."""
    eager, captured = (Training(copy.deepcopy(module), loss, inputs[0]) for _ in range(2))
    for _ in range(WARM):
        eager.step()
    with side_stream():
        for _ in range(WARM):
            captured.step()
        # without gradients before the capture, they are allocated in the graph's memory
        captured.optimizer.zero_grad(set_to_none=True)
    replay = capture(captured.step)
    for new in inputs[1:]:
        eager.inputs.copy_(new)
        captured.inputs.copy_(new)
        eager.step()
        replay()
    torch.cuda.synchronize()
    expected, got = eager.state(), captured.state()
    return [name for name in expected if not torch.equal(expected[name], got[name])]


def compiled(results: Results, size: Size) -> None:
    """Checks that a sparse block gives equal outputs and gradients with and without `torch.compile(fullgraph=True)`."""
    block = make_model(size).model.layers[0].mlp
    x = torch.randn(*size.batch, size.model["hidden_size"], device="cuda", requires_grad=True)
    direction = torch.randn_like(x)

    def passed(call: Callable[[torch.Tensor], tuple[torch.Tensor, object]]) -> dict[str, torch.Tensor]:
        names, parameters = zip(*block.named_parameters(), strict=True)
        output, _ = call(x)
        found = torch.autograd.grad((output * direction).sum(), [x, *parameters])
        return {"output": output.detach(), **dict(zip(("x", *names), found, strict=True))}

    expected = passed(block)
    quantity, worst = worst_difference(passed(torch.compile(block, fullgraph=True)), expected)
    results.check("torch.compile, fullgraph", worst <= TOLERANCE, worst=worst, of=quantity, at_most=TOLERANCE)
