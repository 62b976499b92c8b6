# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""These tests compare random experts, shapes, dtypes and layouts with the oracle and keep faults that were found."""

import random
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from tests.dispatch.kinds import OURS, THEIRS, make, oracle, run


IMPLEMENTATIONS = ["moe", "moe_loop", "moe_grouped_mm"]
INDEX_DTYPES = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
# of the largest value of each tensor
TOLERANCES = {torch.float32: 2e-5, torch.float16: 2e-2, torch.bfloat16: 6e-2}
# of what every tensor is compared with: far out an activation is all rounding
SMALLEST = 1e-2
# the derivative of these jumps, so that rounding decides which side of the jump an activation is on
JUMPS = ("relu-bias", "clamped", "gpt_oss")


@dataclass(frozen=True)
class Case:
    """Case is one random problem, determined by a number."""

    number: int
    kind: str
    implementation: str
    experts: int
    top_k: int
    tokens: int
    hidden: int
    width: int
    dtype: torch.dtype
    index_dtype: torch.dtype
    load: str
    layout: str
    train: bool
    tanh: bool
    large: bool

    @classmethod
    def draw(cls, number: int) -> "Case":
        """Draws case `number`."""
        chance = random.Random(number)
        experts = chance.choice([1, 2, 3, 5, 16, 120])
        kind = chance.choice([*OURS, *THEIRS])
        return cls(
            number=number,
            kind=kind,
            implementation=chance.choice(IMPLEMENTATIONS),
            experts=experts,
            top_k=chance.randint(1, min(experts, 6)),
            tokens=chance.choice([0, 1, 1, 2, 3, 7, 17, 40]),
            hidden=chance.choice([8, 16, 17, 32, 64]),
            width=chance.choice([1, 5, 8, 16, 24, 33]),
            dtype=chance.choice(list(TOLERANCES)),
            index_dtype=chance.choice(INDEX_DTYPES),
            load=chance.choice(["even", "even", "one expert", "empty assignments", "all empty"]),
            layout=chance.choice(["contiguous", "transposed", "one row repeated", "columns of a wider tensor"]),
            train=chance.random() < 0.6,
            tanh=chance.random() < 0.1 and kind in OURS and kind != "clamped",
            # squares of large numbers are more than fp16 can hold
            large=chance.random() < 0.1 and kind != "relu2",
        )

    def inputs(self) -> tuple[torch.Tensor, ...]:
        """Draws tokens (T, H), with NaN where no expert takes them, ids and weights (T, K), and a direction (T, H)."""
        torch.manual_seed(self.number)
        shape = (self.tokens, self.hidden)
        states = {
            "contiguous": lambda: torch.randn(shape),
            "transposed": lambda: torch.randn(shape[::-1]).T,
            "one row repeated": lambda: torch.randn(1, self.hidden).expand(shape),
            "columns of a wider tensor": lambda: torch.randn(self.tokens, 2 * self.hidden)[:, ::2],
        }[self.layout]()
        index = torch.rand(self.tokens, self.experts).argsort(dim=-1)[:, : self.top_k]
        if self.load == "one expert":
            index[:, 0], index[:, 1:] = self.experts - 1, self.experts
        elif self.load == "empty assignments":
            index = index.where(torch.rand(index.shape) < 0.6, self.experts)
        elif self.load == "all empty":
            index = torch.full_like(index, self.experts)
        idle = (index >= self.experts).all(dim=-1)
        if idle.any() and self.layout != "one row repeated":
            states[idle] = torch.nan
        weight, direction = torch.rand(index.shape), torch.randn(shape)
        if self.large:
            states = 20 * states
        states, direction = states.to(self.dtype), direction.to(self.dtype)
        return states, index.to(self.index_dtype), weight, direction

    def experts_module(self) -> nn.Module:
        """Returns the experts, whatever back end serves them in the end."""
        sizes = {"experts": self.experts, "hidden": self.hidden, "width": self.width}
        module = make(self.kind, self.implementation, dtype=self.dtype, **sizes)
        module._forward_pre_hooks.clear()
        if self.tanh:
            module.act_fn = nn.Tanh()
        return module


