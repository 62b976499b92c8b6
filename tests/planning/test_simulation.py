"""These tests compare simulated runs with real ones of tiny models: parameters, caches, operators, memory, gradients."""

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, BertConfig

from modeling_moe.lora import moe_lora_config
from modeling_moe.monitoring import experts_modules, sparse_layers
from modeling_moe.planning import simulated_model
from modeling_moe.planning.memory import gradient_bytes, optimizer_bytes
from modeling_moe.planning.parallelism import Parallelism
from modeling_moe.planning.recording import CostRecorder
from modeling_moe.planning.simulation import SimulationError, cache_bytes
from modeling_moe.planning.sizes import sizes_of
from modeling_moe.utils.errors import UserError
from tests.planning.families import CONFIGS


def real_model(family: str, dtype: torch.dtype = torch.float32):
    """Returns a model with memory, whose experts run as in the simulation."""
    model = AutoModelForCausalLM.from_config(CONFIGS[family], dtype=dtype)
    if experts_modules(model):
        model.set_experts_implementation("moe")
    return model


def adapted(model, method: str):
    """Returns a model in which only what a method trains requires gradients."""
    if method == "lora":
        return get_peft_model(model, moe_lora_config(model))
    if method == "router":
        model.requires_grad_(False)
        for layer in sparse_layers(model):
            assert layer.router is not None
            layer.router.requires_grad_()
    return model


@pytest.mark.parametrize("family", CONFIGS)
def test_parameters_are_those_of_the_model(family):
    sizes, model = sizes_of(simulated_model(CONFIGS[family], torch.float32)), real_model(family)
    assert sizes.total == sum(parameter.numel() for parameter in model.parameters())
    held = [*model.parameters(), *model.buffers()]
    assert sizes.weight_bytes == sum(tensor.numel() * tensor.element_size() for tensor in held)
    assert sizes.active is not None
    assert (sizes.active < sizes.total) == bool(experts_modules(model))


def test_active_parameters_of_mixtral_by_hand():
    sizes = sizes_of(simulated_model(CONFIGS["mixtral"], torch.bfloat16))
    expert, router = 3 * 32 * 40, 4 * 32
    assert sizes.groups["routed experts"].params == 2 * 4 * expert
    assert sizes.groups["routers"].params == 2 * router
    assert sizes.groups["embeddings and head"].params == 2 * 99 * 32
    # two layers of q, k, v, o of 4 and 2 heads of width 8, two norms each, and the last norm
    assert sizes.groups["attention and others"].params == 2 * (2 * 32 * 32 + 2 * 32 * 16 + 2 * 32) + 32
    assert sizes.active == sizes.total - 2 * (4 - 2) * expert
    assert (sizes.num_experts, sizes.top_k, sizes.sparse_layers, sizes.layers) == (4, 2, 2, 2)


@pytest.mark.parametrize(
    "family", ["llama", "moe", "moe_latent", "mistral_window", "gemma3", "gpt_oss", "deepseek_v3"]
)
def test_the_cache_has_the_bytes_of_the_real_one(family):
    simulated, model, ids = simulated_model(CONFIGS[family], torch.float32), real_model(family), torch.ones(2, 20)
    model.eval()
    with torch.no_grad():
        cache = model(input_ids=ids.long(), use_cache=True).past_key_values
        planned = simulated.prefill(2, 20)
        assert cache_bytes(planned.cache) == cache_bytes(cache) > 0
        simulated.decode(2, planned.cache)
        model(input_ids=ids[:, :1].long(), past_key_values=cache, use_cache=True)
        assert cache_bytes(planned.cache) == cache_bytes(cache)


