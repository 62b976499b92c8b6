"""These tests compare a model with Triton experts, on a GPU if there is one, with transformers' eager loop."""

import pytest
import torch

from modeling_moe import MoEForCausalLM
from modeling_moe.dispatch import interface
from tests.builders import tiny_config
from tests.conftest import NEEDS_GPU, NEEDS_TRITON
from tests.core.test_catalogue import ALL_NAMES, IDS, batch_of, model_of


pytestmark = NEEDS_TRITON


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """Records the back end of each call of the operators, and fails if a call is not Triton's."""
    seen = []

    def watch(name: str, operator) -> None:
        def spy(*arguments):
            seen.append(name)
            # the operator gets the name of the back end, decode the back end
            assert "triton" in arguments or arguments[-1].name == "triton"
            return operator(*arguments)

        monkeypatch.setattr(interface, name, spy)

    for name in ("experts", "decode"):
        watch(name, getattr(interface, name))
    return seen


def gradients_of(model, batch) -> dict[str, torch.Tensor]:
    """Returns loss, logits and gradients of one training step, with the same noise in each call."""
    torch.manual_seed(7)
    batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
    output = model(**batch, labels=batch["input_ids"])
    output.loss.backward()
    named = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    return {"loss": output.loss.detach(), "logits": output.logits.detach(), **named}


def assert_same(got, expected, tolerance: float) -> None:
    """Compares each tensor to `tolerance` times the largest entry of the tensor."""
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        scale = max(tensor.abs().max().item(), 1e-6)
        torch.testing.assert_close(got[name], tensor, atol=tolerance * scale, rtol=0, msg=name)


@ALL_NAMES
def test_every_router_trains(name, device, calls):
    fields = {"num_hidden_layers": 1, "mlp_layer_types": ["sparse"], "experts_implementation": "eager"}
    if name == "deepseek_v4":
        fields["num_hash_layers"] = 0  # a hashed layer would leave the selection bias unread
    model = model_of(name, **fields).to(device).train()
    expected = gradients_of(model, batch_of(name))
    assert not calls
    model.set_experts_implementation("moe_triton")
    got = gradients_of(model, batch_of(name))
    assert calls
    assert_same(got, expected, 1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=NEEDS_GPU)], ids=["fp16", "bf16"])
def test_half_precision(dtype, device, calls):
    """A model of one layer is used, because a later router's choice may depend on rounding."""
    model = MoEForCausalLM(tiny_config(num_hidden_layers=1, mlp_layer_types=["sparse"])).to(device, dtype)
    model.set_experts_implementation("eager")
    expected = gradients_of(model, {"input_ids": IDS})
    model.set_experts_implementation("moe_triton")
    got = gradients_of(model, {"input_ids": IDS})
    assert calls == ["experts"]
    assert_same(got, expected, 0.05)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generates(cache, device, calls):
    model = MoEForCausalLM(tiny_config(eos_token_id=None)).eval().to(device)
    arguments = {"max_new_tokens": 4, "do_sample": False, "disable_compile": True, "cache_implementation": cache}
    model.set_experts_implementation("eager")
    expected = model.generate(IDS.to(device), **arguments)
    model.set_experts_implementation("moe_triton")
    assert model.generate(IDS.to(device), **arguments).equal(expected)
    # two sparse layers: one pass over the prompt, which has too many tokens for decode, and three steps
    assert calls == ["experts"] * 2 + ["decode"] * 6


def test_compiles_whole(device):
    """A compiled model equals the eager one in a training step and in a forward without gradient."""
    model = MoEForCausalLM(tiny_config(num_hidden_layers=1, mlp_layer_types=["sparse"])).to(device)
    model.set_experts_implementation("moe_triton")
    batch = {"input_ids": IDS}
    expected = gradients_of(model, batch)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
    ids = IDS.to(device)
    output = compiled(ids, labels=ids)
    output.loss.backward()
    got = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert_same({"loss": output.loss.detach(), "logits": output.logits.detach(), **got}, expected, 1e-4)
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids[:1]).logits, model(ids[:1]).logits, atol=1e-4, rtol=1e-4)


@NEEDS_GPU
def test_nothing_waits_for_the_gpu(device):
    """A training step and a decoding step never synchronise, so that a CUDA graph can hold both."""
    torch.use_deterministic_algorithms(False)  # torch's deterministic scatter is not the one that users run
    model = MoEForCausalLM(tiny_config(num_hidden_layers=1, mlp_layer_types=["sparse"])).to(device)
    experts, router = model.model.layers[0].mlp.experts, torch.Generator(device).manual_seed(0)
    for tokens in (100, 4):
        states = torch.randn(tokens, 32, device=device, requires_grad=tokens > 16)
        index = torch.randint(5, (tokens, 3), device=device, generator=router)
        weight = torch.rand(tokens, 3, device=device, generator=router)

        def step(states=states, index=index, weight=weight):
            with torch.set_grad_enabled(states.requires_grad):
                output = experts(states, index, weight)
            return torch.autograd.grad(output.sum(), states)[0] if states.requires_grad else output

        expected = step()  # compiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            got = step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert got.equal(expected)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        graph.replay()
        assert captured.equal(expected)
