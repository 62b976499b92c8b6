"""These tests prune models of transformers and compare them with the whole models, whose dropped experts are masked."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.overrides import TorchFunctionMode
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3VLMoeForConditionalGeneration,
)

from modeling_moe.checkpoints import LazyTensor, open_source
from modeling_moe.commands.resize import main
from modeling_moe.conversion import TARGETS, load_state, open_checkpoint
from modeling_moe.hub import write_model_card
from modeling_moe.resizing import GrowthOptions, PruningOptions, ResizeOptions, resize_checkpoint
from modeling_moe.resizing.pruning_any import open_any, plan_pruning, prune_any, write_pruned
from modeling_moe.resizing.skeleton import reduce, skeleton
from modeling_moe.resizing.usage import LayerUsage, Usage, measure_usage
from modeling_moe.utils.errors import UserError
from modeling_moe.utils.folders import ResultFolder
from tests.builders import folder_contents, train_tokenizer
from tests.processes import run_without_package
from tests.resizing.families import BASE, COMMON, MORE, installed, tiny_family


IDS = torch.randint(3, 96, (2, 14), generator=torch.Generator().manual_seed(5))
SLOW = [pytest.param(family, marks=pytest.mark.slow) for family in installed(MORE)]


class MaskedRouters(TorchFunctionMode):
    """Sets the logits of dropped experts to minus infinity in every product with the weight of a router.

    Args:
        dropped: for each router weight, by its address, the ids of the dropped experts.
    """

    def __init__(self, dropped: dict[int, list[int]]):
        self.dropped, self.masked = dropped, set()
        super().__init__()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        for tensor in args if name in ("linear", "matmul", "mm", "addmm") else ():
            address = tensor.data_ptr() if isinstance(tensor, torch.Tensor) else None
            if address in self.dropped:
                self.masked.add(address)
                result[..., self.dropped[address]] = -torch.inf
        return result


def random_usage(model, seed=7) -> Usage:
    """Returns scores that choose other experts in each layer."""
    random = torch.Generator().manual_seed(seed)
    count = skeleton(model.config).num_experts
    layers = [layer.layer for layer in skeleton(model.config).layers]
    scores = {layer: torch.rand(count, generator=random, dtype=torch.float64) for layer in layers}
    return Usage({layer: LayerUsage(score, score, score) for layer, score in scores.items()}, 10, 2)


def prune_folder(folder, output, usage, keep=4, score="reap", **options):
    checkpoint = open_any(open_source(folder), **options)
    pruning = PruningOptions(keep=keep, score=score)
    pruned = prune_any(checkpoint, plan_pruning(checkpoint, pruning), usage, pruning)
    write_pruned(ResultFolder(output, False, [folder]), checkpoint, pruned, {})
    return pruned


def load_whole(folder):
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    model.set_experts_implementation("eager")
    return model.eval()


@torch.no_grad()
def masked_logits(model, small, kept):
    """Returns the logits of a whole model in which no token chooses a dropped expert.

    The tensors of the routers are those outside the experts whose shape differs from the smaller model's.
    """
    whole, fewer = dict(model.state_dict()), small.state_dict()
    dropped = {}
    for name, tensor in whole.items():
        if tensor.shape == fewer[name].shape or ".experts." in name:
            continue
        layer = int(next(part for part in name.split(".") if part.isdigit()))
        gone = [expert for expert in range(model_experts(model)) if expert not in kept[layer]]
        if tensor.numel() == max(tensor.shape):
            tensor.view(-1)[gone] = -1e4  # a selection bias, which is added after the scores
        else:
            dropped[tensor.data_ptr()] = gone
    with MaskedRouters(dropped) as masked:
        logits = model(IDS).logits
    assert masked.masked == dropped.keys()
    return logits


def model_experts(model) -> int:
    return next(module.num_experts for module in model.modules() if "has_gate" in vars(module))


@torch.no_grad()
@pytest.mark.parametrize("family", [*installed(COMMON), *SLOW])
def test_equals_the_whole_model_with_masked_routers(family, tmp_path):
    tiny_family(family).save_pretrained(tmp_path / "whole")
    model = load_whole(tmp_path / "whole")
    pruned = prune_folder(tmp_path / "whole", tmp_path / "small", random_usage(model))
    small = load_whole(tmp_path / "small")
    assert model_experts(small) == 4 < model_experts(model)
    assert len({tuple(kept) for kept in pruned.kept.values()}) == len(pruned.kept)
    before, after = (load_file(tmp_path / name / "model.safetensors").keys() for name in ("whole", "small"))
    assert after <= before
    whole = model(IDS).logits
    torch.testing.assert_close(small(IDS).logits, masked_logits(model, small, pruned.kept), atol=2e-6, rtol=1e-6)
    assert (small(IDS).logits - whole).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss", "ernie4_5_moe"])
def test_experts_fused_on_disk(family, tmp_path):
    """A checkpoint that holds the model's own tensors, with all experts of a layer in one, gives the logits of the other."""
    model = tiny_family(family)
    model.save_pretrained(tmp_path / "whole")
    (tmp_path / "fused").mkdir()
    model.config.save_pretrained(tmp_path / "fused")
    save_file(
        {name: tensor.clone() for name, tensor in model.state_dict().items()}, tmp_path / "fused" / "model.safetensors"
    )
    usage = random_usage(model)
    for name in ("whole", "fused"):
        prune_folder(tmp_path / name, tmp_path / f"small_{name}", usage)
    state = load_file(tmp_path / "small_fused" / "model.safetensors")
    assert state.keys() == model.state_dict().keys()
    logits = [load_whole(tmp_path / f"small_{name}")(IDS).logits for name in ("whole", "fused")]
    assert torch.equal(*logits)


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "field"),
    [
        ("mixtral", "num_local_experts"),
        ("qwen3_moe", "num_experts"),
        ("deepseek_v3", "n_routed_experts"),
        ("gpt_oss", "num_local_experts"),
        ("glm4_moe", "n_routed_experts"),
        ("minimax_m2", "num_local_experts"),
        ("granitemoe", "num_local_experts"),
    ],
)
def test_unchanged_where_no_token_chose_a_dropped_expert(family, field, tmp_path):
    """Routers without groups that weigh the chosen experts alone compute the logits of the whole model."""
    model = tiny_family(family, **{"n_group": 1} if family == "deepseek_v3" else {}, **{field: 12})
    model.save_pretrained(tmp_path / "whole")
    ids = IDS[:1, :3]
    usage = measure_usage(model, [{"input_ids": ids}])
    prune_folder(tmp_path / "whole", tmp_path / "small", usage, keep=8, score="load")
    dropped = sum((layer.load == 0).sum().item() for layer in usage.layers.values())
    assert dropped >= 4 * len(usage.layers)
    torch.testing.assert_close(load_whole(tmp_path / "small")(ids).logits, model(ids).logits, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("family", "field"), [("mixtral", "num_experts_per_tok"), ("ernie4_5_moe", "moe_k")])