def test_caches_by_hand():
    # layers x (keys and values) x heads x width x tokens x bytes
    assert cache_bytes(simulated_model(CONFIGS["llama"], torch.float32).prefill(1, 20).cache) == 2 * 2 * 2 * 8 * 20 * 4
    # a window of 8 keeps 7 tokens for the next one, and the eighth tensor is the next token's own
    held = cache_bytes(simulated_model(CONFIGS["mistral_window"], torch.float32).prefill(1, 20).cache)
    assert held == 2 * 2 * 2 * 8 * 7 * 4
    latent = cache_bytes(simulated_model(CONFIGS["moe_latent"], torch.float32).prefill(1, 20).cache)
    assert latent == 3 * (8 + 4) * 20 * 4


@pytest.mark.parametrize("method", ["full", "lora", "router"])
@pytest.mark.parametrize("family", ["moe", "mixtral"])
def test_gradients_and_optimizer_have_the_bytes_of_a_real_training(family, method):
    simulated = simulated_model(CONFIGS[family], torch.float32, method)
    sizes, model = sizes_of(simulated), adapted(real_model(family), method)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True)
    ids = torch.randint(0, 99, (2, 24))
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    assert sizes.trained == sum(parameter.numel() for parameter in trained)
    gradients = sum(p.grad.numel() * p.grad.element_size() for p in trained if p.grad is not None)
    assert gradient_bytes(sizes, Parallelism()) == gradients
    state = [value for values in optimizer.state.values() for value in values.values()]
    assert optimizer_bytes(sizes, Parallelism()) == sum(value.numel() * value.element_size() for value in state)


@pytest.mark.parametrize("recompute", ["none", "experts", "layers"])
@pytest.mark.parametrize("family", ["llama", "moe", "deepseek_v3"])
def test_a_simulated_step_has_operators_and_memory_of_a_real_one(family, recompute):
    cost = simulated_model(CONFIGS[family], torch.float32, "full").training_step(2, 24, recompute)
    model = real_model(family).train()
    model.config.experts_recompute = recompute == "experts"
    if recompute == "layers":
        model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    ids = torch.zeros(2, 24, dtype=torch.long)
    with CostRecorder([*model.parameters(), *model.buffers()]) as recorder:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    model.config.experts_recompute = False
    assert cost.flops == recorder.cost.flops > 0
    assert cost.nbytes == pytest.approx(recorder.cost.nbytes, rel=0.02)
    assert cost.peak == pytest.approx(recorder.cost.peak, rel=0.02)


def test_recomputation_saves_memory_and_costs_arithmetic():
    simulated = simulated_model(CONFIGS["moe"], torch.float32, "full")
    costs = [simulated.training_step(4, 32, recompute) for recompute in ("none", "experts", "layers")]
    assert costs[0].activation_peak > costs[1].activation_peak > costs[2].activation_peak
    assert costs[0].flops < costs[1].flops < costs[2].flops


def test_arithmetic_of_a_prompt_by_hand():
    cost = simulated_model(CONFIGS["llama"], torch.float32).prefill(2, 16).cost
    tokens, layer = 32, 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 40
    # half of the scores are masked; the head sees the last token of each sequence alone
    attention = 2 * 2 * (2 * 4 * 16 * 16 * 2 * 8) // 2
    rotary = 2 * 4 * 16  # the table of rotary positions is an outer product, if the model computes it as one
    expected = 2 * tokens * 2 * layer + attention + 2 * 2 * 99 * 32
    assert expected <= cost.flops <= expected + rotary


def test_mistakes():
    with pytest.raises(UserError, match="makes no causal LM"):
        simulated_model(BertConfig(is_decoder=True, hidden_size=30, num_attention_heads=4), torch.float32)
    with pytest.raises(UserError, match="the model has no routers that are known"):
        simulated_model(CONFIGS["llama"], torch.float32, "router")
    # grouped_mm takes 16 bits alone
    simulated = simulated_model(CONFIGS["mixtral"], torch.float32, experts_implementation="grouped_mm")
    with pytest.raises(SimulationError, match="cannot run on tensors without values"):
        simulated.prefill(1, 4)
