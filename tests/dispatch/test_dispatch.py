"""These tests compare every back end with the eager loop in float64: outputs and gradients, for this package's experts
and for transformers' own.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM

from modeling_moe import MoEForCausalLM
from modeling_moe.dispatch import backend_of, backends, operator
from modeling_moe.dispatch.expert_order import order_by_expert
from modeling_moe.dispatch.low_rank import LowRank
from modeling_moe.dispatch.problem import ExpertsProblem, Needs
from modeling_moe.modeling_moe import MoEExperts
from tests.builders import tiny_config
from tests.conftest import NEEDS_GPU, NEEDS_TRITON
from tests.dispatch.kinds import (
    BACKENDS,
    CPU_BACKENDS,
    HIDDEN,
    NEEDS_NATIVE,
    OURS,
    SHAPES,
    THEIRS,
    WIDTH,
    assert_close,
    draw,
    fastest,
    make,
    oracle,
    run,
)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(backends.BACKENDS["loop"], "chunk_rows", 4)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", [*OURS, *THEIRS])
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_loop(kind, shape, recompute):
    sizes = SHAPES[shape]
    module = make(kind, "moe_loop", sizes["experts"])
    module.config.experts_recompute = recompute
    inputs = draw(**sizes)
    assert_close(run(module, *inputs), oracle(module, *inputs), 1e-13)


@pytest.mark.parametrize("kind", [*OURS, *THEIRS])
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("backend", ["moe_grouped_mm", pytest.param("moe_triton", marks=NEEDS_TRITON)])
def test_gpu_backends(backend, kind, recompute, device):
    module = make(kind, backend, dtype=torch.float32, device=device)
    module.config.experts_recompute = recompute
    inputs = draw(9, 5, 3, torch.float32, device=device)
    if kind in OURS:  # gpt-oss's own loop, and others' before transformers 5.19, have no empty assignments
        inputs[1][1, 2] = 5
    assert_close(run(module, *inputs), oracle(module, *inputs), 2e-5)


@pytest.mark.parametrize("backend", ["grouped_mm", "triton"])
def test_another_back_end_than_the_named_one_fails_a_test(backend):
    """Only the loop serves float64, so `make` must notice that the named back end gives way."""
    module, inputs = make("gated", f"moe_{backend}"), draw(9, 5, 3)
    with pytest.raises(AssertionError, match=f"loop would serve, not {backend}"):
        module(*inputs[:3])


def test_loop_in_float64_on_the_device(device):
    module, inputs = make("gated-bias", "moe", device=device), draw(9, 5, 3, device=device)
    assert backend_of(module, *inputs[:2]) == "loop"
    assert_close(run(module, *inputs), oracle(module, *inputs), 1e-13)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", [*OURS, *THEIRS])
def test_decode(kind, shape):
    sizes = SHAPES[shape] | {"tokens": min(SHAPES[shape]["tokens"], 16)}
    module = make(kind, "moe", sizes["experts"])
    states, index, weight, direction = draw(**sizes)
    with torch.no_grad():
        assert backend_of(module, states, index) == "loop (decode)"
        output = module(states, index, weight)
    expected = oracle(module, states, index, weight, direction)[:1]
    assert_close([output], expected, 1e-13)
    with torch.no_grad():
        assert_close([module.float()(states.float(), index, weight.float())], expected, 2e-5)


@NEEDS_TRITON
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["gated-bias", "gpt_oss"])
def test_decode_by_triton(kind, shape, device):
    sizes = SHAPES[shape] | {"tokens": min(SHAPES[shape]["tokens"], 16)}
    module = make(kind, "moe_triton", sizes["experts"], dtype=torch.float32, device=device)
    states, index, weight, direction = draw(**sizes, dtype=torch.float32, device=device)
    with torch.no_grad():
        assert backend_of(module, states, index, backend="triton") == "triton (decode)"
        output = module(states, index, weight)
    assert_close([output], oracle(module, states, index, weight, direction)[:1], 2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("hidden", "width"), [(10, 6), (7, 3), (1, 1)])
def test_odd_sizes(hidden, width, backend, device):
    if backend == "moe_grouped_mm":
        pytest.skip("it takes rows of a multiple of 16 bytes alone")
    module = make("gated", backend, hidden=hidden, width=width, dtype=torch.float32, head_dim=2, device=device)
    inputs = draw(9, 5, 3, torch.float32, hidden, device)
    assert_close(run(module, *inputs), oracle(module, *inputs), 2e-5)


@NEEDS_NATIVE
def test_grouped_mm_gives_way_where_sizes_are_odd():
    module = make("gated", "moe_loop", hidden=7, width=3, dtype=torch.float32, head_dim=2)
    assert backend_of(module, *draw(9, 5, 3, torch.float32, 7)[:2], backend="grouped_mm") == "native"


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 3e-2), (torch.float16, 4e-3)], ids=["bf16", "fp16"])
@pytest.mark.parametrize("native", [True, False], ids=["native", "emulated"])
def test_half_precision(backend, dtype, tolerance, native, monkeypatch):
    monkeypatch.setattr(backends.BACKENDS["loop"], "product_dtype", lambda x: x.dtype if native else torch.float32)
    module = make("gated-bias", backend, dtype=dtype)
    states, index, weight, direction = draw(40, 5, 3, dtype)
    weight = weight.float()
    got = run(module, states, index, weight, direction)
    assert [tensor.dtype for tensor in got] == [dtype, dtype, torch.float32] + [dtype] * 4
    assert_close(got, oracle(module, states, index, weight, direction), tolerance)
    with torch.no_grad():
        assert_close([module(states[:5], index[:5], weight[:5])], [got[0][:5].double()], tolerance)


@NEEDS_TRITON
@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=NEEDS_GPU)], ids=["fp16", "bf16"])
def test_half_precision_by_triton(dtype, device):
    tolerance = {torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    module = make("gated-bias", "moe_triton", dtype=dtype, device=device)
    states, index, weight, direction = draw(40, 5, 3, dtype, device=device)
    weight = weight.float()
    got = run(module, states, index, weight, direction)
    assert [tensor.dtype for tensor in got] == [dtype, dtype, torch.float32] + [dtype] * 4
    assert_close(got, oracle(module, states, index, weight, direction), tolerance)
    with torch.no_grad():
        assert_close([module(states[:5], index[:5], weight[:5])], [got[0][:5].double()], tolerance)


def test_combine_is_fp32(device):
    """The sum is 1 + 255 * 2**-9 terms: a sum in bf16 would lose each of the small ones."""
    fields = {"experts": 256, "hidden": 8, "width": 8, "head_dim": 2, "device": device}
    module = make("gated", "moe", dtype=torch.bfloat16, **fields)
    with torch.no_grad():
        module.gate_up_proj.fill_(1)
        module.down_proj.fill_(1)
    states = torch.ones(1, 8, dtype=torch.bfloat16, device=device)
    index, weight = torch.arange(256, device=device)[None], torch.full((1, 256), 2.0**-9, device=device)
    weight[0, 0] = 1
    single = module(states, index[:, :1], torch.ones(1, 1, device=device)).double()
    expected = single * (1 + 255 * 2.0**-9)
    for tokens in (1, 40):
        output = module(states.expand(tokens, -1), index.expand(tokens, -1), weight.expand(tokens, -1)).double()
        torch.testing.assert_close(output, expected.expand(tokens, -1), atol=0, rtol=2**-7)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["gated-bias", "gated"])
def test_empty_assignments(backend, kind, device):
    module = make(kind, backend, dtype=torch.float32, device=device)
    states, index, weight, direction = draw(9, 5, 3, torch.float32, device=device)
    index[1, 2], index[4], index[5, 0], index[6, 1] = 5, 5, -1, 1000
    reference = index.clone().masked_fill_(index < 0, 5)
    got = run(module, states, index, weight, direction)
    assert_close(got, oracle(module, states, reference.clamp(max=5), weight, direction), 2e-5)
    empty = (index < 0) | (index >= 5)
    assert not got[2][empty].any()
    assert not got[0][4].any()
    assert not got[1][4].any()
    with torch.no_grad():
        assert_close([module(states, index, weight)], [got[0].double()], 2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_but_empty_assignments(backend, device):
    module = make("gated", backend, dtype=torch.float32, device=device)
    states, _, weight, direction = draw(4, 5, 3, torch.float32, device=device)
    index = torch.full((4, 3), 5, device=device)
    assert not any(tensor.any() for tensor in run(module, states, index, weight, direction))
    with torch.no_grad():
        assert not module(states, index, weight).any()


def test_no_tokens(device):
    module = make("gated", "moe", dtype=torch.float32, device=device)
    states = torch.zeros(0, HIDDEN, requires_grad=True, device=device)
    weight = torch.zeros(0, 3, requires_grad=True, device=device)
    output = module(states, torch.zeros(0, 3, dtype=torch.long, device=device), weight)
    assert output.shape == (0, HIDDEN)
    output.sum().backward()
    assert states.grad.shape == (0, HIDDEN)
    assert all(not parameter.grad.any() for parameter in module.parameters())


@pytest.mark.parametrize("backend", BACKENDS)
def test_idle_experts_get_zeros(backend, device):
    module = make("gated-bias", backend, dtype=torch.float32, device=device)
    states, _, weight, direction = draw(6, 5, 1, torch.float32, device=device)
    gradients = run(module, states, torch.full((6, 1), 2, device=device), weight, direction)[3:]
    for gradient in gradients:
        assert gradient[2].any()
        assert not gradient[[0, 1, 3, 4]].any()


def test_an_expert_chosen_twice_by_a_token():
    module = make("gated", "moe_loop")
    states, _, weight, direction = draw(6, 5, 3)
    inputs = states, torch.randint(5, (6, 3)), weight, direction
    assert_close(run(module, *inputs), oracle(module, *inputs), 1e-13)


def test_layouts():
    """Top-1 ids of expert parallelism, int32 ids, strided tokens and tokens of another dtype are served."""
    module = make("gated", "moe_loop")
    states, index, _, direction = draw(9, 5, 1)
    ones = torch.ones(9, 1, dtype=torch.float64)
    expected = oracle(module, states, index, ones, direction)
    assert_close(run(module, states, index.int(), ones, direction), expected, 1e-13)
    strided = states.T.contiguous().T
    assert not strided.is_contiguous()
    assert_close(run(module, strided, index, ones, direction), expected, 1e-13)
    low = make("gated", "moe_loop", dtype=torch.bfloat16)
    output = low(states.float(), index, ones.float())
    assert output.dtype == torch.float32
    torch.testing.assert_close(output.double(), expected[0], atol=0.2, rtol=0.05)


class NewShapes(TorchDispatchMode):
    """NewShapes records the shape of every tensor that an operator returns in memory of none of the `known` tensors."""

    def __init__(self, known):
        super().__init__()
        self.known, self.seen = {each.untyped_storage().data_ptr() for each in known}, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        made = [each for each in tree_leaves(result) if isinstance(each, torch.Tensor)]
        self.seen |= {tuple(each.shape) for each in made if each.untyped_storage().data_ptr() not in self.known}
        return result


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_frozen_experts_cost_no_weight_gradient(backend):
    """Nothing of the shape of a matrix or a bias is made, and the other gradients stay as they are."""
    module, inputs = make("gated-bias", backend, dtype=torch.float32), draw(9, 5, 3, torch.float32)
    expected = run(module, *inputs)
    served = backends.BACKENDS[backend.removeprefix("moe_")]
    problem, index, direction = problem_of(module, *inputs), inputs[1], inputs[3]
    order = order_by_expert(index, 5)
    h = served.forward(problem, order, True).h
    names = ["up", "down", "up_bias", "down_bias"]
    shapes = {tuple(getattr(problem, name).shape) for name in names}
    for needs, touched in (
        (Needs(x=True, weight=True), set()),
        (Needs(**dict.fromkeys(Needs._fields[:6], True)), shapes),
    ):
        with torch.no_grad(), NewShapes(problem.named_tensors().values()) as watched:
            gradients = served.backward(problem, order, direction, h, needs)
        assert watched.seen & shapes == touched
        assert all((getattr(gradients, name) is not None) == bool(touched) for name in names)
        torch.testing.assert_close([gradients.x, gradients.weight], expected[1:3], atol=1e-6, rtol=1e-5)


def problem_of(module, states, index, weight, direction) -> ExpertsProblem:
    """Builds the problem of gated experts with biases."""
    matrices = (module.gate_up_proj, module.down_proj, module.gate_up_proj_bias, module.down_proj_bias)
    return ExpertsProblem(states, weight, *(each.detach() for each in matrices), "silu_gated", [])


def test_flat_problem_is_the_problem():
    """Every tensor keeps its name, and what is missing stays missing."""
    module, inputs = make("gated-bias", "moe_loop"), draw(9, 5, 3)
    problem = problem_of(module, *inputs)
    update = LowRank(torch.ones(5, 2, HIDDEN), torch.ones(5, 2 * WIDTH, 2), 0.5, kept=torch.ones(9, HIDDEN) > 0)
    for changed in (
        problem,
        problem._replace(up_bias=None),
        problem._replace(up_update=update),
        problem._replace(down_bias=None, down_update=update._replace(kept=None), constants=[1.5, 7.0]),
    ):
        got, expected = ExpertsProblem.unflatten(changed.flatten()), changed.named_tensors()
        assert got.named_tensors().keys() == expected.keys()
        assert all(tensor is expected[name] for name, tensor in got.named_tensors().items())
        assert got == changed


def test_a_misspelt_back_end_is_refused():
    """A name that nobody knows must not fall back silently, as an uninstalled Triton does."""
    module, inputs = make("gated", "moe"), draw(9, 5, 3)
    with pytest.raises(ValueError, match="backend 'nativ' is unknown: choose one of native, triton, grouped_mm, loop"):
        backend_of(module, *inputs[:2], backend="nativ")


def test_one_trained_parameter():
    module = make("gated-bias", "moe_loop")
    states, index, weight, direction = draw(9, 5, 3)
    names = [name for name, _ in module.named_parameters()]
    expected = dict(zip(names, oracle(module, states, index, weight, direction)[3:], strict=True))
    for name, parameter in module.named_parameters():
        module.requires_grad_(False)
        parameter.requires_grad_()
        (gradient,) = torch.autograd.grad((module(states, index, weight) * direction).sum(), [parameter])
        assert_close([gradient], [expected[name]], 1e-13)


def saved_bytes(call, *known: torch.Tensor) -> int:
    """Returns the bytes that autograd keeps in the forward pass, beyond those of the `known` tensors."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = call()
    for tensor in known:
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    del output
    return sum(storages.values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_saved_for_backward(backend, device):
    module = make("gated", backend, dtype=torch.float32, device=device)
    states, index, weight, _ = draw(40, 5, 3, torch.float32, device=device)
    known = [states, weight, *module.parameters()]
    states.requires_grad_()
    weight.requires_grad_()
    grouping = 4 * (40 * 3 + 5 + 1)
    assert saved_bytes(lambda: module(states, index, weight), *known) == 4 * 40 * 3 * 2 * WIDTH + grouping
    module.config.experts_recompute = True
    assert saved_bytes(lambda: module(states, index, weight), *known) == grouping


def test_retained_graph_and_second_derivative(device):
    module = make("gated", "moe", dtype=torch.float32, device=device)
    states, index, weight, direction = draw(9, 5, 3, torch.float32, device=device)
    states.requires_grad_()
    loss = (module(states, index, weight) * direction).sum()
    first = torch.autograd.grad(loss, states, retain_graph=True)
    second = torch.autograd.grad(loss, states, retain_graph=True)
    torch.testing.assert_close(first, second, atol=0, rtol=0)
    (once,) = torch.autograd.grad(loss, states, create_graph=True)
    with pytest.raises(NotImplementedError, match="experts_implementation='eager'"):
        torch.autograd.grad(once.sum(), states)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant, device):
    module = make("gated", "moe", dtype=torch.float32, device=device)
    states, index, weight, direction = draw(40, 5, 3, torch.float32, device=device)
    expected = run(module, states, index, weight, direction)
    states.requires_grad_()
    output = checkpoint(module, states, index, weight, use_reentrant=reentrant)
    (output * direction).sum().backward()
    gradients = [parameter.grad for parameter in module.parameters()]
    got = [output, states.grad, *gradients]
    torch.testing.assert_close(got, expected[:2] + expected[3:], atol=0, rtol=0)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_autocast(backend):
    module = make("gated-bias", backend, dtype=torch.float32)
    inputs = draw(40, 5, 3, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = run(module, *inputs)
    assert {tensor.dtype for tensor in got} == {torch.float32}
    assert_close(got, oracle(module, *inputs), 3e-2)
    low = make("gated-bias", backend, dtype=torch.bfloat16)
    states, index, weight, direction = inputs
    expected = run(low, states.bfloat16(), index, weight, direction)
    torch.testing.assert_close(got[0], expected[0].float(), atol=0, rtol=0)


def test_deterministic(device):
    module = make("gated", "moe", dtype=torch.float32, device=device)
    inputs = draw(200, 5, 3, torch.float32, device=device)
    torch.testing.assert_close(run(module, *inputs), run(module, *inputs), atol=0, rtol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_k_index": torch.zeros(4, 3)}, "integers"),
        ({"top_k_index": torch.zeros(5, 3, dtype=torch.long)}, "flatten the batch"),
        ({"hidden_states": torch.zeros(2, 2, HIDDEN)}, "flatten the batch"),
        ({"top_k_weights": torch.zeros(4, 2)}, "one weight for each assignment"),
        ({"hidden_states": torch.zeros(4, HIDDEN + 1)}, "has width 33 and the experts 32"),
    ],
)
def test_bad_input(change, message):
    inputs = {
        "hidden_states": torch.zeros(4, HIDDEN),
        "top_k_index": torch.zeros(4, 3, dtype=torch.long),
        "top_k_weights": torch.zeros(4, 3),
    }
    with pytest.raises(ValueError, match=message):
        make("gated", "moe", dtype=torch.float32)(*(inputs | change).values())


