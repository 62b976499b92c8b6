"""These tests compare low-rank updates in the operator with experts of weights W + s B A in float64."""

import copy

import pytest
import torch

from modeling_moe.dispatch import backend_of, backends, operator
from modeling_moe.dispatch.low_rank import LowRank
from modeling_moe.dispatch.problem import ExpertsProblem
from tests.conftest import NEEDS_TRITON
from tests.dispatch.kinds import (
    BACKENDS,
    NEEDS_NATIVE,
    OURS,
    SHAPES,
    THEIRS,
    assert_close,
    draw,
    make,
)
from tests.dispatch.test_dispatch import run_compiled, saved_bytes


RANK = 3
DOWN, UPS = "down_proj", ("gate_up_proj", "up_proj")


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(backends.BACKENDS["loop"], "chunk_rows", 4)


def up_of(module) -> str:
    return next(name for name in UPS if isinstance(getattr(module, name, None), torch.nn.Parameter))


def factors_for(module, names=None, rank=RANK, dtype=None, packed=True) -> dict[str, LowRank]:
    """Returns random factors for the matrices of `module`; with `packed`, b has the memory layout of PEFT."""
    torch.manual_seed(2)
    updates = {}
    for scaling, name in enumerate(names or (up_of(module), DOWN), start=2):
        weight = getattr(module, name)
        experts, rows, columns = weight.transpose(1, 2).shape if module.is_transposed else weight.shape
        a = torch.randn(experts, rank, columns, dtype=torch.float64) * 0.3
        b = torch.randn(rows, rank, experts, dtype=torch.float64).permute(2, 0, 1) * 0.3
        b = b if packed else b.contiguous()
        a, b = (factor.to(weight.device, dtype or weight.dtype).requires_grad_() for factor in (a, b))
        updates[name] = LowRank(a, b, scaling / 2)
    return updates


def leaves(module, updates) -> list[torch.Tensor]:
    return [*module.parameters(), *(factor for update in updates.values() for factor in (update.a, update.b))]


def run(module, updates, states, index, weight, direction):
    """Returns the output, and the gradients of states, weights, parameters and factors."""
    module.low_rank = updates
    states, weight = states.detach().requires_grad_(), weight.detach().requires_grad_()
    output = module(states, index, weight)
    wanted = [tensor for tensor in [states, weight, *leaves(module, updates)] if tensor.requires_grad]
    return [output, *torch.autograd.grad((output * direction).sum(), wanted)]


