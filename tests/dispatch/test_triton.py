"""These tests compare the Triton back end with a loop over the assignments in float64; without a GPU, in Triton's
interpreter.
"""

import pytest
import torch

from tests.conftest import DEVICE, NEEDS_GPU, NEEDS_TRITON


pytest.importorskip("triton", reason="Triton is not installed")

from modeling_moe.dispatch.activations import ACTIVATIONS
from modeling_moe.dispatch.backends.triton import tiles
from modeling_moe.dispatch.backends.triton.backend import TritonBackend
from modeling_moe.dispatch.expert_order import order_by_expert
from modeling_moe.dispatch.problem import ExpertsProblem, Needs


pytestmark = [pytest.mark.gpu, NEEDS_TRITON]
TRITON = TritonBackend()
NAMES = ["x", "weight", "up", "down", "up_bias", "down_bias"]
TOLERANCES = {torch.float32: (1e-5, 1e-5), torch.float16: (2e-2, 2e-2), torch.bfloat16: (5e-2, 1e-1)}


class Problem:
    """Problem draws random inputs; `transposed` gives the matrices gpt-oss's strides."""

    def __init__(
        self,
        index,
        hidden=20,
        inner=12,
        experts=3,
        gate="silu_gated",
        bias=False,
        transposed=False,
        dtype=torch.float32,
    ):
        self.index = torch.as_tensor(index, device=DEVICE)
        self.gate, self.constants = gate, [1.702, 0.9] if gate.startswith("clamped") else []
        columns = ACTIVATIONS[gate].columns * inner

        def random(*shape, dtype=dtype):
            return torch.randn(shape, device=DEVICE).to(dtype)

        def matrices(rows, columns):
            if transposed:
                return random(experts, columns, rows).div_(columns**0.5).transpose(1, 2)
            return random(experts, rows, columns).div_(columns**0.5)

        self.inputs = [
            random(len(self.index), hidden),
            random(*self.index.shape, dtype=torch.float32),
            matrices(columns, hidden),
            matrices(hidden, inner),
            random(experts, columns) if bias else None,
            random(experts, hidden) if bias else None,
        ]
        self.grad = random(len(self.index), hidden)
        self.order = order_by_expert(self.index, experts)

    @property
    def problem(self) -> ExpertsProblem:
        """The problem that the back end takes."""
        return ExpertsProblem(*self.inputs, self.gate, self.constants)

    def run(self, needs=None, recompute=False, config=None):
        """Returns the output, and the gradients by name."""
        out, h = TRITON.forward(self.problem, self.order, not recompute, config)
        assert len(h) == (0 if recompute else self.index.numel())
        needs = needs or [value is not None for value in self.inputs]
        grads = TRITON.backward(self.problem, self.order, self.grad, h, Needs(*needs), config)
        return out, dict(zip(NAMES, grads[:6], strict=True))

    def oracle(self):
        """Returns what `run` does, computed in float64 for one assignment at a time."""
        leaves = [None if t is None else t.detach().double().requires_grad_() for t in self.inputs]
        x, weight, up, down, up_bias, down_bias = leaves
        out = 0 * x
        for t, ids in enumerate(self.index.tolist()):
            for k, e in enumerate(ids):
                if not 0 <= e < len(up):
                    continue
                h = up[e] @ x[t] + (0 if up_bias is None else up_bias[e])
                y = down[e] @ act(h, self.gate, self.constants) + (0 if down_bias is None else down_bias[e])
                out = out.index_add(0, torch.tensor([t], device=DEVICE), (weight[t, k] * y)[None])
        given = [leaf for leaf in leaves if leaf is not None]
        grads = iter(torch.autograd.grad(out, given, self.grad.double(), materialize_grads=True))
        return out.detach(), {
            name: None if leaf is None else next(grads) for name, leaf in zip(NAMES, leaves, strict=True)
        }

    def check(self, **settings):
        (out, grads), (expected, expected_grads) = self.run(**settings), self.oracle()
        dtype = self.grad.dtype
        rtol, atol = TOLERANCES[dtype]
        for name, actual, reference in [("out", out, expected)] + [(n, grads[n], expected_grads[n]) for n in NAMES]:
            if reference is None:
                assert actual is None, name
                continue
            assert actual.dtype == (torch.float32 if name == "weight" else dtype), name
            atol_here = atol * max(1.0, reference.abs().max().item())
            torch.testing.assert_close(
                actual.double(), reference, rtol=rtol, atol=atol_here, msg=lambda m, n=name: f"{n}: {m}"
            )
        return grads


