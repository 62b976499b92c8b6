"""These tests compare the measured usage of experts with a loop over tokens and assignments."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from modeling_moe import MoEForCausalLM
from modeling_moe.resizing.usage import SCORES, Usage, measure_usage
from modeling_moe.utils.errors import UserError
from tests.builders import SMALLEST, tiny_config
from tests.resizing.families import tiny_family


IDS = torch.randint(3, 99, (4, 13), generator=torch.Generator().manual_seed(3))
MASK = torch.ones_like(IDS)
MASK[1, :5], MASK[2, :] = 0, 0
BATCHES = [{"input_ids": IDS[:1]}, {"input_ids": IDS[1:], "attention_mask": MASK[1:]}]


def naive(model, batches) -> tuple[dict[int, torch.Tensor], int]:
    """Returns (3, E) for each sparse layer: load, mass and reap."""
    sums = {i: torch.zeros(3, model.config.num_experts, dtype=torch.float64) for i in (0, 2)}
    count, inputs = 0, {}
    hooks = [
        model.model.layers[i].mlp.register_forward_pre_hook(lambda block, args, i=i: inputs.update({i: args[:2]}))
        for i in sums
    ]
    for batch in batches:
        model(**batch)
        kept = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).flatten().tolist()
        count += sum(kept)
        for i, (states, context) in inputs.items():
            block, tokens = model.model.layers[i].mlp, states.flatten(0, 1)
            routing = block.capacity(block.gate(tokens, context), context, False)
            for token, weights, experts, counts in zip(
                tokens, routing.weight, routing.index.tolist(), kept, strict=True
            ):
                for weight, expert in zip(weights, experts, strict=True):
                    if counts and expert < model.config.num_experts:
                        gate, up = block.experts.gate_up_proj[expert].double().chunk(2)
                        act = torch.nn.functional.silu(gate @ token.double()) * (up @ token.double())
                        norm = (block.experts.down_proj[expert].double() @ act).norm()
                        sums[i][:, expert] += torch.stack([torch.ones_like(norm), weight.double(), weight * norm])
    for hook in hooks:
        hook.remove()
    shares = {i: torch.stack([n / count, mass / count, reap / n.clamp(min=1)]) for i, (n, mass, reap) in sums.items()}
    return shares, count


@pytest.mark.parametrize(
    ("fields", "dtype", "implementation"),
    [
        ({}, torch.float64, "eager"),
        ({}, torch.float32, "moe"),
        ({"norm_topk_prob": False, "routed_scaling_factor": 2.0}, torch.float32, "grouped_mm"),
        ({}, torch.bfloat16, "moe"),
        ({"num_null_experts": 2, "num_copy_experts": 1}, torch.float32, "moe"),
        ({"eval_capacity_factor": 0.7}, torch.float32, "moe"),
        ({"router_type": "top_p"}, torch.float32, "moe"),
    ],
    ids=str,
)
@torch.no_grad()
def test_equals_a_loop_over_tokens(fields, dtype, implementation):
    model = MoEForCausalLM(tiny_config(**fields)).to(dtype)
    model.set_experts_implementation(implementation)
    usage = measure_usage(model.train(), BATCHES)
    assert model.training
    expected, tokens = naive(model.eval(), BATCHES)
    assert usage.tokens == tokens == 13 + 8 + 13
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 3e-2}[dtype]
    for layer, (load, mass, reap) in expected.items():
        got = usage.of(layer)
        torch.testing.assert_close(got.load, load, atol=1e-10, rtol=0)
        torch.testing.assert_close(got.mass, mass, atol=tolerance, rtol=tolerance)
        torch.testing.assert_close(got.reap, reap, atol=tolerance, rtol=tolerance)
        assert load.sum() > 0.4
        assert (load == 0).sum() < 3
    assert set(usage.layers) == {0, 2}
    assert not any(module._forward_hooks for module in model.modules())


def glu_norms(experts, tokens: torch.Tensor) -> torch.Tensor:
    """Returns the norms (T, E) of all experts' outputs for all tokens, from the weights in float64."""
    gate, up = torch.einsum("eih,th->tei", experts.gate_up_proj.double(), tokens).chunk(2, dim=-1)
    return torch.einsum("ehi,tei->teh", experts.down_proj.double(), torch.nn.functional.silu(gate) * up).norm(dim=-1)