def test_experts_per_token_are_lowered(family, field, tmp_path):
    model = tiny_family(family)
    model.save_pretrained(tmp_path / "whole")
    prune_folder(tmp_path / "whole", tmp_path / "small", random_usage(model), keep=1)
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("whole", "small"))
    assert (before[field], after[field]) == (2, 1)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {field, "moe_num_experts" if family == "ernie4_5_moe" else "num_local_experts"}
    with torch.no_grad():
        assert load_whole(tmp_path / "small")(IDS).logits.isfinite().all()


def test_other_names_of_a_field_are_changed_too(tmp_path):
    """Published gpt-oss files give K twice, and another library may read the other name."""
    model = tiny_family("gpt_oss")
    model.save_pretrained(tmp_path / "whole")
    file = tmp_path / "whole" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"experts_per_token": 2, "made_by": "somebody"}))
    prune_folder(tmp_path / "whole", tmp_path / "small", random_usage(model), keep=1)
    values = json.loads((tmp_path / "small" / "config.json").read_text())
    assert (values["experts_per_token"], values["num_experts_per_tok"], values["num_local_experts"]) == (1, 1, 1)
    assert values["made_by"] == "somebody"


def test_the_published_name_of_a_field_is_changed(tmp_path):
    """Published Qwen3-MoE files say num_experts where transformers 5 writes num_local_experts."""
    model = tiny_family("qwen3_moe")
    model.save_pretrained(tmp_path / "whole")
    file = tmp_path / "whole" / "config.json"
    values = json.loads(file.read_text())
    values["num_experts"] = values.pop("num_local_experts", None) or values["num_experts"]
    file.write_text(json.dumps(values))
    prune_folder(tmp_path / "whole", tmp_path / "small", random_usage(model))
    assert json.loads((tmp_path / "small" / "config.json").read_text()) == values | {"num_experts": 4}
    assert model_experts(load_whole(tmp_path / "small")) == 4