def oracle(module, updates, states, index, weight, direction):
    """Returns what `run` returns, computed in float64 by the class's own loop with the updated matrices."""
    module = copy.deepcopy(module).double()
    module.config._experts_implementation = "eager"
    updates = {
        name: update._replace(
            a=update.a.detach().double().requires_grad_(), b=update.b.detach().double().requires_grad_()
        )
        for name, update in updates.items()
    }
    parameters = dict(module.named_parameters())
    changed = dict(parameters)
    for name, update in updates.items():
        delta = update.scaling * update.b @ update.a
        changed[name] = parameters[name] + (delta.transpose(1, 2) if module.is_transposed else delta)
    states, weight = states.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    output = torch.func.functional_call(module, changed, (states, index, weight))
    wanted = [tensor for tensor in [states, weight, *leaves(module, updates)] if tensor.requires_grad]
    return [output, *torch.autograd.grad((output * direction.double()).sum(), wanted)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", [*OURS, *THEIRS])
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_loop(kind, shape, recompute):
    sizes = SHAPES[shape]
    module = make(kind, "moe_loop", sizes["experts"])
    module.config.experts_recompute = recompute
    inputs, updates = draw(**sizes), factors_for(module)
    assert_close(run(module, updates, *inputs), oracle(module, updates, *inputs), 1e-12)
    module.requires_grad_(False)
    assert_close(run(module, updates, *inputs), oracle(module, updates, *inputs), 1e-12)


@pytest.mark.parametrize("kind", [*OURS, *THEIRS])
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("backend", ["moe_grouped_mm", pytest.param("moe_triton", marks=NEEDS_TRITON)])
def test_gpu_backends(backend, kind, recompute, device):
    module = make(kind, backend, dtype=torch.float32, device=device)
    module.config.experts_recompute = recompute
    inputs, updates = draw(9, 5, 3, torch.float32, device=device), factors_for(module)
    if kind in OURS:
        inputs[1][1, 2] = 5
    assert_close(run(module, updates, *inputs), oracle(module, updates, *inputs), 3e-5)


@NEEDS_NATIVE
@pytest.mark.parametrize("shape", [*SHAPES, "many rows", "long sums"])
@pytest.mark.parametrize("kind", [kind for kind in [*OURS, *THEIRS] if kind != "gelu"])
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_native(kind, shape, recompute):
    sizes = SHAPES.get(shape, {"tokens": 300, "experts": 2, "top_k": 1})
    if shape == "long sums":
        sizes = {"tokens": 1100, "experts": 1, "top_k": 1}
    module = make(kind, "moe_native", sizes["experts"], dtype=torch.float32)
    module.config.experts_recompute = recompute
    inputs, updates = draw(**sizes, dtype=torch.float32), factors_for(module)
    module.low_rank = updates
    assert backend_of(module, *inputs[:2]) == "native"
    assert_close(run(module, updates, *inputs), oracle(module, updates, *inputs), 2e-5)
    module.requires_grad_(False)
    expected = oracle(module, updates, *inputs)
    assert_close(run(module, updates, *inputs), expected, 2e-5)
    with torch.no_grad():
        assert_close([module(*(tensor[:4] for tensor in inputs[:3]))], [expected[0][:4]], 2e-5)


@NEEDS_NATIVE
def test_native_with_more_ranks_than_columns():
    """A rank above the widths of the experts' matrices makes the product a sum over two parts."""
    module = make("gated", "moe_native", experts=1, hidden=520, width=8, dtype=torch.float32)
    inputs, updates = draw(600, 1, 1, torch.float32, hidden=520), factors_for(module, rank=600)
    assert_close(run(module, updates, *inputs), oracle(module, updates, *inputs), 3e-5)


@NEEDS_NATIVE
def test_native_in_bf16_with_factors_in_fp32():
    module = make("gated-bias", "moe_native", dtype=torch.bfloat16)
    updates = factors_for(module, dtype=torch.float32)
    states, index, weight, direction = draw(40, 5, 3, torch.bfloat16)
    got = run(module, updates, states, index, weight.float(), direction)
    assert [tensor.dtype for tensor in got[-4:]] == [torch.float32] * 4
    assert_close(got, oracle(module, updates, states, index, weight, direction), 4e-2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["gate_up_proj", "down_proj"])
@pytest.mark.parametrize("packed", [True, False], ids=["PEFT's layout", "contiguous"])
def test_one_matrix(backend, name, packed, device):
    module = make("gated-bias", backend, dtype=torch.float32, device=device)
    inputs = draw(9, 5, 3, torch.float32, device=device)
    updates = factors_for(module, [name], packed=packed)
    assert_close(run(module, updates, *inputs), oracle(module, updates, *inputs), 3e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", [*OURS, *THEIRS])
def test_decode(kind, shape):
    sizes = SHAPES[shape] | {"tokens": min(SHAPES[shape]["tokens"], 16)}
    module = make(kind, "moe", sizes["experts"])
    states, index, weight, direction = draw(**sizes)
    updates = factors_for(module)
    expected = oracle(module, updates, states, index, weight, direction)[:1]
    module.low_rank = updates
    with torch.no_grad():
        assert backend_of(module, states, index) == "loop (decode)"
        assert_close([module(states, index, weight)], expected, 1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_slots(backend, device):
    module = make("gated", backend, dtype=torch.float32, device=device)
    states, index, weight, direction = draw(9, 5, 3, torch.float32, device=device)
    index[1, 2], index[4], index[5, 0] = 5, 5, -1
    updates, reference = factors_for(module), index.clone().masked_fill_(index < 0, 5)
    got = run(module, updates, states, index, weight, direction)
    assert_close(got, oracle(module, updates, states, reference, weight, direction), 3e-5)
    assert not got[0][4].any()
    with torch.no_grad():
        assert_close([module(states, index, weight)], [got[0].double()], 3e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tokens_and_idle_experts(backend, device):
    module = make("gated", backend, dtype=torch.float32, device=device)
    updates = factors_for(module)
    empty = torch.zeros(0, 32), torch.zeros(0, 3, dtype=torch.long), torch.zeros(0, 3), torch.zeros(0, 32)
    output, *gradients = run(module, updates, *(tensor.to(device) for tensor in empty))
    assert output.shape == (0, 32)
    assert not any(gradient.any() for gradient in gradients)
    states, _, weight, direction = draw(6, 5, 1, torch.float32, device=device)
    for gradient in run(module, updates, states, torch.full((6, 1), 2, device=device), weight, direction)[-4:]:
        assert gradient[2].any()
        assert not gradient[[0, 1, 3, 4]].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_fp32_factors_on_16_bit_experts(backend, dtype, device):
    if backend == "moe_triton" and dtype == torch.bfloat16 and device == "cpu":
        pytest.skip("Triton's interpreter has no bfloat16")
    module = make("gated-bias", backend, dtype=dtype, device=device).requires_grad_(False)
    states, index, weight, direction = draw(40, 5, 3, dtype, device=device)
    updates = factors_for(module, dtype=torch.float32)
    got = run(module, updates, states, index, weight.float(), direction)
    assert [tensor.dtype for tensor in got[-4:]] == [torch.float32] * 4
    assert_close(got, oracle(module, updates, states, index, weight.float(), direction), 3e-2)
    with torch.no_grad():
        assert_close([module(states[:5], index[:5], weight[:5].float())], [got[0][:5].double()], 3e-2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout(backend, monkeypatch, device):
    """Dropout equals masks applied by hand; without dropout no mask is drawn, and on the CPU the loop serves dropout."""
    module = make("gated", "moe" if backend == "moe_native" else backend, dtype=torch.float32, device=device)
    states, index, weight, direction = draw(40, 5, 3, torch.float32, device=device)
    updates = {name: update._replace(dropout=0.3) for name, update in factors_for(module).items()}
    if backend == "moe_native":
        module.low_rank = updates
        assert backend_of(module, states, index) == "loop"
    masks, rand = [], torch.rand
    monkeypatch.setattr(torch, "rand", lambda *size, **kw: masks.append(rand(*size, **kw)) or masks[-1])
    got = run(module, updates, states, index, weight, direction)
    up_kept, down_kept = (mask >= 0.3 for mask in masks)
    assert up_kept.shape == states.shape
    assert down_kept.shape == (40 * 3, 24)
    leaf = [tensor.detach().double().requires_grad_() for tensor in (states, weight, *leaves(module, updates))]
    x, w, gate_up, down, up_a, up_b, down_a, down_b = leaf
    total = 0
    for k in range(3):
        expert = index[:, k]
        low = ((x * up_kept / 0.7)[:, None] @ up_a[expert].mT @ up_b[expert].mT)[:, 0]
        h = (x[:, None] @ gate_up[expert].mT)[:, 0] + low
        gate, up = h.chunk(2, dim=-1)
        a = torch.nn.functional.silu(gate) * up
        low = ((a * down_kept.view(40, 3, 24)[:, k] / 0.7)[:, None] @ down_a[expert].mT @ down_b[expert].mT)[:, 0]
        total = total + w[:, k, None] * ((a[:, None] @ down[expert].mT)[:, 0] + low * updates["down_proj"].scaling)
    assert updates["gate_up_proj"].scaling == 1
    gradients = torch.autograd.grad((total * direction).sum(), leaf)
    assert_close(got, [total, *gradients], 3e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_saved_for_backward(backend, device):
    """Backward saves h and the order, as without updates: no matrix of an expert, and no copy of a factor."""
    module = make("gated", backend, dtype=torch.float32, device=device).requires_grad_(False)
    states, index, weight, _ = draw(40, 5, 3, torch.float32, device=device)
    module.low_rank = factors_for(module)
    known = [states, weight, *leaves(module, module.low_rank)]
    states.requires_grad_()
    grouping = 4 * (40 * 3 + 5 + 1)
    assert saved_bytes(lambda: module(states, index, weight), *known) == 4 * 40 * 3 * 2 * 24 + grouping


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_whole(backend, device):
    torch.compiler.reset()
    module = make("gated-bias", backend, dtype=torch.float32, device=device)
    updates = factors_for(module)
    inputs = draw(40, 5, 3, torch.float32, device=device)
    expected = run(module, updates, *inputs)[:-4]
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run_compiled(compiled, module, *inputs), expected, atol=1e-6, rtol=1e-5)
    with torch.no_grad():
        few = inputs[0][:4], inputs[1][:4], inputs[2][:4]
        torch.testing.assert_close(compiled(*few), module(*few), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("backend", ["loop", pytest.param("triton", marks=NEEDS_TRITON)])
def test_operator_keeps_torchs_rules(backend, device):
    module = make("gated-bias", "moe", dtype=torch.float32, device=device)
    states, index, weight, _ = draw(9, 5, 3, torch.float32, device=device)
    weights = [module.gate_up_proj, module.down_proj, module.gate_up_proj_bias, module.down_proj_bias]
    updates = factors_for(module)
    up, down = updates["gate_up_proj"], updates["down_proj"]
    problem = ExpertsProblem(states.requires_grad_(), weight.requires_grad_(), *weights, "silu_gated", [], up, down)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(operator.experts, (*problem.flatten(), index, backend, True), test_utils=checks)
    flat = problem.flatten()
    flat = flat._replace(tensors=[tensor.detach() for tensor in flat.tensors])
    # no other back end decodes with updates
    torch.library.opcheck(operator.experts_decode, (*flat, index, "loop"))


def test_factors_for_other_experts():
    module = make("gated", "moe")
    other = make("gated", "moe", experts=4)
    module.low_rank = factors_for(other)
    with pytest.raises(ValueError, match="another number of experts than 5"):
        module(*draw(9, 5, 3)[:3])
