"""The text model of a multimodal model is imported with the whole model's logits of texts, from memory and from disk."""

import copy
import json

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText, PreTrainedConfig

from modeling_moe import MoEForCausalLM
from modeling_moe.commands import convert, plan, upcycle
from modeling_moe.conversion import (
    fields_without_effect,
    import_state,
    load_state,
    moe_config,
    open_checkpoint,
    to_moe,
)
from modeling_moe.conversion.families.wrappers import WRAPPERS, left_out, text_source, text_tensors, towers
from modeling_moe.utils.errors import UserError
from tests import builders
from tests.conversion import harness
from tests.conversion.harness import LATENT, SIZE, TOLERANCE, YARN, lazy, padded_batch, randomised


# sizes of the towers for images and sound; each configuration takes the names that it has
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "depth": 1,
    "num_attention_heads": 2,
    "num_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "out_hidden_size": 32,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
    "d_model": 32,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "output_dim": 32,
    "downsample_hidden_size": 16,
    "output_channels": 16,
    "downsample_channels": [16, 32],
    "global_attn_indexes": [0],
    "mlp_dim": 24,
    "pos_emb_height": 4,
    "pos_emb_width": 4,
    "vocab_size": 8,
}
EXPERTS = {"num_experts": 5, "num_experts_per_tok": 3, "moe_intermediate_size": 24}
DEEPSEEK = {"n_routed_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "n_shared_experts": 2}
# 4 frequencies for time, 1 each for height and width
MROPE = {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [4, 1, 1]}
QWEN_VL = EXPERTS | {"head_dim": 12, "rope_parameters": MROPE | {"mrope_interleaved": True}}
OMNI = {"vision_start_token_id": 151652}

# name -> fields of the text model, of the wrapper
SOURCES: dict[str, tuple[dict, dict]] = {
    "aria": (
        {"model_type": "aria_text", "moe_num_experts": 5, "moe_topk": 3, "moe_num_shared_experts": 2, "head_dim": 12},
        {},
    ),
    "aria-bias": (
        {
            "model_type": "aria_text",
            "moe_num_experts": 4,
            "moe_topk": 2,
            "moe_num_shared_experts": 1,
            "attention_bias": True,
            "rope_parameters": YARN,
        },
        {"tie_word_embeddings": True},
    ),
    "qwen3_vl_moe": (QWEN_VL | {"mlp_only_layers": [1]}, {}),
    # a square matrix of experts, whose layout transformers tells by its shape as well
    "qwen3_vl_moe-tied": (
        QWEN_VL | {"moe_intermediate_size": 16, "decoder_sparse_step": 2, "attention_bias": True},
        {"tie_word_embeddings": True},
    ),
    "qwen3_omni_moe_thinker": (QWEN_VL | {"mlp_only_layers": [0]}, OMNI),
    "qwen3_omni_moe_thinker-sum": (EXPERTS | {"norm_topk_prob": False, "attention_bias": True}, OMNI),
    "glm4v_moe": (
        DEEPSEEK
        | {"rope_parameters": MROPE | {"mrope_section": [1, 1, 1], "partial_rotary_factor": 0.5}, "head_dim": 12},
        {},
    ),
    "glm4v_moe-groups": (
        DEEPSEEK
        | {
            "n_group": 3,
            "topk_group": 2,
            "routed_scaling_factor": 1.7,
            "attention_bias": False,
            "norm_topk_prob": False,
            "rope_parameters": MROPE | {"mrope_section": [2, 1, 1], "partial_rotary_factor": 1.0},
        },
        {"tie_word_embeddings": True},
    ),
    "deepseek_ocr2": (DEEPSEEK | {"mlp_layer_types": ["dense", "sparse", "sparse"]}, {}),
    "deepseek_ocr2-groups": (
        DEEPSEEK
        | {
            "mlp_layer_types": ["sparse", "dense", "sparse"],
            "topk_method": "group_limited_greedy",
            "n_group": 3,
            "topk_group": 2,
            "routed_scaling_factor": 1.7,
            "attention_bias": True,
        },
        {},
    ),
    "kimi_k25": (
        LATENT | {"model_type": "deepseek_v3", "q_lora_rank": 7, "n_group": 3, "topk_group": 2},
        {"tie_word_embeddings": False, "projection_hidden_size": 32},
    ),
    "llava": ({"model_type": "llama", "head_dim": 12}, {}),
    "llava-moe": ({"model_type": "qwen3_moe"} | EXPERTS, {}),
    "mistral3": ({"model_type": "mistral", "head_dim": 12}, {}),
    "gemma3": (
        {"sliding_window": 4, "head_dim": 12, "layer_types": ["sliding_attention"] * 2 + ["full_attention"]},
        {},
    ),
    "internvl": ({"model_type": "qwen2"}, {}),
    "internvl-moe": ({"model_type": "qwen3_moe"} | EXPERTS, {"tie_word_embeddings": True}),
}


def _shrink(config: PreTrainedConfig, text: bool = False) -> None:
    """Gives the towers of a wrapper small sizes."""
    for name, value in list(vars(config).items()):
        if isinstance(value, PreTrainedConfig) and name != "text_config":
            _shrink(value, True)
        elif text and name == "layer_types" and value is not None:
            config.layer_types = value[: TOWER["num_hidden_layers"]]
        elif text and name in TOWER and value is not None:
            pair = isinstance(value, list | tuple) and isinstance(TOWER[name], int)
            setattr(config, name, [TOWER[name]] * 2 if pair else TOWER[name])


def wrapper_config(name: str, **sizes: int) -> PreTrainedConfig:
    model_type = name.partition("-")[0]
    text, outer = SOURCES[name]
    config = CONFIG_MAPPING[model_type](text_config=SIZE | text | sizes, **outer)
    _shrink(config)
    return config


def wrapper(name: str, **sizes: int):
    """Returns a whole multimodal model with random weights."""
    torch.manual_seed(0)
    return randomised(AutoModelForImageTextToText.from_config(wrapper_config(name, **sizes)))


def text_model(source):
    """Returns the text model of a whole model; transformers 5.17 has it in another place in Qwen3-Omni's thinker."""
    return getattr(source.model, "language_model", source.model)


@pytest.mark.parametrize("name", SOURCES)
def test_same_logits(name):
    source = wrapper(name)
    model = to_moe(source)
    for side in ("left", "right"):
        batch = padded_batch(side)
        real = batch["attention_mask"].bool()
        got, expected = model(**batch).logits, source(**batch).logits
        torch.testing.assert_close(got[real], expected[real], **TOLERANCE)


@pytest.mark.parametrize("name", SOURCES)
def test_same_text_and_cached_decode(name):
    source = wrapper(name)
    batch, arguments = padded_batch("left"), {"max_new_tokens": 8, "do_sample": False, "min_new_tokens": 8}
    assert torch.equal(to_moe(source).generate(**batch, **arguments), source.generate(**batch, **arguments))


@pytest.mark.parametrize("name", [name for name in SOURCES if name.startswith(("qwen3", "glm", "aria"))])
def test_router_logits(name):
    """The sparse layers of wrappers that return router logits have the router logits of the MoE."""
    source, batch = wrapper(name), padded_batch("left")
    model, real = to_moe(source), batch["attention_mask"].bool().flatten()
    got = model(**batch, output_router_logits=True).router_logits
    text = text_model(source)
    outputs = text(**batch, output_router_logits=True)
    if "router_logits" not in outputs:
        pytest.skip("this release of transformers records no router logits in this family")
    expected = outputs.router_logits
    assert len(got) == len(expected) == model.config.mlp_layer_types.count("sparse") > 0
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine[real], theirs[real], **TOLERANCE)


