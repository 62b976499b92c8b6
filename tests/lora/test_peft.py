"""These tests compare LoRA on experts through PEFT's API with PEFT's own path: outputs, gradients, files and adapters."""

import inspect
import os
import subprocess
import sys
import threading
from contextlib import nullcontext
from pathlib import Path

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import layer as peft_layer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Ernie4_5_MoeConfig, Ernie4_5_MoeForCausalLM

from modeling_moe import MoEForCausalLM
from modeling_moe.dispatch import interface
from modeling_moe.lora import MoELoraConfig, layers, moe_lora_config, peft_alone, trainable_parameters
from modeling_moe.lora import config as lora_config
from modeling_moe.utils.errors import UserError
from tests.builders import SIZE, tiny_config
from tests.lora.checkpoints import IDS, TARGETS, build, fill, train


GOLDEN = Path(__file__).parent / "golden"
FAMILIES = ["moe", "mixtral", "qwen3_moe", "olmoe", "gpt_oss"]


def model_of(family: str, **fields):
    if family != "moe":
        return build(family)
    model = MoEForCausalLM(tiny_config(router_aux_loss_coef=0.0, router_z_loss_coef=0.0, **fields))
    fill(model, 0.3)
    return model


def adapted(family: str = "moe", config=None, device: str = "cpu", **fields):
    config = config or LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj"], target_parameters=TARGETS)
    model = get_peft_model(model_of(family, **fields).to(device), config)
    fill(model, 0.2, only="lora_")
    return model


def results(model, alone: bool = False) -> dict[str, torch.Tensor]:
    ids = IDS.to(model.device)
    with peft_alone() if alone else nullcontext():
        output = model(ids, labels=ids)
        output.loss.backward()
    named = {"logits": output.logits.detach()}
    named |= {name: each.grad for name, each in model.named_parameters() if each.requires_grad}
    model.zero_grad()
    return named


def assert_same(got, expected, tolerance=2e-5):
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        scale = tensor.abs().max().item()
        assert scale > 0, name
        torch.testing.assert_close(got[name], tensor, atol=tolerance * scale, rtol=0, msg=name)


@pytest.fixture
def calls(monkeypatch):
    """Lists for each call of the operator whether it had low-rank updates; on a GPU, Triton must serve each call."""
    seen, operator = [], interface.experts

    def spy(*arguments):
        tensors, layout, *_, backend, _ = arguments
        assert tensors[0].device.type == "cpu" or backend == "triton"
        seen.append("up_a" in layout or "down_a" in layout)
        return operator(*arguments)

    monkeypatch.setattr(interface, "experts", spy)
    return seen


def test_private_interface_of_peft():
    """This test fails when a release of PEFT changes an interface that lora/layers.py relies on."""
    say = f"PEFT {peft.__version__} changed ParamWrapper"
    stock = layers._stock_activate
    assert stock is not None, say
    assert peft_layer.ParamWrapper._activate_lora is layers.activate_lora, say
    assert list(inspect.signature(stock).parameters) == ["self", "active_adapters"], say
    wrapper = adapted().base_model.model.model.layers[0].mlp.experts
    assert type(wrapper) is peft_layer.ParamWrapper, say
    for name in ("parameter_name", "num_experts", "lora_A", "lora_B", "lora_dropout", "scaling"):
        assert hasattr(wrapper, name), f"{say}: {name}"
    lhs, rhs, scaling = wrapper.get_delta_factors("default")
    ours = layers.low_rank(wrapper, ["default"])
    torch.testing.assert_close(ours.b @ ours.a * ours.scaling, lhs @ rhs * scaling, msg=say)


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_peft(family, calls, device):
    model = adapted(family, device=device)
    got = results(model)
    assert calls
    assert all(calls)
    assert_same(got, results(model, alone=True))


@pytest.mark.parametrize("fields", [{"gated_experts": False, "mlp_bias": True}, {"num_null_experts": 2}])
def test_our_other_experts(fields, calls, device):
    targets = TARGETS if fields.get("gated_experts", True) else ["mlp.experts.up_proj", "mlp.experts.down_proj"]
    config = LoraConfig(r=2, lora_alpha=3, target_modules=[], target_parameters=targets)
    model = adapted(config=config, device=device, **fields)
    got = results(model)
    assert all(calls)
    assert_same(got, results(model, alone=True))


def test_one_matrix_and_a_bias():
    """PEFT's own path updates a bias, while this package updates a matrix of the same experts."""
    targets = ["mlp.experts.down_proj", "mlp.experts.gate_up_proj_bias"]
    config = LoraConfig(r=2, lora_alpha=3, target_modules=[], target_parameters=targets)
    model = adapted(config=config, mlp_bias=True)
    assert_same(results(model), results(model, alone=True))


