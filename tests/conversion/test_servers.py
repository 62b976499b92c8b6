"""An export for a server that would compute it wrongly is refused, with the field, the server and a way out."""

import pytest

from modeling_moe import MoEConfig, MoEForCausalLM
from modeling_moe.commands.convert import main
from modeling_moe.conversion import SERVERS, TARGETS, choose_target, convert_checkpoint, exact_targets, plan_conversion
from modeling_moe.conversion.targets.catalogue import export_plan, refuse_server
from modeling_moe.conversion.targets.servers import SERVED
from modeling_moe.utils.errors import UserError
from tests.conversion.test_families_export import CLAMPED, GROUPS, LATENT, MIXED, MOE, SIGMOID


HEAD = {"qk_norm": "head"}
FULL = {"qk_norm": "full", "norm_topk_prob": False, "rms_norm_eps": 1e-5, "num_key_value_heads": 4}
SERVE = "keep the model in this package's format, which `moe serve` runs"
TIED = {"tie_word_embeddings": True}
# every row of docs/serving.md that a server computes wrongly or refuses: server, target, fields, field in the message, remedy
WRONG = [
    ("llama.cpp", "mixtral", {"sliding_window": 4}, "sliding_window", SERVE),
    ("llama.cpp", "mixtral", {"hidden_act": "gelu"}, "hidden_act", SERVE),
    ("vllm", "mixtral", {"hidden_act": "gelu"}, "hidden_act", SERVE),
    ("vllm", "granitemoeshared", {"attention_bias": True}, "attention_bias", SERVE),
    ("vllm", "granitemoeshared", {"head_dim": 12}, "head_dim", "it computes target mixtral exactly"),
    ("llama.cpp", "granitemoeshared", {"head_dim": 12}, "head_dim", "it computes target mixtral exactly"),
    ("vllm", "qwen3_moe", HEAD | {"attention_bias": True}, "attention_bias", SERVE),
    ("llama.cpp", "qwen3_moe", HEAD | {"attention_bias": True}, "attention_bias", SERVE),
    ("llama.cpp", "qwen3_moe", HEAD | {"norm_topk_prob": False}, "norm_topk_prob", SERVE),
    ("llama.cpp", "qwen3_moe", HEAD | {"mlp_layer_types": MIXED}, "mlp_only_layers", SERVE),
    ("llama.cpp", "qwen3_moe", HEAD | {"sliding_window": 4}, "sliding_window", SERVE),
    ("llama.cpp", "qwen2_moe", {}, "norm_topk_prob", "it computes target mixtral or granitemoeshared exactly"),
    ("llama.cpp", "qwen2_moe", {"norm_topk_prob": False, "mlp_layer_types": MIXED}, "mlp_only_layers", SERVE),
    ("llama.cpp", "qwen2_moe", {"norm_topk_prob": False, "sliding_window": 4}, "sliding_window", SERVE),
    ("llama.cpp", "qwen2_moe", {"norm_topk_prob": False} | TIED, "tie_word_embeddings", SERVE),
    ("vllm", "olmoe", FULL | {"norm_topk_prob": True}, "norm_topk_prob", SERVE),
    ("llama.cpp", "olmoe", FULL | {"norm_topk_prob": True}, "norm_topk_prob", SERVE),
    ("vllm", "olmoe", FULL | {"rms_norm_eps": 1e-6}, "rms_norm_eps", SERVE),
    ("llama.cpp", "olmoe", FULL | {"rms_norm_eps": 1e-6}, "rms_norm_eps", SERVE),
    ("vllm", "olmoe", FULL | {"attention_bias": True}, "attention_bias", SERVE),
    ("vllm", "olmoe", FULL | {"clip_qkv": 0.5}, "clip_qkv", SERVE),
    ("llama.cpp", "olmoe", FULL | {"clip_qkv": 0.5}, "clip_qkv", SERVE),
    ("vllm", "olmoe", FULL | TIED, "tie_word_embeddings", SERVE),
    ("vllm", "glm4_moe", SIGMOID | TIED, "tie_word_embeddings", SERVE),
    ("llama.cpp", "glm4_moe", GROUPS, "GLM's own tokenizer", SERVE),
    ("vllm", "deepseek_v3", LATENT | SIGMOID, "disagreed with transformers", SERVE),
    ("llama.cpp", "deepseek_v3", LATENT | SIGMOID | {"attention_bias": True}, "attention_bias", SERVE),
    ("llama.cpp", "deepseek_v3", LATENT | SIGMOID | {"q_lora_rank": None}, "q_lora_rank", SERVE),
    ("llama.cpp", "minimax_m2", SIGMOID | {"qk_norm": "full"} | TIED, "tie_word_embeddings", SERVE),
    ("vllm", "minimax_m2", SIGMOID | {"qk_norm": "full"}, "not been seen to compute this format exactly", SERVE),
    ("vllm", "gpt_oss", CLAMPED, "layer_types", SERVE),
    ("vllm-transformers", "mixtral", {}, "not been seen to compute this format exactly", SERVE),
]


