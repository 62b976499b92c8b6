"""Back ends compute experts that lie in slots, in any order, with the bits of experts that lie at their ids."""

import pytest
import torch

from modeling_moe.dispatch.backends import BACKENDS
from modeling_moe.dispatch.operator import experts
from modeling_moe.dispatch.problem import ExpertsProblem, Needs
from modeling_moe.dispatch.rounds import by_slot, expert_of_slot
from tests.dispatch.kinds import NEEDS_NATIVE


TOKENS, EXPERTS, TOP_K, HIDDEN, WIDTH = 30, 6, 2, 32, 24
# five of the six experts lie in seven slots
SLOTS = [4, -1, 0, 6, 2, 3]


def problems(requires_grad: bool = False) -> tuple[ExpertsProblem, ExpertsProblem, torch.Tensor]:
    """Returns a problem, the same with the matrices in slots, and ids of experts that are in slots."""
    generator = torch.Generator().manual_seed(0)

    def normal(*size):
        return torch.randn(*size, generator=generator)

    up, down = normal(EXPERTS, 2 * WIDTH, HIDDEN), normal(EXPERTS, HIDDEN, WIDTH)
    up_bias, down_bias = normal(EXPERTS, 2 * WIDTH), normal(EXPERTS, HIDDEN)
    x, weight = normal(TOKENS, HIDDEN), torch.rand(TOKENS, TOP_K, generator=generator)
    plain = ExpertsProblem(x, weight, up, down, up_bias, down_bias, "silu_gated", [])

    def placed(tensor):
        memory = torch.full((7, *tensor.shape[1:]), float("nan"))
        for expert, slot in enumerate(SLOTS):
            if slot >= 0:
                memory[slot] = tensor[expert]
        return memory.requires_grad_(requires_grad)

    slotted = plain._replace(
        up=placed(up),
        down=placed(down),
        up_bias=placed(up_bias),
        down_bias=placed(down_bias),
        slots=torch.tensor(SLOTS, dtype=torch.int32),
    )
    # expert 1 is in no slot, and E marks an empty assignment
    index = torch.tensor([0, 2, 3, 4, 5, EXPERTS])[torch.randint(6, (TOKENS, TOP_K), generator=generator)]
    return plain, slotted, index


@pytest.mark.parametrize("name", [pytest.param("native", marks=NEEDS_NATIVE), "loop"])
def test_outputs_and_gradients_have_the_bits(name):
    backend, (plain, slotted, index) = BACKENDS[name], problems()
    order, needs = backend.order_by_expert(index, EXPERTS), Needs(x=True, weight=True)
    grad = torch.randn(TOKENS, HIDDEN)
    for keep_h in (True, False):
        expected, got = (backend.forward(problem, order, keep_h) for problem in (plain, slotted))
        assert torch.equal(got.output, expected.output)
        for kind in ("x", "weight"):
            mine = backend.backward(slotted, order, grad, got.h, needs)
            theirs = backend.backward(plain, order, grad, expected.h, needs)
            assert torch.equal(getattr(mine, kind), getattr(theirs, kind))
    few = [problem._replace(x=problem.x[:5], weight=problem.weight[:5]) for problem in (plain, slotted)]
    assert torch.equal(backend.decode(few[1], index[:5]), backend.decode(few[0], index[:5]))


@pytest.mark.parametrize("name", [pytest.param("native", marks=NEEDS_NATIVE), "loop"])
def test_the_operator_keeps_the_slots(name):
    plain, slotted, index = problems()
    expected, got = (experts(*problem.flatten(), index, name, False)[0] for problem in (plain, slotted))
    assert torch.equal(got, expected)


@pytest.mark.parametrize("name", [pytest.param("native", marks=NEEDS_NATIVE), "loop"])
def test_matrices_in_slots_get_no_gradient(name):
    _, slotted, index = problems(requires_grad=True)
    output = experts(*slotted.flatten(), index, name, False)[0]
    with pytest.raises(ValueError, match="matrices in slots get no gradient"):
        output.sum().backward()


def test_slots_take_the_place_of_experts():
    _, slotted, index = problems()
    problem, places = by_slot(slotted, index)
    assert problem.num_experts == 7
    for expert, place in zip(index.flatten().tolist(), places.flatten().tolist(), strict=True):
        assert place == (7 if expert == EXPERTS else SLOTS[expert])
    assert expert_of_slot(slotted).tolist() == [2, 0, 4, 5, 0, 0, 3]