def test_rslora_and_bf16():
    config = LoraConfig(r=2, lora_alpha=3, use_rslora=True, target_modules=[], target_parameters=TARGETS)
    model = adapted(config=config)
    expected = results(model, alone=True)
    assert_same(results(model), expected)
    model = get_peft_model(model_of("moe").bfloat16(), config)
    fill(model, 0.2, only="lora_")
    got = results(model)
    assert {tensor.dtype for name, tensor in got.items() if name != "logits"} == {torch.float32}
    # gradients are not compared: one router decision that bf16 flips changes them more than rounding does
    torch.testing.assert_close(got["logits"].float(), expected["logits"], atol=0.3, rtol=0.1)


def test_adapters(calls, device):
    """Two adapters work one after the other, both at once, and disabled."""
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj"], target_parameters=TARGETS)
    other = LoraConfig(r=3, lora_alpha=2, target_modules=["q_proj"], target_parameters=TARGETS)
    model, ids = adapted(config=config, device=device), IDS.to(device)
    model.add_adapter("other", other)
    fill(model, 0.25, only="lora_")
    base = model_of("moe").to(device)(ids).logits
    seen = []
    for active in ("default", "other", ["default", "other"]):
        model.base_model.set_adapter(active)
        calls.clear()
        got = results(model)
        assert all(calls)
        assert_same(got, results(model, alone=True))
        seen.append(got["logits"])
        with model.disable_adapter():
            torch.testing.assert_close(model(ids).logits, base)
    assert all((first - second).abs().max() > 1e-3 for first, second in zip(seen, seen[1:] + seen[:1], strict=True))


def test_merging():
    model = adapted()
    expected, weight = model(IDS).logits, model.base_model.model.model.layers[0].mlp.experts.get_param().clone()
    model.merge_adapter()
    torch.testing.assert_close(model(IDS).logits, expected, atol=1e-4, rtol=1e-4)
    model.unmerge_adapter()
    torch.testing.assert_close(model(IDS).logits, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model.base_model.model.model.layers[0].mlp.experts.get_param(), weight)
    merged = model.merge_and_unload()
    assert type(merged.model.layers[0].mlp.experts).__name__ == "MoEExperts"
    torch.testing.assert_close(merged(IDS).logits, expected, atol=1e-4, rtol=1e-4)