def act(h, gate, constants):
    """Computes a (I,) from h (C,) by differentiable operators."""
    if gate.startswith("clamped"):
        alpha, limit = constants
        g, u = (h[::2], h[1::2]) if gate.endswith("_pairs") else h.chunk(2)
        g, u = g.clamp(max=limit), u.clamp(-limit, limit)
        return g * torch.sigmoid(alpha * g) * (u + gate.startswith("clamped_swiglu"))
    functions = {
        "silu": torch.nn.functional.silu,
        "gelu": torch.nn.functional.gelu,
        "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
        "relu": torch.relu,
        "relu2": lambda x: torch.relu(x) ** 2,
    }
    if gate.endswith("_gated"):
        g, u = h.chunk(2)
        return functions[gate.removesuffix("_gated")](g) * u
    return functions[gate](h)


INDEX = [[0, 2], [2, 1], [1, 0], [2, 0], [0, 1]]


@pytest.mark.parametrize("gate", ACTIVATIONS)
def test_every_gate(gate):
    Problem(INDEX, gate=gate).check()


@pytest.mark.parametrize("gate", ["clamped_swiglu_pairs", "silu_gated", "gelu"])
def test_biases_and_strides_of_gpt_oss(gate):
    problem = Problem(INDEX, gate=gate, bias=True, transposed=True)
    grads = problem.check()
    assert grads["up"].stride() == problem.inputs[2].stride()
    assert grads["down"].stride() == problem.inputs[3].stride()


@pytest.mark.parametrize(
    ("index", "shape"),
    [
        pytest.param(INDEX, {"hidden": 10, "inner": 6}, id="odd widths"),
        pytest.param(
            INDEX, {"hidden": 70, "inner": 37, "gate": "clamped_swiglu_pairs", "bias": True}, id="several blocks"
        ),
        pytest.param([[1, 2]], {}, id="one token"),
        pytest.param([[0], [0], [0]], {"experts": 1}, id="one expert"),
        pytest.param([[2, 0, 1], [0, 1, 2]], {}, id="every expert"),
        pytest.param([[1]] * 35, {"hidden": 12, "inner": 8}, id="all to one expert"),
        pytest.param(
            [[i % 2, 2] for i in range(40)], {"hidden": 12, "inner": 8, "bias": True}, id="more rows than a block"
        ),
        pytest.param([[3, 0], [-1, 3], [1, -1], [7, 2], [2, 1]], {"bias": True}, id="empty assignments"),
        pytest.param([[-1, 3], [3, 3]], {"bias": True, "gate": "clamped_swiglu_pairs"}, id="only empty assignments"),
    ],
)
def test_shapes_and_routing(index, shape):
    Problem(index, **shape).check()


def test_idle_expert_has_a_gradient_of_exactly_zero():
    grads = Problem([[0, 2], [2, 0], [0, 2]], bias=True).check()
    for name in NAMES[2:]:
        assert not grads[name][1].any()
        assert grads[name][0].all()


def test_no_tokens():
    out, grads = Problem(torch.zeros(0, 2, dtype=torch.long), bias=True).run()
    assert out.shape == grads["x"].shape == (0, 20)
    assert not any(grads[name].any() for name in NAMES[2:])


def test_more_tiles_than_a_group():
    index = torch.randint(0, 3, (60, 3)).tolist()
    Problem(index, hidden=40, inner=40).check()


@pytest.mark.parametrize("gate", ["clamped_swiglu_pairs", "silu_gated"])
def test_the_up_projection_is_recomputed(gate):
    Problem(INDEX, gate=gate, bias=True).check(recompute=True)