def test_weights_in_another_dtype(tmp_path):
    model = tiny_family("qwen3_moe")
    model.save_pretrained(tmp_path / "whole")
    checkpoint = open_any(open_source(tmp_path / "whole"), "bfloat16")
    pruning = PruningOptions(keep=3)
    pruned = prune_any(checkpoint, plan_pruning(checkpoint, pruning), random_usage(model), pruning)
    write_pruned(ResultFolder(tmp_path / "small", False, []), checkpoint, pruned, {})
    assert {tensor.dtype for tensor in load_file(tmp_path / "small" / "model.safetensors").values()} == {
        torch.bfloat16
    }
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "small").dtype == torch.bfloat16


def test_a_language_model_inside_a_larger_one(tmp_path):
    """Qwen3-VL-MoE holds the language model under other names, beside a model of images, and its experts transposed."""
    text = BASE | COMMON["qwen3_moe"] | {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1]}}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    config = CONFIG_MAPPING["qwen3_vl_moe"](
        text_config=text, vision_config=vision | {"deepstack_visual_indexes": [0]}, tie_word_embeddings=False
    )
    torch.manual_seed(0)
    model = Qwen3VLMoeForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path / "whole")
    usage = measure_usage(model, [{"input_ids": IDS}])
    pruned = prune_folder(tmp_path / "whole", tmp_path / "small", usage)
    values = json.loads((tmp_path / "small" / "config.json").read_text())
    assert values["text_config"]["num_local_experts"] == 4
    small, info = Qwen3VLMoeForConditionalGeneration.from_pretrained(tmp_path / "small", output_loading_info=True)
    assert not info["missing_keys"] | info["unexpected_keys"]
    for name, tensor in small.state_dict().items():
        whole = model.state_dict()[name]
        if whole.shape != tensor.shape:
            whole = whole[pruned.kept[int(name.split("layers.")[1].split(".")[0])]]
        assert torch.equal(tensor, whole)


OWN_CODE = """
from transformers import MixtralConfig, MixtralForCausalLM


class MineConfig(MixtralConfig):
    model_type = "mine"


class MineForCausalLM(MixtralForCausalLM):
    config_class = MineConfig
"""


def test_a_model_of_the_checkpoints_own_code(tmp_path):
    model = tiny_family("mixtral")
    model.config.save_pretrained(tmp_path / "whole")
    file = tmp_path / "whole" / "config.json"
    code = {"AutoConfig": "modeling_mine.MineConfig", "AutoModelForCausalLM": "modeling_mine.MineForCausalLM"}
    changes = {"model_type": "mine", "architectures": ["MineForCausalLM"], "auto_map": code}
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    (tmp_path / "whole" / "modeling_mine.py").write_text(OWN_CODE)
    save_file(
        {name: tensor.clone() for name, tensor in model.state_dict().items()}, tmp_path / "whole" / "model.safetensors"
    )
    with pytest.raises(UserError, match="--trust_remote_code true"):
        open_any(open_source(tmp_path / "whole"))
    usage = measure_usage(model, [{"input_ids": IDS}])
    pruned = prune_folder(tmp_path / "whole", tmp_path / "small", usage, trust_remote_code=True)
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small", trust_remote_code=True)
    assert type(small).__name__ == "MineForCausalLM"
    row = model.model.layers[0].mlp.gate.weight[pruned.kept[0]]
    assert torch.equal(small.model.layers[0].mlp.gate.weight, row)


# JetMoE does not call its experts by transformers' interface, so it cannot be pruned
@pytest.mark.parametrize("family", sorted(set(TARGETS) - {"jetmoe"}))
def test_names_on_disk_are_those_that_servers_read(family, tmp_path):
    """The export to a family writes the names that vLLM, SGLang and llama.cpp read; a pruned checkpoint has the same."""
    model = tiny_family(family)
    model.save_pretrained(tmp_path / "whole")
    pruned = prune_folder(tmp_path / "whole", tmp_path / "small", random_usage(model))
    converted = open_checkpoint(str(tmp_path / "small"))
    exported = TARGETS[family].tensors(converted.state, converted.config)
    assert {name: tensor.shape for name, tensor in exported.items()} == {
        name: tensor.shape for name, tensor in pruned.state.items()
    }
    ours = load_state(converted.config, converted.state).eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS).logits, load_whole(tmp_path / "small")(IDS).logits, atol=2e-5, rtol=1e-5)


def save_with_tokenizer(model, folder):
    model.save_pretrained(folder)
    train_tokenizer().save_pretrained(folder)
    text = folder.parent / "text.txt"
    text.write_text("a router decides which expert a token is sent to. " * 40)
    return ResizeOptions(method="prune", data=[f"mine={text}"], tokens=120)