def gpt_oss_norms(experts, tokens: torch.Tensor) -> torch.Tensor:
    """Returns the norms (T, E) of gpt-oss's experts: transposed weights, biases, gate and up in turn, clamped."""
    hidden = torch.einsum("ehi,th->tei", experts.gate_up_proj.double(), tokens) + experts.gate_up_proj_bias.double()
    gate, up = hidden[..., ::2].clamp(max=7.0), hidden[..., 1::2].clamp(-7.0, 7.0)
    out = torch.einsum("eih,tei->teh", experts.down_proj.double(), (up + 1) * gate * torch.sigmoid(1.702 * gate))
    return (out + experts.down_proj_bias.double()).norm(dim=-1)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_transformers_own_models(family, dtype):
    model = tiny_family(family, vocab_size=99).to(dtype)
    seen: dict[str, list[tuple]] = {}
    hooks = [
        module.register_forward_pre_hook(lambda module, args, name=name: seen.setdefault(name, []).append(args))
        for name, module in model.named_modules()
        if "has_gate" in vars(module)
    ]
    usage = measure_usage(model.train(), BATCHES)
    assert model.training
    for hook in hooks:
        hook.remove()
    real = torch.cat([MASK[:1].flatten(), MASK[1:].flatten()]).bool()
    assert (usage.tokens, usage.experts_per_token) == (13 + 8 + 13, 2)
    assert len(usage.layers) == len(seen)
    for name, passes in seen.items():
        tokens, index, weight = (torch.cat(parts)[real] for parts in zip(*passes, strict=True))
        experts = model.get_submodule(name)
        norms = (gpt_oss_norms if family == "gpt_oss" else glu_norms)(experts, tokens.double())
        chosen = torch.zeros(len(tokens), experts.num_experts).scatter(-1, index, 1.0).double()
        gate = torch.zeros_like(chosen).scatter(-1, index, weight.double())
        got = usage.of(int(name.split(".")[2]))
        torch.testing.assert_close(got.load, chosen.mean(dim=0))
        torch.testing.assert_close(got.mass, gate.mean(dim=0))
        tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
        reap = (gate * norms).sum(dim=0) / chosen.sum(dim=0).clamp(min=1)
        torch.testing.assert_close(got.reap, reap, rtol=tolerance, atol=tolerance)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_a_saved_usage_is_the_measured_one(tmp_path):
    usage = measure_usage(tiny_family("mixtral", vocab_size=99), BATCHES)
    usage.save(tmp_path / "use.json")
    read = Usage.read(tmp_path / "use.json")
    assert (read.tokens, read.experts_per_token, list(read.layers)) == (34, 2, [0, 1])
    for layer in usage.layers:
        assert all(torch.equal(getattr(read.of(layer), name), getattr(usage.of(layer), name)) for name in SCORES)


def test_idle_expert_has_none():
    model = MoEForCausalLM(tiny_config(router_selection_bias=True))
    for block in model.model.sparse_blocks():
        block.gate.e_score_correction_bias[1] = -10.0
    usage = measure_usage(model, BATCHES).of(2)
    assert usage.load[1] == usage.mass[1] == usage.reap[1] == 0
    torch.testing.assert_close(usage.load.sum().item(), 3.0)
    torch.testing.assert_close(usage.mass.sum().item(), 1.0)


def test_what_cannot_be_measured():
    model = MoEForCausalLM(tiny_config())
    with pytest.raises(UserError, match="no token"):
        measure_usage(model, [])
    with pytest.raises(UserError, match="lacks layer 1"):
        measure_usage(model, BATCHES).of(1)
    with pytest.raises(UserError, match="LlamaForCausalLM is a dense model"):
        measure_usage(AutoModelForCausalLM.from_config(LlamaConfig(**SMALLEST)), BATCHES)
    soft = MoEForCausalLM(tiny_config(router_type="soft_moe", allow_noncausal=True))
    with pytest.raises(UserError, match="router_type='soft_moe'"):
        measure_usage(soft, BATCHES)
