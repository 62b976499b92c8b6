"""The limits of vLLM's plugin, which need no vLLM; scripts/test_serving.sh compares answers in vLLM itself."""

import ast
import inspect
import sys
import textwrap
import types
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from modeling_moe.attention import MoEAttention
from modeling_moe.attention_latent import MoELatentAttention
from modeling_moe.modeling_moe import MoEBlock
from modeling_moe.serving import has_fused_experts, refuse_vllm, vllm_plugin
from tests.builders import tiny_config


@pytest.mark.parametrize("fields", [{}, {"router_type": "hash"}, {"num_null_experts": 2}, {"kv_lora_rank": None}])
def test_experts_that_vllm_computes_are_fused(fields):
    refuse_vllm(tiny_config(**fields))
    assert has_fused_experts(tiny_config(**fields))


@pytest.mark.parametrize(
    "fields",
    [
        {"hidden_act": "gelu"},
        {"mlp_bias": True},
        {"swiglu_limit": 1.0},
        {"gated_experts": False},
        {"moe_latent_size": 16},
    ],
)
def test_experts_that_vllm_would_compute_wrongly_are_not_fused(fields):
    assert not has_fused_experts(tiny_config(**fields))


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"router_type": "expert_choice", "allow_noncausal": True}, "router_type"),
        ({"router_type": "lory"}, "router_type"),
        ({"router_type": "task", "num_tasks": 2}, "task_ids"),
        ({"eval_capacity_factor": 1.0}, "eval_capacity_factor"),
        ({"expert_capacity": 3}, "expert_capacity"),
        ({"attention_sinks": True}, "attention_sinks"),
        ({"routed_attention": "moa"}, "routed_attention"),
    ],
)
def test_a_model_whose_text_vllm_would_change_is_refused(fields, named):
    with pytest.raises(ValueError, match=rf"vLLM would change the text, because .*{named}"):
        refuse_vllm(tiny_config(**fields))


@pytest.mark.parametrize("attention", [MoEAttention, MoELatentAttention])
def test_vllm_finds_one_call_of_the_attention_interface(attention):
    """vLLM reads the source: one call of a local name that comes from ALL_ATTENTION_FUNCTIONS, with scaling=self.<number>."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(attention.forward))))
    calls = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "attention_interface"
    ]
    assert len(calls) == 1
    assert [ast.unparse(word.value) for word in calls[0].keywords if word.arg == "scaling"] == ["self.scaling"]


def test_the_block_returns_a_tuple_so_that_vllm_leaves_the_routing_to_it():
    tree = ast.parse(textwrap.dedent(inspect.getsource(MoEBlock.forward)))
    returns = [node for node in ast.walk(tree) if isinstance(node, ast.Return)]
    assert returns
    assert all(isinstance(node.value, ast.Tuple) for node in returns)


def test_the_plugin_is_named_in_the_package(request):
    text = (Path(request.config.rootpath) / "pyproject.toml").read_text()
    value = text.split('[project.entry-points."vllm.general_plugins"]\nmodeling_moe = "')[1].split('"')[0]
    register = EntryPoint("modeling_moe", value, "vllm.general_plugins").load()
    with pytest.raises(ImportError, match="vllm"):
        register()


def test_vllm_takes_the_plugin_s_class_with_the_flag_for_its_transformers_back_end(monkeypatch):
    """Without the entry in the dictionary, vLLM takes a class of its own for `--model-impl transformers`."""
    names = ("vllm", "vllm.model_executor", "vllm.model_executor.models", "vllm.model_executor.models.registry")
    modules = [types.ModuleType(name) for name in names]
    for module, name in zip(modules, names, strict=True):
        monkeypatch.setitem(sys.modules, name, module)
    registered, back_ends = {}, {}
    modules[0].ModelRegistry = types.SimpleNamespace(
        get_supported_archs=registered.keys, register_model=registered.__setitem__
    )
    modules[2].registry = types.SimpleNamespace(_TRANSFORMERS_BACKEND_MODELS=back_ends)
    vllm_plugin.register()
    vllm_plugin.register()
    assert registered == {"MoEForCausalLM": vllm_plugin.SERVED_MODEL}
    assert back_ends == {"MoEForCausalLM": ("modeling_moe.serving.vllm_model", "VllmMoEForCausalLM")}