def expected_results(case: Case, module, states, index, weight, direction) -> list[torch.Tensor]:
    """Returns the oracle's output and gradients; it takes an empty assignment for one to the first expert with weight 0."""
    empty = index.long() == case.experts
    index, weight = index.long().where(~empty, 0), weight.where(~empty, 0.0)
    if not case.tokens:
        return [states.double(), states.double(), weight, *(torch.zeros_like(p) for p in module.parameters())]
    output, grad_states, grad_weight, *others = oracle(module, states.nan_to_num(0.0), index, weight, direction)
    return [output, grad_states, grad_weight.where(~empty, 0.0), *others]


def error_of_eager(case: Case, place: int, theirs: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
    """Returns how far the class's own loop is from the oracle in the dtype of the case, as `check` measures it."""
    module = case.experts_module()
    module.config._experts_implementation = "eager"
    states, index, weight, direction = inputs
    empty = index.long() == case.experts
    index, weight = index.long().where(~empty, 0), weight.where(~empty, 0.0)
    difference = run(module, states.nan_to_num(0.0), index, weight, direction)[place].double() - theirs
    return difference.norm() if case.kind in JUMPS else difference.abs().max()


def check(case: Case) -> None:
    """Compares output and gradients with the oracle's, in the dtype's tolerance."""
    module, (states, index, weight, direction) = case.experts_module(), case.inputs()
    expected = expected_results(case, module, states, index, weight, direction)
    # an activation that only the class's own loop serves gives no gradient where it serves nothing
    if not case.train or (case.tanh and (index.long() == case.experts).all()):
        with torch.no_grad():
            got = [module(states, index, weight)]
    else:
        got = run(module, states, index, weight, direction)
    for place, (mine, theirs) in enumerate(zip(got, expected, strict=False)):
        assert mine.shape == theirs.shape, (case, place)
        assert not mine.isnan().any(), (case, place)
        error, scale = (mine.double() - theirs).norm(), max(theirs.norm().item(), SMALLEST)
        if case.kind not in JUMPS and theirs.numel():
            # place 2 is a weight's gradient, a sum of products whose signs differ
            smallest = 10 * SMALLEST if place == 2 else SMALLEST
            error, scale = (mine.double() - theirs).abs().max(), max(theirs.abs().max().item(), smallest)
        tolerance = TOLERANCES[case.dtype] * (5 if case.kind in JUMPS and place else 1)
        if error > tolerance * scale:
            # where the problem itself is ill-conditioned, the plain loop in this dtype is as far off
            assert error <= 3 * error_of_eager(case, place, expected[place], states, index, weight, direction), (
                case,
                place,
                error.item() / scale,
            )


@pytest.mark.parametrize("start", range(0, 120, 40))
def test_random_experts_equal_the_oracle(start):
    for number in range(start, start + 40):
        check(Case.draw(number))


@pytest.mark.slow
@pytest.mark.parametrize("start", range(0, 13000, 1000))
def test_thousands_of_random_experts_equal_the_oracle(start):
    for number in range(start, start + 1000):
        check(Case.draw(number))


@pytest.mark.parametrize("dtype", INDEX_DTYPES, ids=str)
@pytest.mark.parametrize("implementation", ["eager", *IMPLEMENTATIONS])
def test_ids_of_any_integer_dtype_are_experts_and_empty_assignments(dtype, implementation):
    """ids are converted first: int8 has no room for the number of experts, and torch takes uint8 for a mask."""
    module = make("gated", implementation, experts=120, dtype=torch.float32)
    module._forward_pre_hooks.clear()
    states, weight = torch.randn(20, module.down_proj.shape[1]), torch.rand(20, 2)
    index = torch.stack([torch.randperm(120)[:2] for _ in range(20)])
    index[3, 1], index[5] = 120, 120
    with torch.no_grad():
        torch.testing.assert_close(module(states, index.to(dtype), weight), module(states, index, weight))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_one_token_with_an_expert_chosen_twice_decodes_by_loop(dtype):
    """The loop copies a repeated row, whose stride 0 oneDNN does not take."""
    module = make("gated", "moe_loop", dtype=dtype)
    states, index, weight = torch.randn(1, 32, dtype=dtype), torch.tensor([[2, 2, 4]]), torch.rand(1, 3)
    expected = oracle(module, states, index, weight, torch.ones(1, 32))[0]
    with torch.no_grad():
        torch.testing.assert_close(module(states, index, weight).double(), expected, atol=0.1, rtol=0.02)


@pytest.mark.parametrize("width", [1, 5])
@pytest.mark.parametrize("implementation", ["moe", "moe_grouped_mm"])
def test_a_custom_activation_needs_no_rows_of_sixteen_bytes(width, implementation):
    """The class's own loop computes narrow experts, whose strides torch's grouped_mm refuses."""
    module = make("plain", implementation, width=width, dtype=torch.bfloat16)
    module._forward_pre_hooks.clear()
    module.act_fn = nn.Tanh()
    states, index, weight = torch.randn(7, 32).bfloat16(), torch.randint(5, (7, 1)), torch.rand(7, 1)
    got = run(module, states, index, weight, torch.ones(7, 32).bfloat16())
    for mine, theirs in zip(got, oracle(module, states, index, weight, torch.ones(7, 32)), strict=True):
        torch.testing.assert_close(mine.double(), theirs, atol=0.05 * theirs.abs().max().item(), rtol=0)


@pytest.mark.parametrize("scale", [1.0, 50.0])
def test_a_custom_activation_is_as_right_in_fp16_as_the_plain_loop(scale):
    """The class's own loop serves CPUs, where transformers' grouped_mm was wrong by up to 1.0 at large inputs."""
    module = make("gated", "moe", dtype=torch.float16)
    module.act_fn, eager = nn.Tanh(), make("gated", "eager", dtype=torch.float16)
    module._forward_pre_hooks.clear()
    eager.act_fn = nn.Tanh()
    states, weight = scale * torch.randn(40, 32).half(), torch.rand(40, 2)
    index, direction = torch.randint(5, (40, 2)), torch.randn(40, 32).half()
    for mine, theirs in zip(
        run(module, states, index, weight, direction), run(eager, states, index, weight, direction), strict=True
    ):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", ["clamped", "gpt_oss"])
def test_a_gate_exactly_at_its_limit_passes_its_gradient_in_every_back_end(kind, implementation):
    """A gate exactly at the limit has a gradient, as torch's clamp gave it before 2.15; later releases give 0."""
    module = make(kind, implementation, experts=1, hidden=8, width=8, dtype=torch.float32)
    limit = module.gate_clamp[1] if kind == "clamped" else module.limit
    alpha = module.gate_clamp[0] if kind == "clamped" else module.alpha
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
        module.gate_up_proj_bias.fill_(limit)
        module.down_proj.fill_(1.0)
    inputs = torch.randn(5, 8), torch.zeros(5, 1, dtype=torch.long), torch.ones(5, 1), torch.ones(5, 8)
    got = dict(
        zip(["output", "states", "weight", *dict(module.named_parameters())], run(module, *inputs), strict=True)
    )
    gate = torch.full((), float(limit), dtype=torch.float64, requires_grad=True)
    up = torch.full((), float(limit), dtype=torch.float64, requires_grad=True)
    # 5 tokens, each of whose 8 outputs has the gradient 1
    (40 * (up + 1) * gate * torch.sigmoid(alpha * gate)).backward()
    expected = torch.cat([gate.grad.expand(8), up.grad.expand(8)])
    if kind == "gpt_oss":
        expected = expected.view(2, 8).T.flatten()
    torch.testing.assert_close(got["gate_up_proj_bias"][0].double(), expected, atol=1e-3, rtol=1e-5)
