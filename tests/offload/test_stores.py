"""Each expert that a store reads is bitwise the expert of the model that from_pretrained loads."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from modeling_moe import MoEForCausalLM
from modeling_moe.offload.stores import (
    PinnedStore,
    disk_stores,
    expert_parameters,
    named_experts,
    refuse_quantised_experts,
)
from modeling_moe.utils.errors import UserError
from tests.builders import tiny_config
from tests.monitoring.moe_families import experts_families, tiny_family


FAMILIES = [
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "olmoe",
    "deepseek_v3",
    "glm4_moe",
    "gpt_oss",
    "granitemoe",
    "ernie4_5_moe",
    "minimax_m2",
    "phimoe",
    "nemotron_h",
    "inkling",
    "zaya",
]
OURS = {"gated": {}, "biased": {"mlp_bias": True}, "plain": {"gated_experts": False}}


def read(store, expert: int, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """Reads an expert into new memory."""
    memory = {name: torch.full(shape, torch.nan, dtype=dtype or own) for name, (shape, own) in store.parts.items()}
    store.read(expert, memory)
    return memory


def assert_experts_of(stores, model) -> None:
    """Fails unless the stores hold all experts of a model."""
    modules = dict(named_experts(model))
    assert stores
    assert stores.keys() == modules.keys()
    for name, store in stores.items():
        own = expert_parameters(modules[name])
        assert store.parts == {key: (tuple(tensor.shape[1:]), tensor.dtype) for key, tensor in own.items()}
        for expert in range(store.num_experts):
            for key, tensor in read(store, expert).items():
                assert torch.equal(tensor, own[key][expert]), f"{name}.{key}, expert {expert}"


def tiny(**fields) -> MoEForCausalLM:
    torch.manual_seed(0)
    return MoEForCausalLM(tiny_config(num_hidden_layers=2, mlp_layer_types=None, **fields))


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_of_families(family, tmp_path):
    model = tiny_family(family)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert_experts_of(disk_stores(type(model), model.config, tmp_path), loaded)


@pytest.mark.parametrize("layout", ["one tensor per expert", "fused", "shards"])
@pytest.mark.parametrize("kind", OURS)
def test_our_experts_in_all_layouts(kind, layout, tmp_path):
    model = tiny(**OURS[kind])
    model.save_pretrained(tmp_path, max_shard_size="30KB" if layout == "shards" else "1GB")
    assert (tmp_path / "model.safetensors.index.json").is_file() == (layout == "shards")
    if layout == "fused":
        save_file(model.state_dict(), tmp_path / "model.safetensors", {"format": "pt"})
        assert "model.layers.0.mlp.experts.down_proj" in load_file(tmp_path / "model.safetensors")
    assert_experts_of(disk_stores(type(model), model.config, tmp_path), model)


def test_gpt_oss_and_olmoe_saved_fused(tmp_path):
    for family in ("gpt_oss", "olmoe"):
        model = tiny_family(family)
        model.config.save_pretrained(tmp_path)
        save_file(model.state_dict(), tmp_path / "model.safetensors", {"format": "pt"})
        assert_experts_of(disk_stores(type(model), model.config, tmp_path), model)


@pytest.mark.parametrize("asked", ["auto", torch.float32, torch.bfloat16])
def test_experts_are_rounded_as_from_pretrained_rounds_them(asked, tmp_path):
    tiny().save_pretrained(tmp_path)
    loaded = MoEForCausalLM.from_pretrained(tmp_path, dtype=asked)
    stores = disk_stores(MoEForCausalLM, loaded.config, tmp_path, asked)
    assert_experts_of(stores, loaded)
    own = loaded.get_submodule("model.layers.0.mlp.experts")
    found = read(stores["model.layers.0.mlp.experts"], 1, torch.float64)
    assert torch.equal(found["down_proj"], own.down_proj[1].double())


@pytest.fixture
def saved(tmp_path):
    """A folder, and the store of the first layer of the checkpoint in it."""
    tiny().save_pretrained(tmp_path)
    config = MoEForCausalLM.config_class.from_pretrained(tmp_path)
    return tmp_path / "model.safetensors", disk_stores(MoEForCausalLM, config, tmp_path)["model.layers.0.mlp.experts"]


def _touch(file):
    os.utime(file, ns=(1, 1))


def _shorten(file):
    os.truncate(file, file.stat().st_size // 2)


def _replace(file):
    shutil.copy2(file, file.with_suffix(".new"))
    file.with_suffix(".new").replace(file)


@pytest.mark.parametrize("change", [_touch, _shorten, _replace, lambda file: file.unlink()])
def test_a_changed_file_is_one_clear_error(saved, change):
    file, store = saved
    read(store, 0)
    change(file)
    with pytest.raises(UserError, match=r"model\.safetensors (changed while|cannot be read any more)") as caught:
        read(store, 4)
    assert "load the model again" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_read_error_is_one_clear_error(saved, monkeypatch):
    _, store = saved

    def fail(*arguments, **options):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("builtins.open", fail)
    with pytest.raises(UserError, match=r"cannot be read any more \(Input/output error\): load the model again"):
        read(store, 0)


def test_wrong_requests_are_refused(saved):
    _, store = saved
    with pytest.raises(ValueError, match="expert 5 does not exist: the layer has experts 0 to 4"):
        read(store, 5)
    memory = {name: torch.empty(1, *shape) for name, (shape, _) in store.parts.items()}
    with pytest.raises(ValueError, match="gate_up_proj of an expert has shape"):
        store.read(0, memory)


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [
        ({"quant_method": "mxfp4"}, "moe convert --model_name_or_path"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "moe convert --model_name_or_path"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "16 bits from which"),
    ],
)
def test_quantised_checkpoints_are_refused_by_name(settings, remedy, tmp_path):
    config = tiny_config()
    config.quantization_config = settings
    with pytest.raises(UserError, match=rf"is quantised \({settings['quant_method']}\).*{remedy}"):
        refuse_quantised_experts(config, tmp_path)


def test_a_quantised_dtype_is_refused_where_the_configuration_is_silent(tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path)
    tensors = {
        name: tensor.to(torch.float8_e4m3fn) if ".experts." in name else tensor
        for name, tensor in load_file(tmp_path / "model.safetensors").items()
    }
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="stored as float8_e4m3fn, so the experts are quantised"):
        disk_stores(MoEForCausalLM, model.config, tmp_path)


def test_missing_experts_are_refused(tmp_path):
    model = AutoModelForCausalLM.from_config(tiny_family("olmoe").config)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(
        {k: t for k, t in tensors.items() if ".1.mlp.experts." not in k},
        tmp_path / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(UserError, match=r"has no tensors for model\.layers\.1\.mlp\.experts\.gate_up_proj"):
        disk_stores(type(model), model.config, tmp_path)


def test_experts_that_do_not_fit_the_configuration_are_refused(tmp_path):
    """transformers joins the experts that it finds, and then finds too few of them."""
    model = tiny_family("olmoe")
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(
        {k: t for k, t in tensors.items() if ".0.mlp.experts.5." not in k},
        tmp_path / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(
        UserError, match=r"does not fit its config\.json: .*load it with from_pretrained to see"
    ) as caught:
        disk_stores(type(model), model.config, tmp_path)
    assert "\n" not in str(caught.value)


def test_dense_models_are_refused(tmp_path):
    config = json.loads(tiny().config.to_json_string()) | {"mlp_layer_types": ["dense", "dense"]}
    model = MoEForCausalLM(MoEForCausalLM.config_class(**config))
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="has no experts that transformers' experts interface calls"):
        disk_stores(MoEForCausalLM, model.config, tmp_path)


def test_pinned_store_takes_the_parameters_memory():
    experts = tiny(mlp_bias=True).get_submodule("model.layers.1.mlp.experts")
    own = expert_parameters(experts)
    store = PinnedStore(own)
    assert set(store.parts) == {"gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias"}
    for expert in range(store.num_experts):
        for name, tensor in read(store, expert).items():
            assert torch.equal(tensor, own[name][expert])
    if not torch.cuda.is_available():
        with torch.no_grad():
            experts.down_proj[2] = 7.0
        assert read(store, 2, torch.bfloat16)["down_proj"].unique().tolist() == [7.0]
    with pytest.raises(ValueError, match="expert -1 does not exist"):
        read(store, -1)


@pytest.mark.slow
@pytest.mark.parametrize("family", experts_families())
def test_experts_of_every_family(family, tmp_path):
    model = tiny_family(family)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert_experts_of(disk_stores(type(model), model.config, tmp_path), loaded)
