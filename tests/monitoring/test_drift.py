"""These tests check the drift of experts between two checkpoints against sums over single tokens."""

import copy

import pytest
import torch
from peft import get_peft_model

from modeling_moe import MoEForCausalLM
from modeling_moe.checkpoints import LazyTensor
from modeling_moe.lora import moe_lora_config
from modeling_moe.monitoring import expert_drift, sparse_layers
from modeling_moe.resizing.growth import GrowthOptions, grow, release_experts
from modeling_moe.utils.errors import UserError
from tests.builders import tiny_config
from tests.monitoring.moe_families import tiny_family


IDS = torch.randint(3, 99, (4, 9), generator=torch.Generator().manual_seed(1))
MASK = torch.ones_like(IDS)
MASK[0, :3] = 0
BATCHES = {
    "a": [{"input_ids": IDS[:2], "attention_mask": MASK[:2]}, {"input_ids": IDS[2:3]}],
    "b": [{"input_ids": IDS[3:]}],
}


def model_of(**fields) -> MoEForCausalLM:
    torch.manual_seed(0)
    return MoEForCausalLM(tiny_config(**fields)).double().train()


def moved(model, std: float = 0.05):
    """Returns a copy with noise on all weights."""
    torch.manual_seed(5)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(std * torch.randn_like(parameter))
    return other


def routings(model, batch) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Returns the input and the routing of each router."""
    found = []
    hooks = [
        block.gate.register_forward_hook(lambda gate, args, output: found.append((args[0], output)))
        for block in model.model.sparse_blocks()
    ]
    model(**batch)
    for hook in hooks:
        hook.remove()
    return found


def test_the_figures_are_sums_over_single_tokens():
    before = model_of()
    after = moved(before)
    drift = expert_drift(before, after, BATCHES)
    assert all(module.training for module in (*before.modules(), *after.modules()))
    before.eval()
    after.eval()
    blocks = list(zip(before.model.sparse_blocks(), after.model.sparse_blocks(), strict=True))
    for place, (old, new) in enumerate(blocks):
        vectors = [
            torch.cat([b.experts.gate_up_proj.flatten(1), b.experts.down_proj.flatten(1)], dim=1).detach()
            for b in (old, new)
        ]
        layer = drift.layers[place]
        change = (vectors[1] - vectors[0]).norm(dim=1) / vectors[0].norm(dim=1)
        torch.testing.assert_close(layer.weight_change, change, atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(
            layer.weight_cosine, torch.cosine_similarity(*vectors, dim=1), atol=1e-12, rtol=1e-12
        )
        for domain, batches in BATCHES.items():
            lost = made = 0
            squares, changes, cosines, load = torch.zeros(4, 5, dtype=torch.float64)
            for batch in batches:
                states, one = routings(before, batch)[place]
                _, two = routings(after, batch)[place]
                mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).flatten()
                for token in mask.nonzero().flatten().tolist():
                    for expert in one.index[token].tolist():
                        made += 1
                        lost += expert not in two.index[token].tolist()
                        pair = [
                            block.experts(
                                states[token : token + 1], torch.tensor([[expert]]), torch.ones(1, 1).double()
                            )[0]
                            for block in (old, new)
                        ]
                        load[expert] += 1
                        squares[expert] += pair[0].square().sum().item()
                        changes[expert] += (pair[1] - pair[0]).square().sum().item()
                        cosines[expert] += torch.cosine_similarity(*pair, dim=0).item()
            found = layer.domains[domain]
            assert found.rerouted == pytest.approx(lost / made, abs=1e-12)
            assert 0 < found.rerouted < 1
            assert found.new_share == 0
            assert torch.equal(found.load, load)
            torch.testing.assert_close(found.output_change, (changes / squares).sqrt(), equal_nan=True)
            torch.testing.assert_close(found.output_cosine, cosines / load, equal_nan=True)


def test_forgetting_is_the_rise_of_the_loss_on_real_tokens():
    before = model_of()
    after = moved(before)
    drift = expert_drift(before, after, BATCHES)
    for model, losses in ((before.eval(), drift.loss_before), (after.eval(), drift.loss_after)):
        for domain, batches in BATCHES.items():
            nats, tokens = 0.0, 0
            for batch in batches:
                mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
                before_is_real = torch.nn.functional.pad(mask[:, :-1], (1, 0))
                labels = batch["input_ids"].masked_fill(mask * before_is_real == 0, -100)
                count = int((labels[:, 1:] != -100).sum())
                nats += model(**batch, labels=labels).loss.item() * count
                tokens += count
            assert losses[domain] == pytest.approx(nats / tokens, abs=1e-6)  # transformers' loss is fp32
    assert drift.forgetting == {domain: drift.loss_after[domain] - drift.loss_before[domain] for domain in BATCHES}


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_any_moe_is_compared(family):
    before = tiny_family(family)
    ids = torch.randint(3, before.config.get_text_config().vocab_size, (2, 9))
    batches = {"text": [{"input_ids": ids}]}
    still = expert_drift(before, copy.deepcopy(before), batches)
    assert still.forgetting == {"text": 0.0}
    assert still.mean("weight_change") == still.mean("rerouted", "text") == still.mean("output_change", "text") == 0
    assert still.mean("weight_cosine") == pytest.approx(1) == still.mean("output_cosine", "text")
    after = moved(before)
    drift = expert_drift(before, after, batches)
    assert drift.mean("weight_change") > 0.01
    assert drift.mean("output_change", "text") > 0.01
    assert [layer.name for layer in drift.layers] == [layer.name for layer in sparse_layers(before)]


def test_new_experts_are_told_from_old_ones():
    before = model_of(num_experts=6)
    state = {name: LazyTensor.of(tensor) for name, tensor in before.state_dict().items()}
    tensors, config = grow(state, before.config, GrowthOptions(mode="masked", num_experts=8, noise=0.1))
    after = MoEForCausalLM(config).double()
    after.load_state_dict({name: tensor.read() for name, tensor in tensors.items()})
    masked = expert_drift(before, after, BATCHES)
    assert masked.mean("new_share", "a") == masked.mean("rerouted", "a") == masked.mean("weight_change") == 0
    assert masked.forgetting["a"] == pytest.approx(0, abs=1e-6)
    release_experts(after, [6, 7])
    released = expert_drift(before, after, BATCHES)
    assert released.mean("weight_change") == released.mean("output_change", "a") == 0
    assert released.mean("new_share", "a") > 0.1
    assert released.mean("rerouted", "a") > 0.1
    with pytest.raises(UserError, match="experts may be added, not removed"):
        expert_drift(after, before, BATCHES)


def test_models_that_cannot_be_compared_are_refused():
    before = model_of()
    with pytest.raises(UserError, match="compare checkpoints of one model"):
        expert_drift(before, model_of(moe_intermediate_size=32), BATCHES)
    with pytest.raises(UserError, match="2 and 1 sparse layers"):
        expert_drift(before, model_of(mlp_layer_types=["dense", "dense", "sparse"]), BATCHES)
    with pytest.raises(UserError, match="'empty' has no token to predict"):
        expert_drift(before, before, {"empty": []})
    attending = model_of(routed_attention="moa", num_key_value_heads=1)
    with pytest.raises(UserError, match=r"layers.0.self_attn.experts are experts of attention"):
        expert_drift(attending, attending, BATCHES)
    adapted = get_peft_model(model_of(), moe_lora_config(before, r=2))
    with pytest.raises(UserError, match="merge the adapter first"):
        expert_drift(before, adapted, BATCHES)
