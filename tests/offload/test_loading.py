"""A model that is loaded without its experts is, but for them, the model that from_pretrained loads."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GenerationConfig

from modeling_moe import MoEForCausalLM
from modeling_moe.checkpoint_damage import CheckpointError
from modeling_moe.checkpoints import open_source
from modeling_moe.offload import from_pretrained_offloaded, load_without_experts, offload_statistics, offloading
from modeling_moe.offload.loading import _refuse_unread
from modeling_moe.offload.policies import POLICIES
from modeling_moe.offload.tracing import trace, traced_state
from modeling_moe.offload.watched_file import WatchedFile
from modeling_moe.utils.errors import UserError
from tests.builders import tiny_config
from tests.monitoring.moe_families import experts_families, tiny_family
from tests.offload.test_stores import assert_experts_of


# with tied embeddings, biases of routers, buffers of rotary positions of several kinds, convolutions
FAMILIES = ["mixtral", "gpt_oss", "deepseek_v3", "gemma4", "lfm2_moe", "hy_v4"]


def assert_alike(found, wanted) -> None:
    """Fails unless a model without experts has the other parameters, the buffers and the settings of a whole model."""
    model, stores = found
    assert_experts_of(stores, wanted)
    parts = {f"{name}.{part}" for name, store in stores.items() for part in store.parts}
    own, theirs = dict(model.named_parameters()), dict(wanted.named_parameters())
    assert own.keys() == theirs.keys()
    for name, parameter in theirs.items():
        assert own[name].is_meta == (name in parts), name
        assert (own[name].shape, own[name].dtype) == (parameter.shape, parameter.dtype), name
        assert own[name].is_meta or torch.equal(own[name], parameter), name
        # products round by the alignment of their matrices
        assert own[name].is_meta or own[name].data_ptr() % 64 == parameter.data_ptr() % 64, name
        assert type(own[name]) is torch.nn.Parameter, name
    own, theirs = dict(model.named_buffers()), dict(wanted.named_buffers())
    assert own.keys() == theirs.keys()
    for name, buffer in theirs.items():
        assert torch.equal(own[name], buffer), name
    assert type(model) is type(wanted)
    assert not model.training
    assert model.config.to_dict() == wanted.config.to_dict()
    if model.can_generate():
        assert model.generation_config.to_dict() == wanted.generation_config.to_dict()
    if wanted.get_output_embeddings() is not None and getattr(wanted.config, "tie_word_embeddings", False):
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("tier", ["disk", "pinned"])
@pytest.mark.parametrize("family", FAMILIES)
def test_families(family, tier, tmp_path):
    model = tiny_family(family)
    model.save_pretrained(tmp_path)
    wanted = type(model).from_pretrained(tmp_path)
    assert_alike(load_without_experts(tmp_path, tier, model_class=type(model)), wanted)


def tiny(**fields) -> MoEForCausalLM:
    torch.manual_seed(0)
    return MoEForCausalLM(tiny_config(num_hidden_layers=2, mlp_layer_types=None, **fields))


@pytest.mark.parametrize("tier", ["disk", "pinned"])
@pytest.mark.parametrize("dtype", ["auto", torch.bfloat16, "float32"])
def test_our_checkpoint_of_shards_in_each_dtype(dtype, tier, tmp_path):
    model = tiny(tie_word_embeddings=True)
    model.generation_config = GenerationConfig(temperature=0.5, do_sample=True, eos_token_id=[2, 7])
    model.to(torch.float16).save_pretrained(tmp_path, max_shard_size="20KB")
    wanted = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert wanted.generation_config.eos_token_id == [2, 7]
    found = load_without_experts(tmp_path, tier, dtype)
    assert_alike(found, wanted)
    assert found.model.name_or_path == str(tmp_path)


def test_arguments_reach_the_model(tmp_path):
    tiny().save_pretrained(tmp_path)
    config = MoEForCausalLM.config_class.from_pretrained(tmp_path, num_experts_per_tok=2)
    model, _ = load_without_experts(str(tmp_path), config=config, attn_implementation="eager", device="cpu")
    assert model.config._attn_implementation == "eager"
    assert model.config.num_experts_per_tok == 2
    assert config._attn_implementation != "eager"
    assert model.model.embed_tokens.weight.device.type == "cpu"


@pytest.mark.parametrize("tier", ["disk", "pinned"])
def test_code_of_a_checkpoint_is_used_if_it_is_trusted(tier, tmp_path):
    """Our code is saved under another model type, so that the installed package does not serve it."""
    tiny().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "moe_of_somebody"}))
    code = tmp_path / "configuration_moe.py"
    code.write_text(code.read_text().replace('model_type = "moe"', 'model_type = "moe_of_somebody"'))
    wanted = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(wanted).__module__.startswith("transformers_modules.")
    assert_alike(load_without_experts(tmp_path, tier, trust_remote_code=True), wanted)
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_without_experts(tmp_path, tier)


def test_a_model_of_the_hub_is_taken_from_the_cache(tmp_path):
    model = tiny()
    snapshot = tmp_path / "models--somebody--tiny" / "snapshots" / ("0" * 40)
    model.save_pretrained(snapshot, max_shard_size="30KB")
    refs = tmp_path / "models--somebody--tiny" / "refs"
    refs.mkdir()
    (refs / "v2").write_text("0" * 40)
    found = load_without_experts("somebody/tiny", revision="v2", cache_dir=tmp_path, local_files_only=True)
    assert found.model.name_or_path == "somebody/tiny"
    assert_experts_of(found.stores, model)
    with pytest.raises(OSError, match="find them in the cached files"):
        load_without_experts("somebody/tiny", revision="v3", cache_dir=tmp_path, local_files_only=True)


def test_a_missing_expert_and_a_wrong_shape_are_refused_by_name(tmp_path):
    tiny().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    file = tmp_path / "model.safetensors"
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        load_without_experts(tmp_path)
    save_file(tensors | {name: torch.zeros(3, 3)}, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        load_without_experts(tmp_path)


def test_a_weight_in_one_tensor_with_experts_is_refused(tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path)
    traced = trace(type(model), model.config, traced_state(open_source(tmp_path).state), "auto")
    _refuse_unread(model, tmp_path)
    model.model.norm.weight = traced.model.norm.weight
    with pytest.raises(UserError, match=r"model\.norm\.weight of .* lies in one tensor with experts"):
        _refuse_unread(model, tmp_path)


def test_wrong_requests_are_refused(tmp_path):
    with pytest.raises(ValueError, match="tier='cloud' is unknown: use 'disk' or 'pinned'"):
        load_without_experts(tmp_path, tier="cloud")
    with pytest.raises(UserError, match="there is no such folder"):
        load_without_experts(tmp_path / "nowhere")
    tiny().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"has no model\.safetensors and no index of shards"):
        load_without_experts(tmp_path)
    with pytest.raises(TypeError, match="unexpected keyword argument 'max_memory'"):
        load_without_experts(tmp_path, max_memory={0: "1GB"})


def test_dense_checkpoints_are_refused(tmp_path):
    model = MoEForCausalLM(tiny_config(mlp_layer_types=["dense"] * 3))
    model.save_pretrained(tmp_path)
    for tier in ("disk", "pinned"):
        with pytest.raises(
            UserError, match="has no experts that transformers' experts interface calls: load it whole"
        ):
            load_without_experts(tmp_path, tier)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3", "moe"])
def test_logits_and_text_have_the_bits_of_the_whole_model(family, dtype, tmp_path):
    model = tiny() if family == "moe" else tiny_family(family)
    model.save_pretrained(tmp_path)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype, experts_implementation="moe")
    tokens = torch.arange(3, 39).view(2, 18)
    for tier, prefetch in (("disk", 1), ("pinned", None)):
        found = from_pretrained_offloaded(
            tmp_path, slots=4, tier=tier, policy="lfru", prefetch=prefetch, dtype=dtype, device="cpu"
        )
        assert type(found) is type(whole)
        with torch.no_grad():
            assert torch.equal(found(tokens).logits, whole(tokens).logits)
        ids = [each.generate(tokens, max_new_tokens=6, do_sample=False) for each in (found, whole)]
        assert torch.equal(*ids)
        assert offload_statistics(found).total.misses > 0


def test_arguments_reach_the_cache(tmp_path, monkeypatch):
    """What a prefetch counts depends on the time, so the call is looked at."""
    tiny().save_pretrained(tmp_path)
    calls = []
    monkeypatch.setattr(offloading, "prefetch_experts", lambda model, extra: calls.append((model, extra)))
    model = from_pretrained_offloaded(tmp_path, "1GB", policy="lfu", prefetch=2, device="cpu")
    assert calls == [(model, 2)]
    cache = model.model.layers[1].mlp.experts.offloaded.cache
    assert type(cache.policy) is POLICIES["lfu"]
    assert len(cache.slots.experts) == 5
    other = from_pretrained_offloaded(tmp_path, slots=4)
    assert len(calls) == 1
    assert type(other.model.layers[1].mlp.experts.offloaded.cache.policy) is POLICIES["lfru"]


def test_a_change_in_the_middle_of_a_generation_is_one_clear_error(tmp_path):
    tiny().save_pretrained(tmp_path)
    model = from_pretrained_offloaded(tmp_path, slots=3)
    model.generate(torch.tensor([[3, 4]]), max_new_tokens=3, do_sample=False)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    save_file({name: torch.randn_like(tensor) for name, tensor in tensors.items()}, file, {"format": "pt"})
    with pytest.raises(
        UserError, match=r"model\.safetensors changed while the model was using it: load the model again"
    ):
        model.generate(torch.arange(3, 40)[None], max_new_tokens=8, do_sample=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device_map": "auto"}, "takes no device_map: give device"),
        ({"load_in_4bit": True}, "takes no load_in_4bit: experts are read as the checkpoint holds them"),
        ({"max_memory": {0: "1GB"}}, "unexpected keyword argument 'max_memory'"),
    ],
)
def test_other_options_are_refused(options, message, tmp_path):
    with pytest.raises(TypeError, match=message):
        from_pretrained_offloaded(tmp_path, slots=4, **options)


def test_a_budget_below_the_experts_of_a_token_is_refused_before_weights_are_read(tmp_path, monkeypatch):
    tiny().save_pretrained(tmp_path)
    monkeypatch.setattr(WatchedFile, "read_into", None)
    with pytest.raises(ValueError, match="one token needs 3"):
        from_pretrained_offloaded(tmp_path, slots=2)
    with pytest.raises(ValueError, match="one token needs 3"):
        from_pretrained_offloaded(tmp_path, budget="20KB")
    with pytest.raises(ValueError, match="policy"):
        from_pretrained_offloaded(tmp_path, slots=3, policy="newest")


@pytest.mark.slow
@pytest.mark.parametrize("family", experts_families())
def test_every_family(family, tmp_path):
    model = tiny_family(family)
    model.save_pretrained(tmp_path)
    wanted = type(model).from_pretrained(tmp_path)
    assert_alike(load_without_experts(tmp_path, model_class=type(model)), wanted)