@pytest.mark.parametrize("name", SOURCES)
def test_from_disk(name, tmp_path):
    source = wrapper(name)
    source.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(str(tmp_path))
    model = load_state(checkpoint.config, checkpoint.state)
    ids = torch.randint(3, 90, (2, 9))
    torch.testing.assert_close(model(ids).logits, source(ids).logits, **TOLERANCE)
    # every parameter of the source is in the result or in a tower that was left out
    parts = checkpoint.identity()["left_out"]
    assert parts
    assert min(parts.values()) > 0
    assert sum(parts.values()) + model.num_parameters() == source.num_parameters()


@pytest.mark.parametrize("name", [name for name in SOURCES if "-" not in name and "kimi" not in name])
def test_bf16_is_bitwise(name, tmp_path):
    wrapper(name).save_pretrained(tmp_path)
    source = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.bfloat16, **harness.EAGER)
    for module_name, module in source.named_modules():
        if module_name.endswith((".mlp.gate", ".mlp.router")):
            if isinstance(module, nn.Linear):
                pytest.skip("the experts of this release of transformers take no weights of a router in fp32")
            # routers of a MoE are always fp32
            module.float().register_forward_pre_hook(lambda _, inputs: (inputs[0].float(), *inputs[1:]))
    model = to_moe(source)
    model.set_attn_implementation("eager")
    model.set_experts_implementation("eager")
    ids = torch.randint(3, 90, (2, 9))
    assert torch.equal(model(ids).logits, source(ids).logits)


