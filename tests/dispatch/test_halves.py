"""The products of experts inside attention equal the plain ones in values and gradients, on every back end that has them."""

import pytest
import torch

from modeling_moe.attention_experts import PROJECTIONS, AttentionExperts, SortedProjections, projections
from modeling_moe.dispatch.backends import BACKENDS
from modeling_moe.dispatch.halves import OperatorProjections
from modeling_moe.dispatch.low_rank import LowRank
from tests.builders import tiny_config


TOKENS, TOP_K, EXPERTS, HIDDEN, WIDTH, RANK = 23, 3, 5, 32, 48, 3
CASES = [
    ("loop", torch.float64, 1e-10),
    ("native", torch.float32, 2e-5),
    ("grouped_mm", torch.float32, 2e-5),
    ("native", torch.bfloat16, 3e-2),
    ("grouped_mm", torch.bfloat16, 3e-2),
]


def experts_of(dtype: torch.dtype) -> AttentionExperts:
    torch.manual_seed(0)
    experts = AttentionExperts(tiny_config(hidden_size=HIDDEN), EXPERTS, WIDTH)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return experts.to(dtype)


def index_of(kind: str) -> torch.Tensor:
    """Returns (T, K) ids: all kinds of loads, with empty assignments, idle experts and one busy expert."""
    generator = torch.Generator().manual_seed(1)
    index = torch.rand(TOKENS, EXPERTS, generator=generator).topk(TOP_K, dim=-1).indices
    if kind == "empty":
        index = index.where(torch.rand(index.shape, generator=generator) < 0.6, EXPERTS)
        index[0], index[1, 0] = EXPERTS, -1
    return {"idle": index.clamp(max=2), "one": index * 0 + 4}.get(kind, index)


def low_rank(dtype: torch.dtype) -> dict[str, LowRank]:
    """Returns updates of both matrices; b has the strides of PEFT's matrix."""
    generator = torch.Generator().manual_seed(2)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64).mul(0.3).to(dtype)

    def update(rows: int, columns: int) -> LowRank:
        b = random(rows, RANK, EXPERTS).permute(2, 0, 1)
        return LowRank(random(EXPERTS, RANK, columns).requires_grad_(), b.requires_grad_(), 0.7)

    return {"up_proj": update(WIDTH, HIDDEN), "down_proj": update(HIDDEN, WIDTH)}


def run(make, experts: AttentionExperts, index: torch.Tensor, updates: dict[str, LowRank] | None = None) -> dict:
    """Returns the output of both products with a fixed function between them, and all gradients."""
    torch.manual_seed(3)
    dtype = experts.up_proj.dtype
    # numbers that every dtype has
    states = torch.randn(TOKENS, HIDDEN).to(torch.bfloat16).to(dtype).requires_grad_()
    weight = torch.rand(TOKENS, TOP_K).to(torch.promote_types(dtype, torch.float32)).requires_grad_()
    products = make(experts, index)
    queries = products.each("up_proj", states)
    output = products.weighted_sum("down_proj", torch.tanh(queries), weight)
    inputs = {"x": states, "weight": weight, **dict(experts.named_parameters())}
    for name, update in (updates or {}).items():
        inputs |= {f"{name} a": update.a, f"{name} b": update.b}
    upstream = torch.linspace(-1, 1, output.numel(), dtype=dtype).view_as(output)
    gradients = torch.autograd.grad((output * upstream).sum(), list(inputs.values()))
    return {"queries": queries.detach(), "output": output.detach(), **dict(zip(inputs, gradients, strict=True))}


def with_updates(experts: AttentionExperts, updates: dict[str, LowRank]):
    """Returns experts whose matrices are updated, as plain tensors through which gradients flow."""
    changed = AttentionExperts(experts.config, EXPERTS, WIDTH)
    for name, update in updates.items():
        matrix = experts.get_parameter(name) + update.scaling * (update.b @ update.a)
        del changed._parameters[name]
        setattr(changed, name, matrix)
    return changed


