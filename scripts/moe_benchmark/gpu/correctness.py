# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module is part `correctness`: it checks the operator within models, which tests of single kernels do not
cover.
"""

import os
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from modeling_moe.dispatch import backend_of
from modeling_moe.dispatch.backend import DECODE_TOKENS

from ..workloads import experts_in
from . import adapters, capturing
from .compilations import specialisations
from .models import distances, gradients_of, half_of, make_ids, make_model, worst_difference
from .results import Results
from .sizes import Size


TOLERANCE = 1e-4
# largest ratio of the distances from the float32 gradients: this package in 16 bits over eager in 16 bits
HALF_FACTOR = 3.0
IMPLEMENTATIONS = ("moe", "moe_grouped_mm", "grouped_mm")


def run(results: Results, size: Size) -> None:
    """Runs each of `CHECKS`; a failure is recorded, and the other checks run."""
    # set before the first product: cuBLAS returns equal bits in each run only with a fixed workspace
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    for check in CHECKS:
        name = check.__name__.replace("_", " ")
        if results.late():
            results.put(not_run=name)
            continue
        with results.attempt(check=name):
            check(results, size)


def back_end(results: Results, size: Size) -> None:
    """Checks that Triton computes the experts in each dtype, in training and in decoding."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        experts = make_model(size, dtype).model.sparse_blocks()[0].experts
        for tokens, expected in ((4 * DECODE_TOKENS, "triton"), (1, "triton (decode)")):
            x = torch.zeros(tokens, size.model["hidden_size"], device="cuda", dtype=dtype)
            index = torch.zeros(tokens, size.model["num_experts_per_tok"], device="cuda", dtype=torch.long)
            with torch.set_grad_enabled(tokens > 1):
                served = backend_of(experts, x, index)
            results.check(f"the back end is {expected}", served == expected, dtype=str(dtype), backend=served)


def gradients_in_float32(results: Results, size: Size) -> None:
    """Checks that a model's float32 gradients equal those of transformers' eager loop over the experts."""
    model, ids = make_model(size), make_ids(size)
    model.set_experts_implementation("eager")
    expected = gradients_of(model, ids)
    for name in IMPLEMENTATIONS:
        with results.attempt(check=f"gradients in float32, {name}"):
            model.set_experts_implementation(name)
            quantity, worst = worst_difference(gradients_of(model, ids), expected)
            passed = worst <= TOLERANCE
            results.check(f"gradients in float32, {name}", passed, worst=worst, of=quantity, at_most=TOLERANCE)


def gradients_in_16_bits(results: Results, size: Size) -> None:
    """Checks that each 16-bit gradient is about as far from the float32 gradient as with transformers' eager loop.

    A tolerance for each element would fail where rounding changes the router's choice of an expert.
    """
    model, ids = make_model(size, half_of(size)), make_ids(size)
    exact = make_model(size)
    exact.load_state_dict(model.state_dict())
    exact.set_experts_implementation("eager")
    expected = gradients_of(exact, ids)
    model.set_experts_implementation("eager")
    eager = distances(gradients_of(model, ids), expected)
    usual = statistics.median(eager.values())
    for name in IMPLEMENTATIONS:
        with results.attempt(check=f"gradients in {size.half}, {name}"):
            model.set_experts_implementation(name)
            apart = distances(gradients_of(model, ids), expected)
            ratios = {quantity: value / max(eager[quantity], usual) for quantity, value in apart.items()}
            # a NaN is worse than any other value
            worst = max(ratios, key=lambda quantity: (ratios[quantity] != ratios[quantity], ratios[quantity]))
            found = {"distance": apart[worst], "eager": eager[worst], "of": worst, "ratio": ratios[worst]}
            results.check(f"gradients in {size.half}, {name}", ratios[worst] <= HALF_FACTOR, **found)


@contextmanager
def synchronisation_refused() -> Iterator[None]:
    """Makes every wait for the GPU an error."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def no_synchronisation(results: Results, size: Size) -> None:
    """Checks that forward, backward and decoding never wait for the GPU: experts alone, then with their router."""
    block = make_model(size, half_of(size)).model.layers[0].mlp
    tokens, hidden = size.batch[0] * size.batch[1], size.model["hidden_size"]
    experts, top_k = size.model["num_experts"], size.model["num_experts_per_tok"]
    x = torch.randn(tokens, hidden, device="cuda", dtype=half_of(size), requires_grad=True)
    index = torch.rand(tokens, experts, device="cuda").topk(top_k).indices
    weight = torch.rand(tokens, top_k, device="cuda", requires_grad=True)
    few = torch.randn(2, hidden, device="cuda", dtype=half_of(size))

    def train_experts() -> None:
        block.experts(x, index, weight).sum().backward()

    def decode_experts() -> None:
        with torch.no_grad():
            block.experts(few, index[:2], weight[:2].detach())

    def train_block() -> None:
        block(x[None])[0].sum().backward()

    passes: dict[str, Callable[[], None]] = {
        "experts, forward and backward": train_experts,
        "experts, decoding": decode_experts,
        "block with its router, forward and backward": train_block,
    }
    for name, call in passes.items():
        with results.attempt(check=f"no synchronisation: {name}"):
            call()  # the first call compiles
            with synchronisation_refused():
                call()
            results.check(f"no synchronisation: {name}", True)


def generation(results: Results, size: Size) -> None:
    """Checks that greedy generation in float32 gives the tokens of transformers' eager loop."""
    model, ids = make_model(size).eval(), make_ids(size)[:2, :8]
    tokens = {}
    for name in ("moe", "eager"):
        model.set_experts_implementation(name)
        tokens[name] = model.generate(ids, max_new_tokens=size.new_tokens, do_sample=False, pad_token_id=0)
    equal = tokens["moe"].shape == tokens["eager"].shape and bool((tokens["moe"] == tokens["eager"]).all())
    results.check("generated tokens equal those of eager", equal, shape=list(tokens["moe"].shape))


def no_compilation_later(results: Results, size: Size) -> None:
    """Checks that after one step in each range of the tile table no number of tokens needs another compilation."""
    experts = experts_in(make_model(size, half_of(size)))[0]
    number, top_k = size.model["num_experts"], size.model["num_experts_per_tok"]

    def step(tokens: int) -> None:
        x = torch.randn(tokens, size.model["hidden_size"], device="cuda", dtype=half_of(size), requires_grad=True)
        index = torch.rand(tokens, number, device="cuda").topk(top_k).indices
        experts(x, index, torch.rand(tokens, top_k, device="cuda", requires_grad=True)).sum().backward()

    largest = 4 * size.batch[0] * size.batch[1]
    with specialisations() as first:
        for tokens in {2**power for power in range(largest.bit_length())}:
            step(tokens)
    counts = torch.randint(1, largest, (size.steps,), generator=torch.Generator().manual_seed(0)).tolist()
    with specialisations() as later:
        for tokens in counts:
            step(tokens)
    results.check(
        "nothing is compiled after the first steps",
        not later,
        first=len(first),
        later=sorted(set(later)),
        steps=size.steps,
    )


CHECKS: tuple[Callable[[Results, Size], None], ...] = (
    back_end,
    gradients_in_float32,
    no_synchronisation,
    generation,
    adapters.lora_as_peft,
    gradients_in_16_bits,
    no_compilation_later,
    # last, because an aborted capture may leave the process unusable
    capturing.training_step_in_a_graph,
    capturing.compiled,
    adapters.four_bits,
)