@pytest.mark.parametrize(("server", "target", "fields", "field", "remedy"), WRONG)
def test_a_target_that_the_server_computes_wrongly_is_refused(server, target, fields, field, remedy):
    config = MoEConfig(**MOE | fields)
    export_plan(config, target)  # the format holds the model, so that the server alone is the reason
    with pytest.raises(UserError) as raised:
        refuse_server(config, target, server)
    message = str(raised.value)
    assert message.startswith(f"{SERVERS[server].name} does not compute target {target} of this model exactly: it ")
    assert field in message
    assert message.endswith(f"; {remedy}")
    if remedy != SERVE:
        assert choose_target(config, server).target in remedy
    else:
        with pytest.raises(UserError, match="computes no target of this model exactly") as none:
            choose_target(config, server)
        assert field in str(none.value)
        assert str(none.value).endswith(f"; {SERVE}")


def test_every_condition_of_the_exports_is_tested():
    """Each condition under which a server is wrong is met by a row, except those that an export never writes."""
    met = {(server, target): set() for server, target, *_ in WRONG}
    for server, target, fields, *_ in WRONG:
        config = TARGETS[target].config(MoEConfig(**MOE | fields))
        found = SERVED[target].get(SERVERS[server], ())
        met[server, target] |= {condition.otherwise for condition in found if not condition.holds(config)}
    never_written = {"qkv_bias is false", '"scoring_func": "sigmoid"'}
    for target in TARGETS:
        for server, conditions in SERVED[target].items():
            (key,) = [name for name, known in SERVERS.items() if known == server]
            for condition in conditions:
                # all families treat other activations alike
                if "SiLU" in condition.otherwise or any(text in condition.otherwise for text in never_written):
                    continue
                seen = set().union(*(texts for (_, other), texts in met.items() if other == target))
                assert condition.otherwise in seen, (key, target, condition.otherwise)


@pytest.mark.parametrize(
    ("server", "fields", "expected"),
    [
        ("llama.cpp", {}, "mixtral"),
        ("llama.cpp", {"norm_topk_prob": False}, "qwen2_moe"),
        ("llama.cpp", {"head_dim": 12}, "mixtral"),
        ("llama.cpp", LATENT | SIGMOID, "deepseek_v3"),
        ("vllm-transformers", LATENT | SIGMOID, "deepseek_v3"),
        ("vllm", {"sliding_window": 4}, "mixtral"),
        ("transformers", {"hidden_act": "gelu"}, "mixtral"),
    ],
)
def test_auto_takes_a_target_that_the_server_computes_exactly(server, fields, expected):
    config = MoEConfig(**MOE | fields)
    assert choose_target(config, server).target == expected
    assert SERVERS[server] in exact_targets(config)[expected]
    refuse_server(config, expected, server)


def test_auto_prefers_the_named_server_to_the_number_of_servers(monkeypatch):
    """qwen2_moe has one server more here, but not the one that is named."""
    config = MoEConfig(**MOE | {"sliding_window": 4})
    extra = {SERVERS["llama.cpp"]: (), SERVERS["vllm-transformers"]: ()}
    monkeypatch.setitem(SERVED, "qwen2_moe", extra)
    assert choose_target(config).target == "qwen2_moe"
    assert choose_target(config, "vllm").target == "mixtral"


def test_the_command_refuses_before_it_writes_and_plans_for_a_server(tmp_path, capsys):
    MoEForCausalLM(MoEConfig(**MOE | {"sliding_window": 4})).save_pretrained(tmp_path / "moe")
    arguments = ["--model_name_or_path", str(tmp_path / "moe"), "--output_dir", str(tmp_path / "out"), "--server"]
    for target in ("auto", "mixtral"):
        with pytest.raises(UserError, match="it ignores sliding_window; "):
            main([*arguments, "llama.cpp", "--target", target])
    with pytest.raises(UserError, match="ignores sliding_window"):
        plan_conversion(str(tmp_path / "moe"), "mixtral", server="llama.cpp")
    assert [path.name for path in tmp_path.iterdir()] == ["moe"]
    main([*arguments, "vllm", "--target", "auto"])
    told = " ".join(capsys.readouterr().out.split())
    assert "Served by vLLM, transformers. Not by llama.cpp: it ignores sliding_window." in told
    # without a server, the export is written and the server is named
    again = ["--model_name_or_path", str(tmp_path / "moe"), "--output_dir", str(tmp_path / "again")]
    main([*again, "--target", "mixtral"])
    assert "Not by llama.cpp: it ignores sliding_window." in " ".join(capsys.readouterr().out.split())


def test_a_server_needs_an_export_and_a_known_name(tmp_path):
    MoEForCausalLM(MoEConfig(**MOE)).save_pretrained(tmp_path / "moe")
    with pytest.raises(UserError, match="server vllm needs an export: set target to auto or to a family"):
        convert_checkpoint(str(tmp_path / "moe"), tmp_path / "out", server="vllm")
    with pytest.raises(UserError, match="server 'ollama' is unknown: it must be one of vllm, vllm-transformers"):
        convert_checkpoint(str(tmp_path / "moe"), tmp_path / "out", "auto", server="ollama")