LOAD_PLAIN = """
import sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

model, info = AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)
assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
ids = AutoTokenizer.from_pretrained(sys.argv[1])("a router decides", return_tensors="pt").input_ids
print(type(model).__name__, model.config.num_local_experts, model(ids).logits.isfinite().all().item())
"""


def test_the_command_keeps_the_family_and_transformers_alone_loads_the_result(tmp_path, capsys):
    model = tiny_family("mixtral", vocab_size=300)
    options = save_with_tokenizer(model, tmp_path / "whole")
    options.save_usage = str(tmp_path / "use.json")
    arguments = [GrowthOptions(), PruningOptions(keep=3)]
    before, after, reason = resize_checkpoint(str(tmp_path / "whole"), tmp_path / "small", options, *arguments)
    assert (before.num_experts, after.num_experts, after.experts_per_token) == (6, 3, 2)
    assert "sent to other experts" in reason
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert after.parameters == small.num_parameters() == before.parameters - 2 * 3 * (3 * 32 * 24 + 32)
    assert after.active == before.active - 2 * 3 * 32
    names = load_file(tmp_path / "small" / "model.safetensors").keys()
    assert "model.layers.1.block_sparse_moe.experts.2.w1.weight" in names
    assert not any("experts.3." in name for name in names)
    record = json.loads((tmp_path / "small" / "conversion.json").read_text())["recipe"]
    assert len(record["kept"]["0"]) == 3
    assert (tmp_path / "small" / "tokenizer.json").is_file()
    card = write_model_card(tmp_path / "small")
    assert "upcycling" not in card.data.tags
    kept = "; ".join(f"layer {layer}: {', '.join(map(str, experts))}" for layer, experts in record["kept"].items())
    for row in (
        "| Resizing | |",
        "| Method | prune |",
        "| Experts kept in each layer | 3 |",
        f"| Kept experts of the source | {kept} |",
        "| Exactness | does not compute the source's function",
    ):
        assert row in card.text
    assert "REAP (arXiv:2510.13999)" in card.text
    (measured,) = [line for line in card.text.splitlines() if line.startswith("| Measured on")]
    assert "tokens of each" in measured
    assert str(tmp_path) not in card.text
    assert "Experts were chosen by their use on one text" in card.text
    printed = run_without_package(LOAD_PLAIN, tmp_path, tmp_path / "small")
    assert printed.split() == ["MixtralForCausalLM", "3", "True"]
    paths = {"model_name_or_path": "whole", "output_dir": "again", "usage_json": "use.json"}
    flags = [part for name, path in paths.items() for part in (f"--{name}", str(tmp_path / path))]
    main([*flags, "--method", "prune", "--keep", "3"])
    assert "6, 2" in (shown := capsys.readouterr().out)
    assert "3, 2" in shown
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "small" / "model.safetensors"
    ).read_bytes()


def test_a_killed_run_goes_on(tmp_path, monkeypatch):
    model = tiny_family("qwen3_moe")
    model.save_pretrained(tmp_path / "whole")
    usage = random_usage(model)
    checkpoint, pruning = open_any(open_source(tmp_path / "whole")), PruningOptions(keep=4)
    pruned = prune_any(checkpoint, plan_pruning(checkpoint, pruning), usage, pruning)
    write_pruned(ResultFolder(tmp_path / "once", False, []), checkpoint, pruned, {}, "20KB")
    tensors = list(pruned.state)
    pruned.state[tensors[-1]] = LazyTensor(pruned.state[tensors[-1]].shape, torch.float32, fail)
    with pytest.raises(KeyboardInterrupt):
        write_pruned(ResultFolder(tmp_path / "twice", False, []), checkpoint, pruned, {}, "20KB")
    assert not (tmp_path / "twice").exists()
    assert list((tmp_path / ".twice.partial").glob("*.safetensors"))
    whole = prune_any(checkpoint, plan_pruning(checkpoint, pruning), usage, pruning)
    write_pruned(ResultFolder(tmp_path / "twice", False, []), checkpoint, whole, {}, "20KB")
    assert folder_contents(tmp_path / "twice") == folder_contents(tmp_path / "once")


def fail(index):
    raise KeyboardInterrupt


def test_tensors_that_the_model_does_not_take_are_left_out(tmp_path):
    model = tiny_family("qwen3_moe")
    model.save_pretrained(tmp_path / "whole")
    file = tmp_path / "whole" / "model.safetensors"
    save_file(load_file(file) | {"model.layers.2.mlp.experts.0.up_proj.weight": torch.zeros(3, 3)}, file)
    pruned = prune_folder(tmp_path / "whole", tmp_path / "small", random_usage(model))
    assert pruned.left_out == ["model.layers.2.mlp.experts.0.up_proj.weight"]
    assert not any("layers.2" in name for name in pruned.state)


