"""Experts are recognised by what their gate computes, and a gate that cannot be trusted is left to transformers."""

import functools
import types

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from transformers.integrations import use_experts_implementation

from modeling_moe.dispatch import backend_of, recognition
from modeling_moe.dispatch.activations import ACTIVATIONS
from modeling_moe.dispatch.interface import reason_unsupported
from modeling_moe.dispatch.recognition import Recognition, recognise
from tests.builders import tiny_config
from tests.dispatch.kinds import assert_close, draw, make, oracle, run


HIDDEN, WIDTH = 32, 24
calls = []


def experts_with(gate=None, **attributes):
    """Returns experts of a new class with `gate` as `_apply_gate`, in float64, for `experts_implementation="moe"`."""

    class Experts(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.num_experts, self.intermediate_dim = 5, WIDTH
            self.gate_up_proj = nn.Parameter(torch.randn(5, 2 * WIDTH, HIDDEN) * 0.5)
            self.down_proj = nn.Parameter(torch.randn(5, HIDDEN, WIDTH))

        def forward(self, hidden_states, top_k_index, top_k_weights):
            output = torch.zeros_like(hidden_states)
            for choice in range(top_k_index.shape[1]):
                for token, expert in enumerate(top_k_index[:, choice].tolist()):
                    a = self._apply_gate(hidden_states[token, None] @ self.gate_up_proj[expert].T)
                    y = top_k_weights[token, choice] * (a @ self.down_proj[expert].T)[0]
                    output = output.index_add(0, torch.tensor([token]), y[None])
            return output

    if gate is not None:
        Experts._apply_gate = gate
    torch.manual_seed(0)
    module = use_experts_implementation(Experts)(tiny_config(experts_implementation="moe")).double()
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


def clamped(self, gate_up):
    g, u = gate_up.chunk(2, dim=-1)
    return functional.silu(g.clamp(max=self.most)) * u.clamp(-self.most, self.most)


def clamped_pairs(self, gate_up):
    g, u = gate_up[..., ::2].clamp(max=self.bounds[1]), gate_up[..., 1::2].clamp(-self.bounds[1], self.bounds[1])
    return (u + 1) * g * torch.sigmoid(self.bounds[0] * g)


def in_float32(self, gate_up):
    g, u = gate_up.float().split(self.intermediate_dim, dim=-1)
    return (functional.silu(g) * u).to(gate_up.dtype)


class OwnSiLU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(x)


class Wrapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.ReLU()

    def forward(self, x):
        return self.inner(x)


SERVED = {
    "a limit of any name": (clamped, {"most": 2}, "clamped_silu_gated", (1.0, 2.0)),
    "constants in a tuple": (clamped_pairs, {"bounds": (1.5, 2.0)}, "clamped_swiglu_pairs", (1.5, 2.0)),
    "no limit": (clamped, {"most": float("inf")}, "silu_gated", ()),
    "a plain function": (None, {"act_fn": functional.silu}, "silu_gated", ()),
    "a partial function": (
        None,
        {"act_fn": functools.partial(functional.gelu, approximate="tanh")},
        "gelu_tanh_gated",
        (),
    ),
    "an unknown module": (None, {"act_fn": OwnSiLU()}, "silu_gated", ()),
    "a module in a module": (None, {"act_fn": Wrapped()}, "relu_gated", ()),
    "a gate in float32": (in_float32, {}, "silu_gated", ()),
}


@pytest.mark.parametrize("name", SERVED)
def test_a_gate_is_known_by_its_values(name):
    gate, attributes, activation, constants = SERVED[name]
    module, inputs = experts_with(gate, **attributes), draw(9, 5, 3)
    assert recognise(module) == Recognition((activation, constants), None)
    assert backend_of(module, *inputs[:2]) == "loop"
    assert_close(run(module, *inputs), oracle(module, *inputs), 3e-6 if name == "a gate in float32" else 1e-13)


def gated(function):
    """Returns a gate that reads no variable but its arguments and the globals of this module."""

    def apply_gate(self, gate_up):
        return function(self, *gate_up.chunk(2, dim=-1))

    return apply_gate


def draws(self, gate_up):
    g, u = gate_up.chunk(2, dim=-1)
    return functional.silu(g) * u + 1e-3 * torch.rand_like(g)


def drops(self, gate_up):
    g, u = gate_up.chunk(2, dim=-1)
    return functional.dropout(functional.silu(g), 0.1, self.training) * u


def detaches(self, gate_up):
    g, u = gate_up.chunk(2, dim=-1)
    return functional.silu(g.detach()) * u


def clamps_after(self, gate_up):
    g, u = gate_up.chunk(2, dim=-1)
    return functional.silu(g).clamp(max=self.most) * u.clamp(-self.most, self.most)


def clamps_up_above(self, gate_up):
    g, u = gate_up.chunk(2, dim=-1)
    return functional.silu(g.clamp(max=self.most)) * u.clamp(max=self.most)


def clamps_far_away(self, gate_up):
    g, u = gate_up.chunk(2, dim=-1)
    return functional.silu(g.clamp(max=1e6)) * u


def learns(self, gate_up):
    g, u = gate_up.chunk(2, dim=-1)
    return functional.silu(g * self.scale) * u


def reads_config(self, gate_up):
    g, u = gate_up.chunk(2, dim=-1)
    return (functional.silu(g) if self.config.hidden_size else g) * u


def reads_variable(self, gate_up):
    g, u = gate_up.chunk(2, dim=-1)
    return (functional.silu(g) if not calls else g) * u


def counts(self, gate_up):
    self.calls = 1
    return functional.silu(gate_up[..., :WIDTH]) * gate_up[..., WIDTH:]


def remembers(self, gate_up, seen=[]):  # noqa: B006
    return functional.silu(gate_up[..., :WIDTH]) * gate_up[..., WIDTH:]


class CallableObject:
    def __call__(self, x):
        return functional.silu(x)


def fails(self, gate_up):
    return self.unknown(gate_up)


LEFT = {
    "random numbers": (draws, {}, "has no derivative here"),
    "dropout": (drops, {}, "has no derivative here"),
    "another gradient": (detaches, {}, "has no derivative here"),
    "a clamp behind the function": (clamps_after, {"most": 2.0}, "has no derivative here"),
    "one side of a clamp": (clamps_up_above, {"most": 2.0}, "has no derivative here"),
    "a limit that no attribute holds": (clamps_far_away, {}, "has no derivative here"),
    "a learned number": (
        learns,
        {"scale": nn.Parameter(torch.ones(()))},
        "has the tensor scale, whose use is unknown",
    ),
    "a buffer of its activation": (
        None,
        {"act_fn": nn.PReLU().double()},
        "has the tensor act_fn.weight, whose use is unknown",
    ),
    "a list": (clamped_pairs, {"bounds": [1.5, 2.0]}, "reads bounds, which is a list"),
    "the configuration": (reads_config, {}, "reads config, which is a MoEConfig"),
    "a variable of its file": (reads_variable, {}, "uses the global variable calls"),
    "a variable of a function": (gated(lambda self, g, u: functional.silu(g) * u), {}, "reads variables of another"),
    "a default that may change": (remembers, {}, "has a default that may change"),
    "state that it changes": (counts, {}, "changes calls"),
    "an error": (fails, {}, "raises AttributeError when it is evaluated alone"),
    "no activation": (None, {}, "raises AttributeError when it is evaluated alone"),
    "an object": (None, {"act_fn": CallableObject()}, "is no plain function"),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_is_not_certain_is_left_to_transformers(name):
    gate, attributes, reason = LEFT[name]
    module, inputs = experts_with(gate, **attributes), draw(9, 5, 3)
    assert reason in (reason_unsupported(module) or "served")
    assert backend_of(module, *inputs[:2]).startswith("transformers: it")
    if name not in ("an error", "no activation", "another gradient"):
        torch.manual_seed(3)
        output = module(*inputs[:3])
        module.config._experts_implementation = "eager"
        torch.manual_seed(3)
        assert torch.equal(output, module(*inputs[:3]))


def test_a_gate_of_the_module_alone_is_left_to_transformers():
    module = experts_with(act_fn=nn.SiLU())
    assert reason_unsupported(module) is None
    module._apply_gate = types.MethodType(clamped, module)
    assert "is an attribute of the module" in reason_unsupported(module)


def test_a_gate_that_replaces_that_of_a_class_is_evaluated():
    module = experts_with(act_fn=nn.SiLU(), most=2.0)
    assert recognise(module).activation == ("silu_gated", ())
    type(module)._apply_gate = clamped
    assert recognise(module).activation == ("clamped_silu_gated", (1.0, 2.0))


def test_hooks_on_the_activation_run():
    module, inputs, seen = experts_with(act_fn=nn.SiLU()), draw(9, 5, 3), []
    module(*inputs[:3])
    assert reason_unsupported(module) is None
    module.act_fn.register_forward_hook(lambda *arguments: seen.append(1))
    assert "has hooks" in reason_unsupported(module)
    module(*inputs[:3])
    assert seen


def test_a_missing_matrix_is_named():
    module = experts_with(act_fn=nn.SiLU())
    module.has_bias = True
    assert reason_unsupported(module) == "it has no gate_up_proj_bias"
    assert module(*draw(9, 5, 3)[:3]).shape == (9, HIDDEN)
    assert reason_unsupported(nn.Linear(2, 2)) == "it has no has_gate, which transformers' experts interface asks for"


def test_matrices_in_another_form_are_left_to_transformers():
    module = experts_with(act_fn=nn.SiLU())
    module.down_proj = nn.Parameter(module.down_proj.detach().flatten(1))
    assert reason_unsupported(module) == "its down_proj has 2 dimensions and not 3"
    module = experts_with(act_fn=nn.SiLU())
    module.down_proj = nn.Parameter(module.down_proj.detach().to(torch.float8_e4m3fn))
    assert reason_unsupported(module) == "its down_proj is torch.float8_e4m3fn"


def test_a_matrix_that_other_processes_hold_is_no_reason():
    """DeepSpeed's third stage leaves an empty tensor until the layer computes."""
    module = experts_with(act_fn=nn.SiLU())
    whole, module.down_proj.data = module.down_proj.data, torch.empty(0, dtype=torch.float64)
    assert reason_unsupported(module) is None
    module.down_proj.data, inputs = whole, draw(9, 5, 3)
    assert_close(run(module, *inputs), oracle(module, *inputs), 1e-13)


def test_a_change_of_what_a_gate_reads_is_noticed():
    module, inputs = experts_with(drops, training=False), draw(9, 5, 3)
    assert recognise(module).activation == ("silu_gated", ())
    module.train()
    assert "no derivative" in recognise(module).reason
    module = experts_with(clamped, most=2.0)
    for most in (2.0, 0.5):
        module.most = most
        assert recognise(module).activation == ("clamped_silu_gated", (1.0, most))
        assert_close(run(module, *inputs), oracle(module, *inputs), 1e-13)


@pytest.mark.parametrize("function", [functional.silu, functools.partial(functional.gelu, approximate="tanh")])
def test_plain_functions_compile_whole(function):
    module, inputs = experts_with(act_fn=function), draw(9, 5, 3)
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    for module.act_fn in (function, functional.relu):
        assert_close([compiled(*inputs[:3])], oracle(module, *inputs)[:1], 1e-13)


def test_a_compiled_model_notices_a_changed_limit():
    module, inputs = make("gpt_oss", "moe_loop"), draw(9, 5, 3)
    module._forward_pre_hooks.clear()
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    for limit in (7.0, 0.4):
        module.limit = limit
        assert_close([compiled(*inputs[:3])], oracle(module, *inputs)[:1], 1e-13)


@pytest.mark.parametrize(
    "mode",
    [torch.inference_mode, FakeTensorMode, functools.partial(torch.device, "meta")],
    ids=["inference", "fake", "meta"],
)
def test_a_gate_is_evaluated_in_every_mode(mode):
    module = experts_with(clamped, most=2.0)
    with mode():
        assert recognise(module).activation == ("clamped_silu_gated", (1.0, 2.0))


def test_layers_share_an_evaluation(monkeypatch):
    evaluated = []
    monkeypatch.setattr(
        recognition,
        "_evaluate_gate",
        lambda *arguments, of=recognition._evaluate_gate: evaluated.append(1) or of(*arguments),
    )
    kind = type(experts_with(act_fn=nn.SiLU()))
    modules = [kind(tiny_config()) for _ in range(3)]
    for module in modules:
        module.act_fn = nn.SiLU()
        recognise(module)
    assert len(evaluated) == 1
    modules[2].act_fn = nn.ReLU()
    assert [recognise(module).activation.name for module in modules] == ["silu_gated", "silu_gated", "relu_gated"]
    assert len(evaluated) == 2


@pytest.mark.parametrize("layout", ["halves", "pairs"])
@pytest.mark.parametrize("limit", [0.01, 7.0, 300.0])
def test_the_numbers_lie_on_all_sides_of_a_limit(limit, layout):
    h = recognition._draw(2 * WIDTH, [limit])
    g, u = h.chunk(2, dim=-1) if layout == "halves" else (h[:, ::2], h[:, 1::2])
    edges = torch.tensor([-limit, limit], dtype=h.dtype)
    sides = torch.stack([torch.bucketize(g.contiguous(), edges), torch.bucketize(u.contiguous(), edges)]).flatten(1)
    assert len(torch.unique(sides, dim=1).T) == 9
    assert any(limit * 0.99 < number < limit for number in g.flatten().tolist())


def test_activations_name_their_constants():
    assert {len(activation.constants) for name, activation in ACTIVATIONS.items() if name.startswith("clamped")} == {2}
