"""Dense families of transformers become MoE models with dense layers: equal logits, equal text, and no unread field."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from modeling_moe import MoEConfig, MoEForCausalLM
from modeling_moe.checkpoints import LazyTensor
from modeling_moe.conversion.families.base import SourceFields
from modeling_moe.conversion.families.dense import DENSE_FAMILIES
from modeling_moe.utils.errors import UserError
from tests import builders
from tests.builders import LLAMA3_ROPE


TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
# ids below 3 are special tokens; batches have length 12 and every window has length 4
SIZE = builders.SIZE | {"num_hidden_layers": 3}
NEOX_SIZE = {name: value for name, value in SIZE.items() if name != "num_key_value_heads"}
GPT2_SIZE = TOKENS | {
    "vocab_size": 99,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 64,
    "initializer_range": 0.2,
}
GEMMA = SIZE | {"head_dim": 12, "query_pre_attn_scalar": 20, "sliding_window": 4}
LONGROPE = {
    "type": "longrope",
    "short_factor": [1.0, 1.3, 1.7],
    "long_factor": [1.1, 2.5, 4.0],
}
SOURCES = {
    "llama": SIZE | {"head_dim": 12, "attention_bias": True, "mlp_bias": True},
    "llama-tied": SIZE | {"tie_word_embeddings": True, "rope_parameters": LLAMA3_ROPE},
    "mistral": SIZE | {"sliding_window": 4},
    "mistral-whole": SIZE | {"sliding_window": None, "head_dim": 12},
    "qwen2": SIZE | {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "qwen2-whole": SIZE | {"sliding_window": 4, "tie_word_embeddings": True},
    "qwen3": SIZE | {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2, "head_dim": 12},
    "qwen3-bias": SIZE | {"attention_bias": True},
    "smollm3": SIZE | {"no_rope_layer_interval": 2, "attention_bias": True, "mlp_bias": True},
    "smollm3-window": SIZE | {"no_rope_layers": [0, 1, 0, 1], "use_sliding_window": True, "sliding_window": 4},
    "olmo2": SIZE | {"attention_bias": True},
    "olmo3": SIZE
    | {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
    | {
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
            "full_attention": {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0}
            | {"original_max_position_embeddings": 16},
        }
    },
    "phi3": SIZE | {"sliding_window": 4},
    "phi3-long": SIZE
    | {"original_max_position_embeddings": 8, "partial_rotary_factor": 0.75, "tie_word_embeddings": True}
    | {"rope_scaling": LONGROPE, "rope_theta": 300.0},
    "gemma2": GEMMA | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    "gemma2-uncapped": GEMMA | {"attn_logit_softcapping": None, "final_logit_softcapping": None},
    "gemma3_text": GEMMA
    | {"sliding_window_pattern": 2, "rope_theta": 700.0, "rope_local_base_freq": 90.0}
    | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    "gemma3_text-capped": GEMMA | {"final_logit_softcapping": 3.0, "attention_bias": True},
    "granite": SIZE
    | {"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "attention_multiplier": 0.3, "logits_scaling": 8.0}
    | {"tie_word_embeddings": True},
    "gpt2": GPT2_SIZE,
    "gpt2-scaled": GPT2_SIZE | {"scale_attn_by_inverse_layer_idx": True, "n_inner": 40, "activation_function": "relu"},
    "gpt2-unscaled": GPT2_SIZE | {"scale_attn_weights": False, "tie_word_embeddings": False},
    "gpt_neox": NEOX_SIZE,
    "gpt_neox-serial": NEOX_SIZE
    | {"use_parallel_residual": False, "attention_bias": False, "rotary_pct": 0.5, "tie_word_embeddings": True},
}
# transformers' model runs with this attention implementation
ATTENTION = {"gemma2": "eager"}


def source_config(name: str, **fields):
    return AutoConfig.for_model(name.partition("-")[0], **(SOURCES[name] | fields))


def moe_config(config) -> MoEConfig:
    fields = SourceFields(config)
    values = DENSE_FAMILIES[config.model_type].fields(fields)
    fields.refuse_unread()
    return MoEConfig(**values)


def random_source(config):
    """Returns a source model in which every parameter is random, norms and biases included."""
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def loaded(config: MoEConfig, state, **options) -> MoEForCausalLM:
    model = AutoModelForCausalLM.from_config(config, **options).eval()
    weights = {name: tensor.to(model.dtype).read() for name, tensor in state.items()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert unexpected == []
    assert missing == ["lm_head.weight"] * config.tie_word_embeddings
    return model


def pair(name: str, folder, dtype=torch.float32, attention: str | None = None, **fields):
    """Loads the source from a folder, and a MoE from the tensors in that folder."""
    random_source(source_config(name, **fields)).save_pretrained(folder)
    options = {"dtype": dtype, "attn_implementation": attention or ATTENTION.get(name.partition("-")[0], "sdpa")}
    source = AutoModelForCausalLM.from_pretrained(folder, **options)
    config = moe_config(AutoConfig.from_pretrained(folder))
    state = {key: LazyTensor.of(tensor) for key, tensor in load_file(folder / "model.safetensors").items()}
    return source, loaded(config, DENSE_FAMILIES[source.config.model_type].tensors(state, config), **options)


def padded_batch(side: str) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 99, (3, 12))
    mask = torch.ones_like(ids)
    for row, padding in enumerate((0, 2, 5)):
        columns = slice(0, padding) if side == "left" else slice(12 - padding, 12)
        ids[row, columns], mask[row, columns] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("name", SOURCES)
def test_same_logits_and_size(name, tmp_path):
    source, model = pair(name, tmp_path)
    for side in ("left", "right"):
        batch = padded_batch(side)
        real = batch["attention_mask"].bool()
        torch.testing.assert_close(model(**batch).logits[real], source(**batch).logits[real], atol=1e-5, rtol=1e-5)
    assert model.config.num_params() == model.num_parameters() == source.num_parameters()


@pytest.mark.parametrize("name", SOURCES)
def test_same_text_and_cached_decode(name, tmp_path):
    source, model = pair(name, tmp_path)
    batch = padded_batch("left")
    arguments = {"max_new_tokens": 12, "do_sample": False, "min_new_tokens": 12}
    expected = source.generate(**batch, **arguments)
    assert torch.equal(model.generate(**batch, **arguments), expected)
    # the cache is filled with a prompt and then token by token
    ids = expected[:1]
    out = model(input_ids=ids[:, :12], use_cache=True)
    steps = [out.logits]
    for token in ids[0, 12:]:
        out = model(input_ids=token.view(1, 1), past_key_values=out.past_key_values, use_cache=True)
        steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, 1), source(input_ids=ids).logits, atol=1e-5, rtol=1e-5)


def test_text_that_outgrows_the_short_factors(tmp_path):
    source, model = pair("phi3-long", tmp_path, original_max_position_embeddings=16)
    ids = torch.randint(3, 99, (2, 12))
    arguments = {"max_new_tokens": 12, "do_sample": False, "min_new_tokens": 12}
    # before 5.23, the text that transformers' own model writes with a cache is wrong
    assert torch.equal(model.generate(ids, **arguments), source.generate(ids, **arguments, use_cache=False))


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("llama", {"attention_dropout": 0.3}),
        ("phi3", {"attention_dropout": 0.3, "resid_pdrop": 0.2, "embd_pdrop": 0.1}),
        ("gpt2", {"attn_pdrop": 0.3, "resid_pdrop": 0.2, "embd_pdrop": 0.1}),
        ("gpt_neox", {"attention_dropout": 0.3, "hidden_dropout": 0.2}),
    ],
)
def test_same_dropout(name, fields, tmp_path):
    source, model = pair(name, tmp_path, attention="eager", **fields)
    ids, logits = torch.randint(3, 99, (2, 12)), []
    for network in (source, model):
        torch.manual_seed(1)
        logits.append(network.train()(ids).logits)
    torch.testing.assert_close(logits[1], logits[0], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(source.eval()(ids).logits, logits[0], atol=1e-2)


@pytest.mark.parametrize("name", SOURCES)
def test_bf16_is_bitwise_equal(name, tmp_path):
    source, model = pair(name, tmp_path, torch.bfloat16)
    batch = padded_batch("left")
    assert torch.equal(model(**batch).logits, source(**batch).logits)


@pytest.mark.parametrize("name", DENSE_FAMILIES)
def test_no_tensor_is_read(name):
    def refuse(index):
        raise AssertionError("read")

    config = moe_config(source_config(name))
    source = random_source(source_config(name)).state_dict()
    state = {key: LazyTensor(tuple(tensor.shape), tensor.dtype, refuse) for key, tensor in source.items()}
    mapped = DENSE_FAMILIES[name].tensors(state, config)
    with torch.device("meta"):
        wanted = MoEForCausalLM(config).state_dict()
    if config.tie_word_embeddings:
        del wanted["lm_head.weight"]
    assert {key: tensor.shape for key, tensor in mapped.items()} == {key: (*t.shape,) for key, t in wanted.items()}


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("llama", "rope_interleaved", True),
        ("llama", "partial_rotary_factor", 0.5),
        ("mistral", "layer_types", ["full_attention"] * 3),
        ("qwen2", "use_mrope", True),
        ("phi3", "lm_head_bias", True),
        ("phi3", "full_attn_mod", 2),
        ("gemma2", "use_bidirectional_attention", True),
        ("gemma3_text", "use_bidirectional_attention", True),
        ("gemma3_text", "attn_logit_softcapping", 30.0),
        ("gpt2", "reorder_and_upcast_attn", True),
        ("gpt2", "add_cross_attention", True),
    ],
)
def test_unsupported_value_is_refused(name, field, value):
    with pytest.raises(UserError, match=f"^{field} is .* in the config.json of this {name} model"):
        moe_config(source_config(name, **{field: value}))


@pytest.mark.parametrize(
    ("name", "fields", "expected"),
    [
        ("llama", {"is_llama_config": True, "rope_interleaved": False, "pretraining_tp": 1}, {}),
        ("mistral", {"layer_types": ["sliding_attention"] * 3}, {"sliding_window": 4}),
        ("qwen2", {"use_mrope": False, "rope_theta": 7.0}, {"qkv_bias": True, "max_position_embeddings": 64}),
        ("smollm3", {"max_window_layers": 28, "pretraining_tp": 2}, {"no_rope_layers": [1, 0, 1]}),
        (
            "phi3",
            {"attention_bias": False, "lm_head_bias": False, "mlp_bias": False, "full_attn_mod": 1}
            | {"interpolate_factor": 1, "resid_pdrop": 0.1, "embd_pdrop": 0.2},
            {"resid_pdrop": 0.1, "embd_pdrop": 0.0, "sliding_window": 4},
        ),
        (
            "gemma2",
            {"hidden_act": "gelu", "cache_implementation": "hybrid", "sliding_window_size": 4096},
            {"hidden_act": "gelu_pytorch_tanh", "sliding_window": 4},
        ),
        ("gpt2", {"n_ctx": 64, "task_specific_params": {"text-generation": {}}, "attn_pdrop": 0.3}, {"attention_dropout": 0.3}),
        (
            "gpt_neox",
            {"hidden_dropout": 0.3, "rotary_emb_base": 7.0, "hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0},
            {"resid_pdrop": 0.3, "embd_pdrop": 0.3},
        ),
    ],
)  # fmt: skip
def test_fields_of_published_checkpoints(name, fields, expected):
    config = moe_config(source_config(name, **fields))
    assert {field: getattr(config, field) for field in expected} == expected


def test_buffers_and_old_names():
    source = random_source(source_config("gpt2"))
    config = moe_config(source.config)
    weights = {key.removeprefix("transformer."): tensor for key, tensor in source.state_dict().items()}
    weights |= {"h.0.attn.bias": torch.ones(1, 1, 64, 64), "h.0.attn.masked_bias": torch.tensor(-1e4)}
    state = {key: LazyTensor.of(tensor) for key, tensor in weights.items()}
    model = loaded(config, DENSE_FAMILIES["gpt2"].tensors(state, config))
    ids = torch.randint(3, 99, (2, 12))
    torch.testing.assert_close(model(ids).logits, source(ids).logits, atol=1e-5, rtol=1e-5)

    config = moe_config(source_config("gpt_neox"))
    weights = {"embed_out.weight": torch.ones(2, 2)}
    weights |= {f"gpt_neox.layers.0.attention.{buffer}": torch.ones(1) for buffer in ("bias", "masked_bias")}
    weights |= {"gpt_neox.layers.0.attention.rotary_emb.inv_freq": torch.ones(1)}
    state = {key: LazyTensor.of(tensor) for key, tensor in weights.items()}
    assert list(DENSE_FAMILIES["gpt_neox"].tensors(state, config)) == ["lm_head.weight"]


def test_tied_head_in_the_checkpoint():
    config = moe_config(source_config("llama-tied"))
    embedding, head = torch.ones(3, 2), torch.ones(3, 2)
    state = {"model.embed_tokens.weight": LazyTensor.of(embedding), "lm_head.weight": LazyTensor.of(head)}
    tensors = DENSE_FAMILIES["llama"].tensors
    mapped = tensors(state, config)
    assert list(mapped) == ["model.embed_tokens.weight"]
    assert torch.equal(mapped["model.embed_tokens.weight"].read(), embedding)
    head[0, 0] = 2.0
    with pytest.raises(UserError, match="tie_word_embeddings"):
        mapped["model.embed_tokens.weight"].read()
    alone = tensors({"lm_head.weight": state["lm_head.weight"]}, config)
    assert torch.equal(alone["model.embed_tokens.weight"].read(), head)


def test_additional_fused_rows_are_refused():
    config = moe_config(source_config("phi3"))
    fused = LazyTensor.of(torch.zeros(99, 32))
    names = ("self_attn.qkv_proj", "mlp.gate_up_proj")
    mapped = DENSE_FAMILIES["phi3"].tensors({f"model.layers.0.{name}.weight": fused for name in names}, config)
    assert sum(tensor.shape[0] for tensor in mapped.values()) == 2 * 99
