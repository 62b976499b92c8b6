"""Tests of checkpoints: names on disk, byte-identical saving, all ways of loading, damage, and saved code."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, Trainer, TrainingArguments

import modeling_moe
from modeling_moe import MoEForCausalLM
from modeling_moe.model_checkpoints import AUTO_MAP
from modeling_moe.modeling_moe import MODELS
from tests.builders import tiny_config
from tests.processes import run_without_package


KINDS = {
    "gated": {},
    "gated-bias": {"mlp_bias": True},
    "plain": {"gated_experts": False},
    "plain-bias": {"gated_experts": False, "mlp_bias": True},
    "shared-tied": {"num_shared_experts": 2, "shared_expert_gate": True, "tie_word_embeddings": True},
    "sigmoid": {"scoring_func": "sigmoid", "router_selection_bias": True},
    "latent": {"moe_latent_size": 10, "router_input_norm": True, "router_expert_scale": True},
}
IDS = torch.arange(3, 21).view(2, 9)


@pytest.fixture
def saved(tmp_path):
    """Returns a tiny model and the folder in which it is saved."""
    model = MoEForCausalLM(tiny_config()).eval()
    model.save_pretrained(tmp_path / "model")
    return model, tmp_path / "model"


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("kind", KINDS)
def test_save_load_save_gives_the_same_bytes(kind, tmp_path):
    model = MoEForCausalLM(tiny_config(**KINDS[kind])).eval()
    model.save_pretrained(tmp_path / "first")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    loaded.save_pretrained(tmp_path / "second")
    first, second = contents(tmp_path / "first"), contents(tmp_path / "second")
    assert first.keys() == second.keys()
    assert all(first[name] == second[name] for name in first)


def test_each_expert_has_its_own_tensors_on_disk(saved):
    model, folder = saved
    tensors = load_file(folder / "model.safetensors")
    fused = model.model.layers[2].mlp.experts.gate_up_proj
    for expert in range(5):
        prefix = f"model.layers.2.mlp.experts.{expert}"
        assert torch.equal(tensors[f"{prefix}.gate_proj.weight"], fused[expert, :24])
        assert torch.equal(tensors[f"{prefix}.up_proj.weight"], fused[expert, 24:])
    assert not any("gate_up_proj" in name for name in tensors)


def test_biases_stay_fused_on_disk(tmp_path):
    MoEForCausalLM(tiny_config(mlp_bias=True)).save_pretrained(tmp_path)
    names = {name for name in load_file(tmp_path / "model.safetensors") if ".0.mlp.experts." in name}
    assert {"model.layers.0.mlp.experts.gate_up_proj_bias", "model.layers.0.mlp.experts.down_proj_bias"} == {
        name for name in names if "bias" in name
    }


def test_sharded(saved, tmp_path):
    model, _ = saved
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "shards")(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_loading_shard_by_shard_fills_experts_that_are_in_two_shards(kind, tmp_path):
    model = MoEForCausalLM(tiny_config(**KINDS[kind])).eval()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    other = MoEForCausalLM(tiny_config(**KINDS[kind])).eval()
    shards = [load_file(file) for file in sorted(tmp_path.glob("*.safetensors"))]
    assert len(shards) > 4
    missing = [set(other.load_state_dict(shard, strict=False).missing_keys) for shard in shards]
    assert set.intersection(*missing) <= {"lm_head.weight"} if "tied" in kind else not set.intersection(*missing)
    other.tie_weights()
    assert torch.equal(other(IDS).logits, model(IDS).logits)


def test_some_experts_leave_the_others_as_they_are(saved):
    model, folder = saved
    other = MoEForCausalLM(tiny_config())
    experts = other.model.layers[2].mlp.experts
    before = {name: parameter.clone() for name, parameter in experts.named_parameters()}
    prefix = "model.layers.2.mlp.experts."
    tensors = {key: value for key, value in load_file(folder / "model.safetensors").items() if f"{prefix}3." in key}
    result = other.load_state_dict(tensors, strict=False)
    assert f"{prefix}2.up_proj.weight" in result.missing_keys
    assert f"{prefix}3.up_proj.weight" not in result.missing_keys
    for name, parameter in model.model.layers[2].mlp.experts.named_parameters():
        after = getattr(experts, name)
        assert torch.equal(after[3], parameter[3])
        rest = [0, 1, 2, 4]
        assert torch.equal(after[rest], before[name][rest])


def test_a_strict_load_names_the_expert_that_is_missing_or_misshapen(saved):
    model, folder = saved
    tensors, name = load_file(folder / "model.safetensors"), "model.layers.2.mlp.experts.3.up_proj.weight"
    with pytest.raises(RuntimeError, match=rf'Missing key.* "{name}"\. '):
        model.load_state_dict({key: value for key, value in tensors.items() if key != name})
    with pytest.raises(RuntimeError, match=rf"size mismatch for {name}: \(3, 3\) .* \(24, 32\)"):
        model.load_state_dict(tensors | {name: torch.zeros(3, 3)})
    with torch.device("meta"):
        empty = MoEForCausalLM(tiny_config())
    some = {key: value for key, value in tensors.items() if "experts.3." in key}
    with pytest.raises(RuntimeError, match="has no memory that some of its experts could be written to"):
        empty.load_state_dict(some, strict=False, assign=True)


def test_a_plain_trainer_resumes_from_shards(tmp_path):
    rows = [{"input_ids": row.tolist(), "labels": row.tolist()} for row in torch.randint(3, 99, (8, 9))]

    def trainer(steps: int) -> Trainer:
        torch.manual_seed(0)
        args = TrainingArguments(
            str(tmp_path), max_steps=steps, save_steps=2, use_cpu=True, report_to=[], disable_tqdm=True
        )
        return Trainer(MoEForCausalLM(tiny_config()), args, train_dataset=rows)

    whole = trainer(4)
    whole.train()
    checkpoint = tmp_path / "checkpoint-2"
    MoEForCausalLM.from_pretrained(checkpoint).save_pretrained(checkpoint, max_shard_size="20KB")
    (checkpoint / "model.safetensors").unlink(missing_ok=True)
    assert len(list(checkpoint.glob("model-*.safetensors"))) > 2
    resumed = trainer(4)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    expected = whole.model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in resumed.model.state_dict().items())


@pytest.mark.parametrize(
    "arguments", [{"device_map": "cpu"}, {"device_map": {"": "cpu"}}, {"device_map": "auto"}], ids=str
)
def test_device_map(saved, arguments):
    model, folder = saved
    assert torch.equal(AutoModelForCausalLM.from_pretrained(folder, **arguments)(IDS).logits, model(IDS).logits)


def test_offload_to_disk(saved, tmp_path):
    model, folder = saved
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"}
    loaded = AutoModelForCausalLM.from_pretrained(folder, device_map=places, offload_folder=tmp_path / "offload")
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits)


def test_bf16(saved):
    _, folder = saved
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert {p.dtype for name, p in model.named_parameters() if "mlp.gate." not in name} == {torch.bfloat16}
    assert model(IDS).logits.isfinite().all()


def test_meta(saved):
    _, folder = saved
    model = AutoModelForCausalLM.from_pretrained(folder, device_map="meta")
    assert {p.device.type for p in model.parameters()} == {"meta"}
    with torch.device("meta"):
        model = MoEForCausalLM(tiny_config())
    assert model(IDS.to("meta")).logits.shape == (2, 9, 99)
    with torch.no_grad():
        assert model(IDS[:1].to("meta")).logits.shape == (1, 9, 99)


def test_default_dispatch(saved):
    _, folder = saved
    assert AutoModelForCausalLM.from_pretrained(folder).config._experts_implementation == "moe"
    eager = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager")
    assert eager.config._experts_implementation == "eager"
    eager.set_experts_implementation("batched_mm")
    assert eager.model.layers[0].mlp.experts.config._experts_implementation == "batched_mm"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: t.pop("model.layers.2.mlp.experts.3.up_proj.weight"), "no model.layers.2.mlp.experts.3.up_proj"),
        (
            lambda t: [t.pop(f"model.layers.2.mlp.experts.3.{p}_proj.weight") for p in ("gate", "up", "down")],
            "it has no model.layers.2.mlp.experts.3.",
        ),
        (
            lambda t: [t.pop(name) for name in list(t) if "layers.2.mlp.experts" in name],
            "it has no model.layers.2.mlp.experts.0.",
        ),
        (
            lambda t: t.update({"model.layers.2.mlp.experts.3.down_proj.weight": torch.zeros(32, 23)}),
            r"experts.3.down_proj.weight has shape \(32, 23\) where config.json asks for \(32, 24\)",
        ),
        (
            lambda t: t.update({"model.layers.1.self_attn.k_proj.weight": torch.zeros(3, 32)}),
            r"k_proj.weight has shape \(3, 32\) where config.json asks for \(24, 32\)",
        ),
    ],
    ids=["matrix", "expert", "layer", "expert shape", "attention shape"],
)
def test_damage_is_named(saved, damage, message):
    _, folder = saved
    tensors = load_file(folder / "model.safetensors")
    damage(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(ValueError, match=message.replace("model.layers", "layers")):
        AutoModel.from_pretrained(folder)


def test_too_few_experts_in_the_config(saved):
    _, folder = saved
    config = json.loads((folder / "config.json").read_text()) | {"num_experts": 4}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"does not fit its config\.json"):
        AutoModelForCausalLM.from_pretrained(folder)


SHIPPED = {
    "attention.py",
    "attention_catalogue.py",
    "attention_experts.py",
    "attention_moa.py",
    "attention_routed.py",
    "router_block.py",
    "router_kinds.py",
    "router_view.py",
    "attention_moh.py",
    "attention_routing_transformer.py",
    "attention_switch_head.py",
    "router_carried.py",
    "router_balancing.py",
    "router_batch.py",
    "router_capacity.py",
    "checkpoint_damage.py",
    "checkpoint_layout.py",
    "compatibility.py",
    "configuration_fields.py",
    "configuration_moe.py",
    "configuration_checks.py",
    "configuration_derived.py",
    "configuration_inputs.py",
    "configuration_model.py",
    "configuration_presets.py",
    "configuration_unread.py",
    "router_variable_k.py",
    "model_checkpoints.py",
    "model_depth.py",
    "model_embeddings.py",
    "model_experts.py",
    "model_generation.py",
    "model_inputs.py",
    "model_layer.py",
    "model_mlp.py",
    "attention_latent.py",
    "router_losses.py",
    "modeling_moe.py",
    "model_norms.py",
    "model_outputs.py",
    "checkpoint_code.py",
    "model_packing.py",
    "configuration_plans.py",
    "configuration_counts.py",
    "attention_rope.py",
    "router_statistics.py",
    "router_catalogue.py",
    "router.py",
    "router_soft.py",
    "router_topk.py",
    "router_assigned.py",
}


def test_every_file_beside_the_model_is_shipped():
    """`__init__.py` and `__main__.py` are the only other files directly in the package."""
    package = Path(modeling_moe.__file__).parent
    assert {file.name for file in package.glob("*.py")} - {"__init__.py", "__main__.py"} == SHIPPED


def test_code_and_every_auto_class_are_saved(saved):
    _, folder = saved
    assert {file.name for file in folder.glob("*.py")} == SHIPPED
    assert json.loads((folder / "config.json").read_text())["auto_map"] == AUTO_MAP
    models = {model._auto_class: f"modeling_moe.{model.__name__}" for model in MODELS}
    assert {"AutoConfig": "configuration_moe.MoEConfig"} | models == AUTO_MAP


REMOTE = """
import sys, torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
folder, again = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
assert model.config._experts_implementation == "grouped_mm", model.config._experts_implementation
ids = torch.arange(3, 21).view(2, 9)
torch.save(model(ids).logits, folder + "/logits.pt")
decoder = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
assert torch.equal(decoder(ids).last_hidden_state, model.model(ids).last_hidden_state)
AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True, num_labels=3)(ids)
model.train()(ids, labels=ids).loss.backward()
assert model.model.layers[0].mlp.gate.weight.grad.abs().max() > 0
model.save_pretrained(again)
"""


def test_process_without_the_package(saved, tmp_path):
    model, folder = saved
    run_without_package(REMOTE, tmp_path, folder, tmp_path / "again")
    torch.testing.assert_close(torch.load(folder / "logits.pt"), model(IDS).logits)
    assert {file.name for file in (tmp_path / "again").glob("*.py")} == SHIPPED
    with safe_open(tmp_path / "again" / "model.safetensors", "pt") as tensors:
        assert "model.layers.0.mlp.experts.0.gate_proj.weight" in tensors.keys()  # noqa: SIM118