def test_older_names():
    """Published checkpoints name the text model `language_model.model`, `model.language_model`, or `thinker.model`."""
    source = wrapper("llava")
    ids = torch.randint(3, 90, (2, 9))
    tensors, config = source.state_dict(), source.config
    older = {
        "language_model." + name.replace("model.language_model.", "model.")
        if "language_model" in name or "lm_head" in name
        else name.removeprefix("model."): tensor
        for name, tensor in tensors.items()
    }
    assert {name.split(".")[0] for name in older} == {"language_model", "vision_tower", "multi_modal_projector"}
    assert _logits(older, config, ids).equal(_logits(tensors, config, ids))
    assert set(left_out(lazy(older), config)) == {"vision_tower", "multi_modal_projector"}
    torch.testing.assert_close(_logits(older, config, ids), source(ids).logits, **TOLERANCE)


def _logits(tensors: dict[str, torch.Tensor], config: PreTrainedConfig, ids: torch.Tensor) -> torch.Tensor:
    target = moe_config(config)
    return load_state(target, import_state(lazy(tensors), config, target))(ids).logits


def test_whole_omni_model():
    """Of Qwen3-Omni, the text model of the thinker is taken; talker, vocoder and the thinker's towers are left out."""
    source = wrapper("qwen3_omni_moe_thinker")
    config = CONFIG_MAPPING["qwen3_omni_moe"](thinker_config=source.config.to_dict())
    ids = torch.randint(3, 90, (2, 9))
    for published in (False, True):
        tensors = {
            "thinker." + (name.replace("model.language_model.", "model.") if published else name): tensor
            for name, tensor in source.state_dict().items()
        }
        tensors["talker.model.layers.0.mlp.gate.weight"] = torch.zeros(5, 7)
        tensors["code2wav.upsample.0.bias"] = torch.zeros(3)
        torch.testing.assert_close(_logits(tensors, config, ids), source(ids).logits, **TOLERANCE)
        parts = left_out(lazy(tensors), config)
        assert {"talker": 35, "code2wav": 3}.items() <= parts.items()
        # transformers 5.17 has no `model` in these names
        named = {part.replace(".model.", ".") for part in parts}
        assert named == {"talker", "code2wav", "thinker.visual", "thinker.audio_tower"}
    assert towers(config) == ["code2wav_config", "talker_config", "audio_config", "vision_config"]


BARE = [name for name in SOURCES if name.startswith(("qwen3", "glm", "aria", "deepseek")) and "-" not in name]


@pytest.mark.parametrize("name", BARE)
def test_bare_text_model(name, tmp_path):
    """A text model has a model type of its own, and is saved with a tied head or with a head beside it."""
    text = text_model(wrapper(name))
    head, ids = 0.2 * torch.randn(99, 32), torch.randint(3, 90, (2, 9))
    expected = text(input_ids=ids).last_hidden_state @ head.T
    text.config.tie_word_embeddings = False
    named = {f"model.{name}": tensor for name, tensor in text.state_dict().items()} | {"lm_head.weight": head}
    torch.testing.assert_close(_logits(named, text.config, ids), expected, **TOLERANCE)
    text.config.tie_word_embeddings = True
    text.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(str(tmp_path))
    tied = text(input_ids=ids).last_hidden_state @ text.embed_tokens.weight.T
    torch.testing.assert_close(load_state(checkpoint.config, checkpoint.state)(ids).logits, tied, **TOLERANCE)
    assert checkpoint.identity().get("left_out") is None
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tie_word_embeddings": False}))
    with pytest.raises(UserError, match=r"no tensor for lm_head\.weight: set tie_word_embeddings if it is tied"):
        open_checkpoint(str(tmp_path))


def test_every_wrapper_is_tested():
    assert {name.partition("-")[0] for name in SOURCES} == {*WRAPPERS} - {"qwen3_omni_moe"}


def test_published_layout_of_qwen3_vl():
    """Files have transposed fused experts, the model in memory has not; a square matrix is read as it is in memory."""
    source = wrapper("qwen3_vl_moe")
    ids, tensors = torch.randint(3, 90, (2, 9)), source.state_dict()
    files = {
        name: tensor.transpose(1, 2).contiguous() if ".experts." in name else tensor
        for name, tensor in tensors.items()
    }
    assert any(files[name].shape != tensors[name].shape for name in files)
    assert _logits(files, source.config, ids).equal(_logits(tensors, source.config, ids))