def test_left_to_transformers(device):
    """transformers' functions compute an activation without a derivative here, and empty assignments stay empty."""
    states, index, weight, direction = draw(9, 5, 3, device=device)
    index[1, 2], index[3, 0] = 5, -1
    reference = index.clone().masked_fill_(index < 0, 5)
    for dtype, tolerance in ((torch.float64, 1e-13), (torch.float32, 2e-5)):
        config = tiny_config(hidden_act="quick_gelu", experts_implementation="moe")
        module = MoEExperts(config).to(device, dtype)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.normal_()
        assert backend_of(module, states, index).startswith("transformers: its gate or activation (QuickGELU")
        got = run(
            module, states.to(dtype), reference if dtype == torch.float64 else index, weight.to(dtype), direction
        )
        assert_close(got, oracle(module, states, reference, weight, direction), tolerance)


def test_a_module_without_experts_has_no_back_end():
    with pytest.raises(TypeError, match="Linear does not follow transformers' experts interface"):
        backend_of(torch.nn.Linear(2, 2), *draw(9, 5, 3)[:2])


def test_norm_after_experts_is_left_to_transformers():
    module = make("gated", "moe")
    module.has_post_expert_norm = True
    assert backend_of(module, *draw(9, 5, 3)[:2]) == "transformers: it has a norm after each expert"