def assert_equal(found: dict, expected: dict, tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        scale = value.double().abs().max().clamp(min=1e-3)
        difference = (found[name].double() - value.double()).abs().max()
        assert difference <= tolerance * scale, (name, difference / scale)


@pytest.mark.parametrize("kind", ["plain", "empty", "idle", "one"])
@pytest.mark.parametrize(("backend", "dtype", "tolerance"), CASES, ids=str)
def test_each_backend_equals_the_plain_products(backend, dtype, tolerance, kind):
    experts, index = experts_of(dtype), index_of(kind)
    assert BACKENDS[backend].multiplies(experts.up_proj[0], experts.up_proj)
    exact = experts_of(torch.float64).requires_grad_()
    with torch.no_grad():
        for mine, theirs in zip(exact.parameters(), experts.parameters(), strict=True):
            mine.copy_(theirs)
    expected = run(SortedProjections, exact, index)
    found = run(lambda *arguments: OperatorProjections(*arguments, backend=backend), experts, index)
    assert_equal(found, expected, tolerance)


@pytest.mark.parametrize("kind", ["plain", "empty"])
@pytest.mark.parametrize(("backend", "dtype", "tolerance"), CASES[:3], ids=str)
def test_low_rank_updates_equal_updated_matrices(backend, dtype, tolerance, kind):
    experts, index, updates = experts_of(dtype), index_of(kind), low_rank(dtype)
    # the updated matrices of the plain path are functions of the same leaves
    changed = with_updates(experts, updates)
    torch.manual_seed(3)
    expected = _with_leaves(SortedProjections, changed, experts, index, updates)
    experts.low_rank = updates
    found = _with_leaves(
        lambda *arguments: OperatorProjections(*arguments, backend=backend), experts, experts, index, updates
    )
    assert_equal(found, expected, tolerance)


def _with_leaves(make, computing, holding: AttentionExperts, index, updates) -> dict:
    """Runs `computing` and differentiates by the parameters that `holding` has, and by the updates' factors."""
    dtype = holding.up_proj.dtype
    torch.manual_seed(3)
    states, weight = torch.randn(TOKENS, HIDDEN, dtype=dtype), torch.rand(TOKENS, TOP_K, dtype=dtype)
    leaves = {"x": states.requires_grad_(), "weight": weight.requires_grad_(), **dict(holding.named_parameters())}
    for name, update in updates.items():
        leaves |= {f"{name} a": update.a, f"{name} b": update.b}
    products = make(computing, index)
    output = products.weighted_sum("down_proj", torch.tanh(products.each("up_proj", states)), weight)
    upstream = torch.linspace(-1, 1, output.numel(), dtype=dtype).view_as(output)
    return dict(zip(leaves, torch.autograd.grad((output * upstream).sum(), list(leaves.values())), strict=True))


def test_dropout_hides_the_same_elements_in_backward():
    experts, index = experts_of(torch.float64), index_of("plain")
    experts.low_rank = {name: update._replace(dropout=0.5) for name, update in low_rank(torch.float64).items()}
    a = experts.low_rank["up_proj"].a

    def value(a: torch.Tensor) -> torch.Tensor:
        experts.low_rank["up_proj"] = experts.low_rank["up_proj"]._replace(a=a)
        torch.manual_seed(5)  # the masks
        products = OperatorProjections(experts, index, backend="loop")
        states = torch.linspace(-1, 1, TOKENS * HIDDEN, dtype=torch.float64).view(TOKENS, HIDDEN)
        weight = torch.ones(TOKENS, TOP_K, dtype=torch.float64)
        return products.weighted_sum("down_proj", products.each("up_proj", states), weight).square().mean()

    (gradient,) = torch.autograd.grad(value(a), a)
    direction, step = torch.ones_like(a), 1e-6
    difference = (value(a.detach() + step * direction) - value(a.detach() - step * direction)) / (2 * step)
    torch.testing.assert_close((gradient * direction).sum(), difference.detach(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("index", [[[3, 0, 1]], [[3, 0, 5]], [[5, 5, 5]], [[3, 0, 1], [3, 2, 4]]], ids=str)
def test_decoding_equals_the_plain_products(dtype, index):
    experts, index = experts_of(dtype), torch.tensor(index)
    states = torch.randn(len(index), HIDDEN).to(dtype)
    weight = torch.rand(index.shape)
    with torch.no_grad():
        plain, fast = SortedProjections(experts, index), OperatorProjections(experts, index)
        expected = plain.each("up_proj", states)
        torch.testing.assert_close(fast.each("up_proj", states), expected)
        torch.testing.assert_close(
            fast.weighted_sum("down_proj", expected, weight), plain.weighted_sum("down_proj", expected, weight)
        )


@pytest.mark.parametrize("make", [SortedProjections, OperatorProjections])
def test_states_of_either_form_are_taken(make):
    experts, index = experts_of(torch.float64), index_of("empty")
    states = torch.randn(TOKENS, HIDDEN, dtype=torch.float64)
    weight = torch.rand(TOKENS, TOP_K, dtype=torch.float64)
    products = make(experts, index)
    rows = products.each("up_proj", states)
    repeated = states[:, None].expand(-1, TOP_K, -1)
    torch.testing.assert_close(products.each("up_proj", repeated), rows)
    expected = torch.einsum("tkn,tk->tn", rows, weight)
    torch.testing.assert_close(products.weighted_sum("up_proj", states, weight), expected)
    torch.testing.assert_close(products.weighted_sum("up_proj", repeated, weight), expected)


@pytest.mark.parametrize("make", [SortedProjections, OperatorProjections])
def test_no_token_is_no_row(make):
    experts, index = experts_of(torch.float32), torch.empty(0, TOP_K, dtype=torch.long)
    products = make(experts, index)
    rows = products.each("up_proj", torch.empty(0, HIDDEN))
    assert rows.shape == (0, TOP_K, WIDTH)
    assert products.weighted_sum("down_proj", rows, torch.empty(0, TOP_K)).shape == (0, HIDDEN)


def test_the_name_of_the_implementation_chooses_the_products():
    experts, index = experts_of(torch.float32), index_of("plain")
    for name in ("moe", "moe_native", "moe_loop", "moe_grouped_mm", "moe_triton"):
        assert name in PROJECTIONS
        experts.config._experts_implementation = name
        assert isinstance(projections(experts, index), OperatorProjections)
    for name in ("eager", "grouped_mm", None):
        experts.config._experts_implementation = name
        assert isinstance(projections(experts, index), SortedProjections)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_multiplies_in_its_dtype(dtype):
    experts, index = experts_of(torch.float32), index_of("plain")
    states = torch.randn(TOKENS, HIDDEN)
    for make in (SortedProjections, OperatorProjections):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            rows = make(experts, index).each("up_proj", states)
        expected = SortedProjections(experts.double(), index).each("up_proj", states.double())
        experts.float()
        error = (rows.double() - expected).abs().max()
        assert (error > 1e-4) == (dtype == torch.bfloat16)


@torch.no_grad()
def test_autocast_does_not_round_the_sum_of_a_decoding_token():
    experts, index = experts_of(torch.float32), torch.tensor([[3, 0, 1]])
    states, weight = torch.randn(1, TOP_K, WIDTH), torch.rand(1, TOP_K)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        # the products are rounded to bf16, and the sum of them is not
        expected = (experts.down_proj.bfloat16()[index[0]] @ states[0, :, :, None].bfloat16())[:, :, 0].float()
        output = OperatorProjections(experts, index).weighted_sum("down_proj", states, weight)
    assert not torch.equal(output, output.bfloat16().float())
    torch.testing.assert_close(output, (expected * weight[0, :, None]).sum(dim=0)[None], rtol=2e-3, atol=2e-3)