def test_decoding_equals_prefill(device):
    model, ids = adapted(device=device).eval(), IDS.to(device)
    prompt = ids[:, :4]
    tokens = model.generate(input_ids=prompt, max_new_tokens=6, do_sample=False)
    plain = model.generate(input_ids=prompt, max_new_tokens=6, do_sample=False, use_cache=False)
    assert tokens.tolist() == plain.tolist()
    with torch.no_grad():
        output = model(ids[:, :4], use_cache=True)
        step = model(ids[:, 4:5], past_key_values=output.past_key_values).logits
        torch.testing.assert_close(step, model(ids[:, :5]).logits[:, 4:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant, device):
    model = adapted(device=device).train()
    expected = results(model)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    assert_same(results(model), expected)


def test_compiles_whole(device):
    model, ids = adapted("mixtral", device=device), IDS.to(device)
    expected = results(model)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    output = compiled(ids, labels=ids)
    output.loss.backward()
    got = {"logits": output.logits.detach()}
    got |= {name: each.grad for name, each in model.named_parameters() if each.requires_grad}
    assert_same(got, expected)


def test_nothing_stays_on_the_experts():
    model = adapted()
    results(model)
    assert not any(getattr(module, "low_rank", None) for module in model.modules())


def test_threads_take_turns_in_an_adapted_layer():
    """The second thread comes while the first computes the experts, and would leave after it."""
    model = adapted("mixtral").eval()
    expected, got, waits = model(IDS).logits, [], [threading.Event(), threading.Event()]

    def wait(*_):
        if threading.current_thread() is threads[0]:
            waits[0].set()
            waits[1].wait(0.5)  # for the second thread, which the first one keeps out
        else:
            waits[1].set()
            threads[0].join(5)

    hook = next(module for module in model.modules() if layers.is_experts(module)).register_forward_pre_hook(wait)
    threads = [threading.Thread(target=lambda: got.append(model(IDS).logits)) for _ in range(2)]
    threads[0].start()
    assert waits[0].wait(30)
    threads[1].start()
    for thread in threads:
        thread.join()
    hook.remove()
    assert len(got) == 2
    for logits in got:
        assert torch.equal(logits, expected)
    experts = [module for module in model.modules() if layers.is_experts(module)]
    assert all("low_rank" not in vars(module) and module.config is model.config for module in experts)


def test_left_to_peft_with_a_warning(monkeypatch):
    said = []
    monkeypatch.setattr(layers.logger, "warning_once", said.append)
    model = adapted("mixtral")
    model.base_model.model.set_experts_implementation("eager")
    assert_same(results(model), results(model, alone=True))
    assert "experts_implementation is 'eager'" in said[0]
    said.clear()
    model = adapted(hidden_act="quick_gelu")
    assert_same(results(model), results(model, alone=True))
    assert "has no derivative here" in said[0]


def test_dropout_by_our_config(tmp_path):
    config = MoELoraConfig(r=2, lora_alpha=3, lora_dropout=0.5, target_modules=["q_proj"], target_parameters=TARGETS)
    model = adapted(config=config).eval()
    expected = model(IDS).logits
    assert_same({"x": expected}, {"x": adapted()(IDS).logits})
    model.train()
    torch.manual_seed(0)
    first, second = model(IDS).logits, model(IDS).logits
    assert (first - second).abs().max() > 1e-3
    torch.manual_seed(0)
    torch.testing.assert_close(model(IDS).logits, first, atol=0, rtol=0)
    model.add_adapter("other", config)
    model.base_model.set_adapter(["default", "other"])
    assert (model(IDS).logits - model(IDS).logits).abs().max() > 1e-3
    # the saved adapter loads without dropout
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    again = PeftModel.from_pretrained(model_of("moe"), tmp_path)
    assert again.peft_config["default"].lora_dropout == 0
    torch.testing.assert_close(again(IDS).logits, expected)
    model.base_model.set_adapter("default")
    model.base_model.model.set_experts_implementation("eager")
    with pytest.raises(UserError, match="lora_dropout on down_proj"):
        model(IDS)


def test_dropouts_that_differ():
    fields = {"r": 2, "target_modules": [], "target_parameters": TARGETS}
    model = adapted(config=MoELoraConfig(lora_dropout=0.5, **fields))
    model.add_adapter("other", MoELoraConfig(lora_dropout=0.25, **fields))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(UserError, match="differ in lora_dropout"):
        model.train()(IDS)
    model.eval()(IDS)
    with pytest.raises(UserError, match="lora_dropout is 1"):
        MoELoraConfig(lora_dropout=1.0)


def test_layout_by_hand():
    """PEFT stores lora_A expert after expert, and lora_B rank after rank."""
    model = get_peft_model(build("mixtral"), LoraConfig(r=2, target_modules=[], target_parameters=TARGETS))
    wrapper = model.base_model.model.model.layers[0].mlp.experts
    a, b = wrapper.lora_A["default"].weight, wrapper.lora_B["default"].weight
    assert wrapper.parameter_name == "down_proj"
    assert a.shape == (4 * 2, 8)
    assert b.shape == (16, 2 * 4)
    update = layers.low_rank(wrapper, ["default"])
    for expert in range(4):
        assert update.a[expert].equal(a[2 * expert : 2 * expert + 2])
        assert update.b[expert].equal(b[:, [expert, 4 + expert]])


def test_golden_file():
    """The golden adapter, which PEFT 0.21.2 alone trained and saved, gives the saved logits."""
    model = PeftModel.from_pretrained(build("mixtral"), GOLDEN, is_trainable=True)
    assert_same({"x": model(IDS).logits.detach()}, {"x": load_file(GOLDEN / "logits.safetensors")["logits"]}, 1e-4)


def test_training_writes_the_golden_file(tmp_path):
    model = adapted("mixtral")
    train(model)
    model.save_pretrained(tmp_path)
    saved, golden = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path, GOLDEN))
    assert_same(saved, golden, 1e-3)


@pytest.mark.parametrize("family", ["mixtral", pytest.param("qwen3_moe", marks=pytest.mark.slow)])
def test_with_peft_alone(family, tmp_path, calls):
    """An adapter trained here gives equal logits in a process without this package, and vice versa."""
    base, ours, theirs, logits = (str(tmp_path / name) for name in ("base", "ours", "theirs", "logits.pt"))
    build(family).save_pretrained(base)
    config = MoELoraConfig(
        r=2, lora_alpha=3, lora_dropout=0.1, target_modules=["q_proj"], target_parameters=TARGETS, use_rslora=True
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    fill(model, 0.2, only="lora_")
    train(model.train())
    model.save_pretrained(ours)
    script = Path(__file__).parent / "checkpoints.py"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, str(script), base, ours, theirs, logits], check=True, env=environment, cwd=tmp_path
    )
    expected = torch.load(logits)
    assert all(calls)
    assert_same({"x": model.eval()(IDS).logits.detach()}, {"x": expected["elsewhere"]})
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), theirs)
    assert_same({"x": loaded(IDS).logits.detach()}, {"x": expected["here"]})