def test_a_head_that_is_left_out_is_not_in_the_configuration(tmp_path):
    """A server that finds `num_nextn_predict_layers` in config.json looks for the tensors of such layers."""
    model = tiny_family("glm4_moe", num_nextn_predict_layers=1)
    model.save_pretrained(tmp_path / "whole")
    whole = json.loads((tmp_path / "whole" / "config.json").read_text())
    file = tmp_path / "whole" / "model.safetensors"
    expected = whole | {"n_routed_experts": 4}
    prune_folder(tmp_path / "whole", tmp_path / "first", random_usage(model))
    assert json.loads((tmp_path / "first" / "config.json").read_text()) == expected
    save_file(load_file(file) | {"model.layers.2.eh_proj.weight": torch.zeros(3, 3)}, file)
    prune_folder(tmp_path / "whole", tmp_path / "second", random_usage(model))
    expected["num_nextn_predict_layers"] = 0
    assert json.loads((tmp_path / "second" / "config.json").read_text()) == expected
    load_whole(tmp_path / "second")


@pytest.mark.parametrize(
    ("family", "keep", "message"),
    [
        ("mixtral", 0, "keep is 0: it must be from 1 to 5"),
        ("mixtral", 6, "keep is 6: it must be from 1 to 5"),
        ("deepseek_v3", 5, r"multiple of n_group \(2\) from 4 to 7"),
        ("deepseek_v3", 2, r"multiple of n_group \(2\) from 4 to 7"),
    ],
)
def test_a_keep_out_of_range_is_refused(family, keep, message):
    with pytest.raises(UserError, match=message):
        reduce(skeleton(tiny_family(family).config), keep)


def test_tables_of_expert_ids_are_refused():
    with pytest.raises(UserError, match="tid2eid is a table that sends tokens to fixed experts"):
        reduce(skeleton(CONFIG_MAPPING["deepseek_v4"]()), 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "usage_json .*nothing.json does not exist"),
        ({"usage": "{}"}, "usage_json .*use.json holds no usage of experts"),
        ({"usage": '{"layers": {"0": {"load": [1], "mass": [1], "reap": ["x"]}}, "tokens": 1}'}, "holds no usage"),
        ({"model": "dense"}, "LlamaForCausalLM is a dense model"),
        ({"config": {"quantization_config": {"quant_method": "mxfp4"}}}, "is quantised"),
        ({"config": {"hidden_size": 40}}, "do not belong together"),
        ({"occupied": True}, "is not empty"),
    ],
    ids=str,
)
def test_mistakes_are_one_sentence_and_leave_nothing(change, message, tmp_path):
    small = LlamaConfig(
        vocab_size=96, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    model = LlamaForCausalLM(small) if change.get("model") == "dense" else tiny_family("mixtral")
    model.save_pretrained(tmp_path / "whole")
    file = tmp_path / "whole" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change.get("config", {})))
    use = tmp_path / ("use.json" if "usage" in change else "nothing.json")
    if "usage" in change:
        use.write_text(change["usage"])
    if "occupied" in change:
        (tmp_path / "small").mkdir()
        (tmp_path / "small" / "mine.txt").write_text("x")
    before = sorted(str(file) for file in tmp_path.rglob("*"))
    options = ResizeOptions(method="prune", usage_json=str(use))
    with pytest.raises(UserError, match=message) as caught:
        resize_checkpoint(
            str(tmp_path / "whole"), tmp_path / "small", options, GrowthOptions(), PruningOptions(keep=3)
        )
    assert "\n" not in str(caught.value)
    assert sorted(str(file) for file in tmp_path.rglob("*")) == before


def test_a_missing_tokenizer_or_text_is_one_sentence(tmp_path):
    tiny_family("mixtral").save_pretrained(tmp_path / "whole")
    (tmp_path / "text.txt").write_text("a router " * 400)
    for data, message in [("text.txt", "has no tokenizer"), ("nowhere.txt", "tokenizer|does not exist")]:
        options = ResizeOptions(method="prune", data=[f"mine={tmp_path / data}"], tokens=20)
        with pytest.raises(UserError, match=message):
            resize_checkpoint(
                str(tmp_path / "whole"), tmp_path / "small", options, GrowthOptions(), PruningOptions(keep=3)
            )
    assert not (tmp_path / "small").exists()