@pytest.mark.parametrize("needed", [["x"], ["weight"], ["up"], ["down"], ["up_bias"], ["down_bias"], ["x", "weight"]])
def test_frozen_inputs_have_no_gradient(needed):
    problem = Problem(INDEX, bias=True)
    _, everything = problem.run()
    _, grads = problem.run(needs=[name in needed for name in NAMES])
    for name in NAMES:
        if name in needed:
            assert torch.equal(grads[name], everything[name])
        else:
            assert grads[name] is None


@pytest.mark.parametrize("gate", ["clamped_swiglu_pairs", "gelu_tanh_gated", "relu2"])
def test_half_precision(gate):
    Problem(INDEX, gate=gate, bias=True, dtype=torch.float16).check()


@NEEDS_GPU  # the interpreter's bfloat16 is not reliable
def test_bfloat16():
    Problem(torch.randint(0, 3, (300, 2)).tolist(), hidden=136, inner=72, bias=True, dtype=torch.bfloat16).check()


CONFIGS = {
    f"{family} {numbers} {rows}": (numbers, config)
    for family, tables in tiles.CONFIGS.items()
    for numbers, table in tables.items()
    for rows, config in table
} | {f"unaligned {numbers}": (numbers, tiles.UNALIGNED) for numbers in ("16bit", "float32")}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config(name):
    numbers, config = CONFIGS[name]
    dtype = torch.float16 if numbers == "16bit" else torch.float32
    Problem(INDEX, gate="clamped_swiglu_pairs", bias=True, dtype=dtype).check(config=config)


def test_strided_and_expanded_inputs():
    problem = Problem(INDEX)
    x, weight = problem.inputs[:2]
    problem.inputs[0] = x.repeat(1, 2)[:, ::2]
    problem.inputs[1] = weight.t().contiguous().t()
    problem.grad = problem.grad[:1, :1].expand(problem.grad.shape)
    problem.check()


@pytest.mark.parametrize(
    ("index", "shape"),
    [
        pytest.param(INDEX, {}, id="plain"),
        pytest.param([[3, 0], [-1, 3], [1, -1], [7, 2]], {"bias": True}, id="empty assignments"),
        pytest.param(INDEX, {"gate": "clamped_swiglu_pairs", "bias": True, "transposed": True}, id="gpt-oss"),
        pytest.param(INDEX, {"gate": "gelu", "hidden": 10, "inner": 70}, id="odd widths"),
        pytest.param([[0, 2, -1, 1] * 5, [3, 0, 1, 2] * 5], {"bias": True}, id="more experts than are unrolled"),
        pytest.param(
            [[0, 1]], {"gate": "clamped_swiglu_pairs", "hidden": 300, "dtype": torch.float16}, id="one token"
        ),
    ],
)
def test_decode(index, shape):
    problem = Problem(index, **shape)
    out = TRITON.decode(problem.problem, problem.index)
    dtype = problem.inputs[0].dtype
    rtol, atol = TOLERANCES[dtype]
    assert out.dtype == dtype
    torch.testing.assert_close(out, problem.run()[0], rtol=rtol, atol=atol)
    torch.testing.assert_close(out.double(), problem.oracle()[0], rtol=rtol, atol=atol)


def test_config_follows_the_rows_of_an_expert():
    def block(average: int) -> int:
        return tiles.choose_config(8 * average, (8, 64, 32), torch.float16, "hopper").up.BLOCK_M

    assert [block(average) for average in (1, 16, 17, 100, 160, 161, 9999)] == [16, 16, 32, 64, 64, 128, 128]


def test_configs_have_one_block_of_rows():
    for _, config in CONFIGS.values():
        assert config.block_of_rows() == config.up.BLOCK_M
    _, config = CONFIGS["hopper 16bit 32"]
    with pytest.raises(ValueError, match="make BLOCK_M one of"):
        Problem(INDEX).run(config=config._replace(up=config.up._replace(BLOCK_M=16)))