@pytest.mark.parametrize("rank_per", ["expert", "token"])
@pytest.mark.parametrize("family", FAMILIES)
def test_moe_lora_config(family, rank_per, calls, device):
    model = model_of(family).to(device)
    config = moe_lora_config(model, r=6, rank_per=rank_per, lora_alpha=4)
    counted = trainable_parameters(model, config)
    model = get_peft_model(model, config)
    assert sum(counted.values()) == sum(each.numel() for each in model.parameters() if each.requires_grad)
    assert set(counted) == {"experts", "linear layers", "routers"}
    wrapper = model.base_model.model.model.layers[0].mlp.experts
    top_k = model.config.num_experts_per_tok
    assert wrapper.r["default"] == (6 if rank_per == "expert" else 6 // top_k)
    assert wrapper.scaling["default"] == pytest.approx(4 / 6)
    query = model.base_model.model.model.layers[0].self_attn.q_proj
    assert (query.r["default"], query.scaling["default"]) == (6, pytest.approx(4 / 6))
    fill(model, 0.2, only="lora_")
    got = results(model)
    assert all(calls)
    assert_same(got, results(model, alone=True), 1e-4)


@pytest.mark.parametrize(
    ("fields", "rank"),
    [
        ({"routed_attention": "moa", "attention_experts": 4, "attention_experts_per_tok": 2}, 3),
        # 4 heads choose 1 of 2 experts on each side
        (
            {"routed_attention": "switch_head", "attention_experts": 2, "attention_experts_per_tok": 1}
            | {"num_key_value_heads": 4},
            1,
        ),
    ],
)
def test_the_experts_of_attention_have_a_rank_of_their_own_number(fields, rank):
    dense = MoEForCausalLM(tiny_config(mlp_layer_types=["dense"] * 3, **fields))
    model = get_peft_model(dense, moe_lora_config(dense, r=6, rank_per="token", quiet=True))
    assert model.base_model.model.model.layers[0].self_attn.experts.r["default"] == rank
    mixed = MoEForCausalLM(tiny_config(**fields))
    with pytest.raises(
        UserError, match="attention has another than the feed-forward networks: choose rank_per='expert'"
    ):
        moe_lora_config(mixed, r=6, rank_per="token")
    assert moe_lora_config(mixed, r=6, quiet=True).r == 6


def test_a_rank_per_token_needs_the_number_of_its_experts(monkeypatch):
    """ERNIE's configuration has another name for the number than most."""
    ernie = Ernie4_5_MoeForCausalLM(
        Ernie4_5_MoeConfig(**SIZE | {"moe_num_experts": 6, "moe_k": 3, "moe_intermediate_size": 16})
    )
    assert moe_lora_config(ernie, r=6, rank_per="token", quiet=True).r == 2
    monkeypatch.setattr(lora_config, "experts_per_token", lambda *_: None)
    with pytest.raises(UserError, match=r"which config.json does not name: choose rank_per='expert'"):
        moe_lora_config(ernie, r=6, rank_per="token")


def test_moe_lora_config_by_name(capsys):
    shared = {"num_shared_experts": 1}
    model = model_of("moe", **shared)
    config = moe_lora_config(model, r=3, experts=False, router=False, attention=False, shared=True)
    assert config.target_modules == {f"shared_experts.{name}_proj" for name in ("gate", "up", "down")}
    assert config.target_parameters is None
    printed = capsys.readouterr().err
    assert f"LoRA trains {sum(trainable_parameters(model, config).values()):,} parameters" in printed
    model = get_peft_model(model, config)
    assert model.base_model.model.model.layers[0].mlp.shared_experts.up_proj.r == {"default": 3}
    config = moe_lora_config(model_of("moe"), experts=False, router=False, attention=["k_proj"])
    assert config.target_modules == {"k_proj"}
    rs = moe_lora_config(model_of("moe"), r=6, rank_per="token", use_rslora=True)
    wrapper = get_peft_model(model_of("moe"), rs).base_model.model.model.layers[0].mlp.experts
    assert wrapper.scaling["default"] == pytest.approx(12 / 6**0.5)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"r": 0}, "r is 0"),
        ({"r": 2, "rank_per": "token"}, "less than the 3 experts"),
        ({"rank_per": "layer"}, "choose expert or token"),
        ({"attention": ["nowhere"]}, "nowhere match no linear layer"),
        ({"experts": False, "router": False, "attention": False}, "nothing to train"),
        ({"lora_dropout": -0.1}, "lora_dropout is -0.1"),
    ],
)
def test_moe_lora_config_mistakes(asked, message):
    with pytest.raises(UserError, match=message):
        moe_lora_config(model_of("moe"), **asked)


def test_shared_experts_of_transformers():
    config = moe_lora_config(build("qwen2_moe"), experts=False, router=False, attention=False, shared=True)
    assert config.target_modules == {f"shared_expert.{name}_proj" for name in ("gate", "up", "down")}
    # for this model type PEFT would turn the names into those of the routed experts
    with pytest.raises(UserError, match="set shared=False"):
        moe_lora_config(build("glm4_moe"), shared=True)