def test_choice_by_name(tmp_path, device):
    """`from_pretrained(experts_implementation=...)` selects the back end of one of transformers' own models."""
    config = AutoConfig.for_model(
        "mixtral", hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, vocab_size=99,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager").eval().to(device)
    model.save_pretrained(tmp_path)
    ids = torch.arange(3, 39, device=device).view(2, 18)
    expected = model(ids).logits
    names = {"moe": fastest(device), "moe_loop": "loop", "moe_grouped_mm": "grouped_mm"}
    if device == "cpu":
        names["moe_native"] = fastest(device)
    for name, backend in names.items():
        chosen = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation=name).to(device)
        assert chosen.config._experts_implementation == name
        experts, states = chosen.model.layers[0].mlp.experts, torch.zeros(36, 32, device=device)
        index = torch.zeros(36, 2, dtype=torch.long, device=device)
        asked = None if name == "moe" else name.removeprefix("moe_")
        assert backend_of(experts, states, index, asked) == backend
        torch.testing.assert_close(chosen(ids).logits, expected, atol=1e-5, rtol=1e-5)
    assert (
        chosen.generate(ids[:, :5], max_new_tokens=8).tolist() == model.generate(ids[:, :5], max_new_tokens=8).tolist()
    )


def test_default_of_our_model(device):
    model = MoEForCausalLM(tiny_config()).to(device)
    assert model.config._experts_implementation == "moe"
    experts, states = model.model.layers[0].mlp.experts, torch.zeros(40, 32, device=device)
    index = torch.zeros(40, 3, dtype=torch.long, device=device)
    assert backend_of(experts, states, index) == fastest(device)
    assert backend_of(experts, states, index, backend="grouped_mm") == "grouped_mm"


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_whole(backend, device):
    module = make("gated-bias", backend, dtype=torch.float32, device=device)
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    inputs = draw(40, 5, 3, torch.float32, device=device)
    torch.testing.assert_close(run_compiled(compiled, module, *inputs), run(module, *inputs), atol=1e-6, rtol=1e-5)
    with torch.no_grad():
        few = inputs[0][:4], inputs[1][:4], inputs[2][:4]
        torch.testing.assert_close(compiled(*few), module(*few), atol=1e-6, rtol=1e-5)