def test_tensor_that_is_there_twice_is_refused():
    source = wrapper("llava")
    tensors = source.state_dict()
    extra = {"language_model.model.norm.weight": tensors["model.language_model.norm.weight"]}
    with pytest.raises(UserError, match=r"two tensors for model\.norm\.weight"):
        text_tensors(lazy(tensors | extra), source.config)


def test_quantisation_of_the_wrapper_is_that_of_the_text():
    config = wrapper_config("qwen3_vl_moe")
    config.quantization_config = {"quant_method": "awq"}
    assert text_source(config).quantization_config == {"quant_method": "awq"}
    with pytest.raises(UserError, match="quantization_config"):
        moe_config(config)


def test_a_field_of_the_text_model_that_transformers_does_not_read_is_reported():
    for name in BARE:
        config = wrapper_config(name)
        moe_config(config)
        config.text_config.secret_gate = 0.5
        assert fields_without_effect(config)["secret_gate"] == 0.5
        config.text_config.attention_chunk_size = 4
        with pytest.raises(UserError, match=r"attention_chunk_size .* is unknown"):
            moe_config(config)


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("aria", "mlp_bias", True),
        ("aria", "hidden_act", "gelu"),
        ("qwen3_vl_moe", "norm_topk_prob", False),
        ("qwen3_omni_moe_thinker", "shared_expert_intermediate_size", 16),
        ("qwen3_omni_moe_thinker", "sliding_window", 4),
        ("deepseek_ocr2", "mlp_bias", True),
        ("deepseek_ocr2", "topk_method", "noaux_tc"),
        ("deepseek_ocr2", "head_dim", 12),
    ],
)
def test_unsupported_values_are_refused(name, field, value):
    config = wrapper_config(name)
    setattr(config.text_config, field, value)
    with pytest.raises(UserError, match=field):
        moe_config(config)


def test_source_is_not_changed():
    config = wrapper_config("aria-bias")
    before = copy.deepcopy(config.to_dict())
    assert moe_config(config).tie_word_embeddings
    assert config.to_dict() == before


@pytest.mark.parametrize("name", ["qwen3_vl_moe", "llava"])
def test_command_prints_and_keeps_what_is_left_out(name, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "500")
    source = wrapper(name, vocab_size=300)
    source.save_pretrained(tmp_path / "source")
    builders.train_tokenizer().save_pretrained(tmp_path / "source")
    arguments = [
        "--model_name_or_path",
        str(tmp_path / "source"),
        "--output_dir",
        str(tmp_path / "moe"),
        "--verify",
        "true",
    ]
    convert.main(arguments)
    convert.main([*arguments[:-2], "--dry_run", "true"])
    printed = capsys.readouterr().out
    record = json.loads((tmp_path / "moe" / "conversion.json").read_text())
    parts = record["recipe"]["source"]["left_out"]
    assert record["verification"]["largest_difference"] < 1e-5
    assert parts
    assert all(part in printed for part in parts)


@pytest.mark.parametrize("name", ["llava", "gemma3", "mistral3"])
def test_a_dense_text_model_is_upcycled(name, tmp_path):
    source = wrapper(name, vocab_size=300)
    source.save_pretrained(tmp_path / "source")
    builders.train_tokenizer().save_pretrained(tmp_path / "source")
    arguments = ["--model_name_or_path", str(tmp_path / "source"), "--output_dir", str(tmp_path / "moe")]
    upcycle.main([*arguments, "--num_experts", "4", "--verify", "true"])
    model, ids = MoEForCausalLM.from_pretrained(tmp_path / "moe").eval(), torch.randint(3, 90, (2, 9))
    assert model.config.num_experts == 4
    torch.testing.assert_close(model(ids).logits, source(ids).logits, **TOLERANCE)


def test_plan_prints_what_is_left_out(tmp_path, capsys):
    config = wrapper_config("llava")
    config.save_pretrained(tmp_path)
    plan.main(["--model_name_or_path", str(tmp_path), "--num_experts", "4"])
    printed = capsys.readouterr().out
    assert "left out of the source" in printed
    assert "vision_config" in printed


def test_more_layers_than_tensors_are_refused(tmp_path):
    wrapper("llava").save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    values = json.loads(file.read_text())
    values["text_config"]["num_hidden_layers"] = 5000
    file.write_text(json.dumps(values))
    with pytest.raises(UserError, match="num_hidden_layers is 5000"):
        open_checkpoint(str(tmp_path))
