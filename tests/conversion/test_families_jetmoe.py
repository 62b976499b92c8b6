"""JetMoE, whose attention is a mixture of experts too, is imported with equal logits and text, and written back bit for bit."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, JetMoeConfig

from modeling_moe import MoEConfig, MoEForCausalLM
from modeling_moe.conversion import TARGETS, convert_checkpoint, to_moe
from modeling_moe.utils.errors import UserError
from tests import builders
from tests.conversion import harness


SIZE = {name: value for name, value in builders.SIZE.items() if name != "num_attention_heads"}
EXPERTS = {"num_local_experts": 5, "num_experts_per_tok": 3, "intermediate_size": 24}
# a large epsilon of the last norm shows that the other norms do not read it
BASE = SIZE | EXPERTS | {"kv_channels": 12, "rms_norm_eps": 0.1}
CONFIGS = {
    "jetmoe": JetMoeConfig(**BASE),
    "jetmoe-untied-eps": JetMoeConfig(**BASE | {"tie_word_embeddings": False, "rms_norm_eps": 1e-6}),
    # one key head, whose width is no divisor of the hidden size, and one expert for a token
    "jetmoe-one-head": JetMoeConfig(
        **BASE | {"hidden_size": 30, "num_key_value_heads": 1, "kv_channels": 14, "num_experts_per_tok": 1}
    ),
    "jetmoe-all-experts": JetMoeConfig(
        **BASE | {"num_key_value_heads": 3, "kv_channels": 2, "num_experts_per_tok": 5, "activation_function": "gelu"}
    ),
}


def random_source(name: str):
    source = harness.random_source(CONFIGS[name])
    assert source.num_parameters() == MoEForCausalLM(harness.moe_config(source.config)).num_parameters()
    return source


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", CONFIGS)
def test_same_logits_and_router_logits(name, side):
    source = random_source(name)
    model, batch = to_moe(source), harness.padded_batch(side)
    expected, got = (net(**batch, output_router_logits=True) for net in (source, model))
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(got.logits[real], expected.logits[real], **harness.TOLERANCE)
    # JetMoE has the routers of attention and of feed-forward networks in turn
    pairs = zip(got.attention_router_logits, got.router_logits, strict=True)
    mine = [logits for pair in pairs for logits in pair]
    for logits, theirs in zip(mine, expected.router_logits, strict=True):
        torch.testing.assert_close(logits[real.flatten()], theirs[real.flatten()], **harness.TOLERANCE)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", CONFIGS)
def test_same_logits_in_cached_decode(name, implementation):
    source = random_source(name)
    model, batch = to_moe(source), harness.padded_batch("left")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    for net in (source, model):
        net.set_attn_implementation(implementation)
    caches: list = [None, None]
    for stop, start in ((6, 0), (7, 6), (9, 7)):
        logits = []
        for place, net in enumerate((source, model)):
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, start:stop]
            output = net(
                ids[:, start:stop],
                attention_mask=mask[:, :stop],
                position_ids=positions,
                past_key_values=caches[place],
                use_cache=True,
            )
            caches[place] = output.past_key_values
            logits.append(output.logits[mask[:, start:stop].bool()])
        torch.testing.assert_close(logits[1], logits[0], **harness.TOLERANCE)
    held = caches[1].layers[0].keys
    assert held.shape == (3, source.config.num_key_value_heads, 9, source.config.kv_channels)


@pytest.mark.parametrize("name", ["jetmoe", "jetmoe-one-head"])
def test_same_text(name):
    source = random_source(name)
    arguments = harness.padded_batch("left") | {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    assert torch.equal(to_moe(source).generate(**arguments), source.generate(**arguments))


@pytest.mark.parametrize("name", CONFIGS)
def test_there_and_back_is_bitwise(name, tmp_path):
    source = random_source(name)
    source.save_pretrained(tmp_path / "source")
    done = convert_checkpoint(str(tmp_path / "source"), tmp_path / "moe")
    assert done.config.final_norm_eps == (0.1 if source.config.rms_norm_eps == 0.1 else None)
    convert_checkpoint(str(tmp_path / "moe"), tmp_path / "back", "jetmoe")
    tensors, expected = (load_file(tmp_path / folder / "model.safetensors") for folder in ("back", "source"))
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[key], expected[key]) for key in tensors)
    back = JetMoeConfig.from_pretrained(tmp_path / "back").to_dict()
    original = source.config.to_dict()
    differ = {key for key in original if back[key] != original[key]}
    assert differ <= {"architectures", "_name_or_path", "transformers_version"}, differ
    ids = torch.randint(3, 99, (2, 9))
    for folder in ("moe", "back"):
        model, info = AutoModelForCausalLM.from_pretrained(tmp_path / folder, output_loading_info=True)
        assert not any(info.values()), info
        torch.testing.assert_close(model.eval()(ids).logits, source(ids).logits, **harness.TOLERANCE)


def test_losses_of_both_kinds_have_the_sum_of_the_pooled_loss_in_balance():
    source = harness.random_source(CONFIGS["jetmoe"])
    for name, parameter in source.named_parameters():
        if ".router." in name:
            torch.nn.init.zeros_(parameter)
    model = to_moe(source)
    assert model.config.router_aux_loss_coef == source.config.aux_loss_coef / 2
    ids = torch.randint(3, 99, (2, 9))
    theirs = source(ids, output_router_logits=True).aux_loss
    # equal probabilities give a loss of K, whatever the tied choice is
    torch.testing.assert_close(theirs, torch.tensor(3.0))
    model.train()
    with_loss = model(ids, labels=ids).loss
    model.config.router_aux_loss_coef = 0.0
    torch.testing.assert_close(with_loss - model(ids, labels=ids).loss, 0.01 * theirs, atol=1e-6, rtol=0)


MOE = harness.SIZE | {
    "moe_intermediate_size": 24,
    "num_attention_heads": 6,
    "head_dim": 8,
    "num_experts": 5,
    "num_experts_per_tok": 3,
    "rms_norm_eps": 1e-6,
    "routed_attention": "moa",
    "attention_experts": 5,
    "attention_experts_per_tok": 3,
}


@pytest.mark.parametrize(
    "fields", [{}, {"moe_output_bias": True}, {"attention_output_bias": True, "routed_scaling_factor": 4.0}], ids=str
)
def test_own_model_is_exported_with_equal_logits(fields, tmp_path):
    model = harness.randomised(MoEForCausalLM(MoEConfig(**MOE | fields)))
    model.save_pretrained(tmp_path / "moe")
    done = convert_checkpoint(str(tmp_path / "moe"), tmp_path / "jetmoe", "auto")
    assert done.target == "jetmoe"
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "jetmoe").eval()
    batch = harness.padded_batch("right")
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(theirs(**batch).logits[real], model(**batch).logits[real], **harness.TOLERANCE)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"attention_experts": 7}, r"attention_experts=7 \(jetmoe has 5\)"),
        ({"num_attention_heads": 12}, r"num_attention_heads=12 \(jetmoe has 6\)"),
        ({"qkv_bias": True}, r"qkv_bias=True \(jetmoe has False\)"),
        ({"attention_bias": True}, r"attention_bias=True \(jetmoe has False\)"),
        ({"qk_norm": "head"}, r"qk_norm='head' \(jetmoe has None\)"),
        ({"rms_norm_eps": 1e-5}, r"rms_norm_eps=1e-05 \(jetmoe has 1e-06\)"),
        ({"mlp_layer_types": ["sparse", "dense", "sparse"]}, r"mlp_layer_types\[1\]='dense'"),
        ({"sliding_window": 4}, "sliding_window=4"),
        (
            {"routed_attention": None, "attention_experts": 8, "attention_experts_per_tok": 2},
            r"routed_attention=None \(jetmoe has 'moa'\)",
        ),
    ],
    ids=str,
)
def test_what_jetmoe_cannot_hold_is_refused_by_name(fields, message, tmp_path):
    model = MoEForCausalLM(MoEConfig(**MOE | fields))
    model.save_pretrained(tmp_path / "moe")
    with pytest.raises(UserError, match=message):
        convert_checkpoint(str(tmp_path / "moe"), tmp_path / "jetmoe", "jetmoe")
    assert not (tmp_path / "jetmoe").exists()


def test_other_targets_refuse_routed_attention_by_name():
    for name, target in TARGETS.items():
        reasons = target.reasons(MoEConfig(**MOE))
        # latent attention is another thing altogether, and is named instead
        named = "kv_lora_rank=" if name == "deepseek_v3" else "routed_attention='moa'"
        assert name == "jetmoe" or any(reason.startswith(named) for reason in reasons), (name, reasons)


def test_an_unknown_field_is_refused_and_the_flag_of_the_biases_is_reported():
    config = copy.deepcopy(CONFIGS["jetmoe"])
    config.bias = True
    assert harness.moe_config(config).moe_output_bias
    config.kv_proj = 3
    with pytest.raises(UserError, match="kv_proj"):
        harness.moe_config(config)