def run_compiled(compiled, module, states, index, weight, direction):
    states, weight = states.detach().requires_grad_(), weight.detach().requires_grad_()
    output = compiled(states, index, weight)
    return [output, *torch.autograd.grad((output * direction).sum(), [states, weight, *module.parameters()])]


@pytest.mark.parametrize("backend", ["loop", pytest.param("triton", marks=NEEDS_TRITON)])
def test_operators_keep_torchs_rules(backend, device):
    module = make("gated-bias", "moe", dtype=torch.float32, device=device)
    states, index, weight, _ = draw(9, 5, 3, torch.float32, device=device)
    weights = [module.gate_up_proj, module.down_proj, module.gate_up_proj_bias, module.down_proj_bias]
    problem = ExpertsProblem(states.requires_grad_(), weight.requires_grad_(), *weights, "silu_gated", [])
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(operator.experts, (*problem.flatten(), index, backend, True), test_utils=checks)
    flat = problem.flatten()
    flat = flat._replace(tensors=[tensor.detach() for tensor in flat.tensors])
    torch.library.opcheck(operator.experts_decode, (*flat, index, backend))


def test_expert_order_by_hand(device):
    order = order_by_expert(torch.tensor([[2, 0], [3, -1], [0, 2]], device=device), 3)
    assert order.assignment.tolist() == [1, 4, 0, 5, 2, 3]
    assert order.offsets.tolist() == [0, 2, 2, 4]
    assert order.assignment.dtype == order.offsets.dtype == torch.int32


def test_backend_of_follows_the_implementation_of_the_module():
    module, inputs = make("gated", "moe_loop", dtype=torch.float32), draw(40, 5, 3, torch.float32)
    assert backend_of(module, *inputs[:2]) == "loop"
    module.config._experts_implementation = "moe_grouped_mm"
    assert backend_of(module, *inputs[:2]) == "grouped_mm"
