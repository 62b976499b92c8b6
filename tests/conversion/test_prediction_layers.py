"""Layers that predict further tokens survive a conversion and come back, under their own names, in their own family."""

import json
import logging
import os
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, modeling_layers
from transformers.models.deepseek_v3 import DeepseekV3Config
from transformers.models.glm4_moe import Glm4MoeConfig
from transformers.models.qwen3_moe import Qwen3MoeConfig

from modeling_moe.checkpoints import check_hashes
from modeling_moe.commands import convert as command
from modeling_moe.conversion import convert_checkpoint, open_checkpoint, plan_conversion, prediction_layers, saving
from modeling_moe.hub.files import published_files
from modeling_moe.lora.merging import MergeArguments, merge_adapter
from modeling_moe.resizing import GrowthOptions, PruningOptions, ResizeOptions, resize_checkpoint
from modeling_moe.utils.errors import UserError
from modeling_moe.utils.prediction_files import prediction_files, warn_of_left_out
from tests import builders


SIZE = builders.SIZE | {"num_hidden_layers": 2}
LATENT = SIZE | {
    "num_key_value_heads": 4,
    "kv_lora_rank": 10,
    "q_lora_rank": 7,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 8,
    "v_head_dim": 5,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
}
IDS = torch.arange(3, 15)[None]


@pytest.fixture
def warnings(caplog):
    """Collects the warnings of transformers and of this package, which do not reach the root logger."""
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    ours = logging.getLogger("modeling_moe")
    ours.addHandler(caplog.handler)
    yield lambda: "\n".join(record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING)
    logger.removeHandler(caplog.handler)
    ours.removeHandler(caplog.handler)


def qwen_source(folder, named: bool = True) -> dict[str, torch.Tensor]:
    """Saves a Qwen3-MoE with prediction layers under `mtp.`, or under the numbers after the model's own; returns them."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        **SIZE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, mtp_layer_types=["full_attention"]
    )
    config.num_nextn_predict_layers = 1
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return add_layer(folder, "mtp.layers.0." if named else "model.layers.2.")


def deepseek_source(folder) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(DeepseekV3Config(**LATENT, num_mtp_layers=1)).save_pretrained(folder)
    return add_layer(folder, "model.layers.2.")


def add_layer(folder, prefix: str) -> dict[str, torch.Tensor]:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    last = {name: tensor for name, tensor in tensors.items() if name.startswith("model.layers.1.")}
    layer = {name.replace("model.layers.1.", prefix): torch.randn_like(tensor) for name, tensor in last.items()}
    layer |= {f"{prefix}eh_proj.weight": torch.randn(32, 64), f"{prefix}enorm.weight": torch.randn(32)}
    save_file(tensors | layer, file, metadata={"format": "pt"})
    return layer


def tensors_of(folder, pattern: str = "*.safetensors") -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob(pattern) for name, tensor in load_file(file).items()}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("max_shard_size", ["5GB", "8KB"])
@pytest.mark.parametrize("named", [True, False])
def test_round_trip(named, max_shard_size, tmp_path, monkeypatch):
    layer = qwen_source(tmp_path / "source", named)
    write = saving.write_checkpoint

    def small(output_dir, state, recipe, finish, overwrite, _, **more):
        write(output_dir, state, recipe, finish, overwrite, max_shard_size, **more)

    monkeypatch.setattr(saving, "write_checkpoint", small)
    convert_checkpoint(str(tmp_path / "source"), tmp_path / "moe")
    assert_equal(tensors_of(tmp_path / "moe", "mtp*.safetensors"), layer)
    assert (len(prediction_files(tmp_path / "moe")) > 1) == (max_shard_size == "8KB")
    index = json.loads((tmp_path / "moe" / "model.safetensors.index.json").read_text())["weight_map"]
    assert not set(index) & set(layer)
    convert_checkpoint(str(tmp_path / "moe"), tmp_path / "back", target="qwen3_moe")
    assert_equal(tensors_of(tmp_path / "back"), tensors_of(tmp_path / "source"))
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("source", "back"))
    fields = ("num_nextn_predict_layers", "mtp_layer_types")
    assert [after[name] for name in fields] == [before[name] for name in fields] == [1, ["full_attention"]]
    assert not list((tmp_path / "back").glob("mtp*"))


def test_deepseek_keeps_its_layer_and_its_count(tmp_path, monkeypatch):
    layer = deepseek_source(tmp_path / "source")
    convert_checkpoint(str(tmp_path / "source"), tmp_path / "moe")
    checkpoint = open_checkpoint(str(tmp_path / "moe"))
    assert checkpoint.prediction is not None
    assert (checkpoint.prediction.model_type, checkpoint.prediction.fields["num_nextn_predict_layers"]) == (
        "deepseek_v3",
        1,
    )
    assert_equal({name: tensor.read() for name, tensor in checkpoint.prediction.state.items()}, layer)
    restored, tensors = prediction_layers.restored(
        AutoConfig.for_model("deepseek_v3", num_mtp_layers=3), checkpoint.prediction
    )
    assert (restored.num_mtp_layers, set(tensors)) == (1, set(layer))
    bare, tensors = prediction_layers.restored(AutoConfig.for_model("deepseek_v3"), None)
    assert (bare.num_mtp_layers, tensors) == (0, {})


GLM4 = SIZE | {
    "num_key_value_heads": 2,
    "head_dim": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
}


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize(
    "config", [DeepseekV3Config(**LATENT), Glm4MoeConfig(**GLM4)], ids=["deepseek_v3", "glm4_moe"]
)
def test_numbered_layers_come_back_in_the_target_of_their_family(config, count, dtype, tmp_path):
    """The target reorders rotated rows and adds parts to the model's own layers, and leaves the further layers as they are."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "source")
    layers: dict[str, torch.Tensor] = {}
    for further in range(count):
        layers |= add_layer(tmp_path / "source", f"model.layers.{2 + further}.")
    file = tmp_path / "source" / "config.json"
    values = json.loads(file.read_text())
    (key,) = {"num_nextn_predict_layers", "num_mtp_layers"} & set(values)
    file.write_text(json.dumps(values | {key: count}))
    convert_checkpoint(str(tmp_path / "source"), tmp_path / "moe")
    target = config.model_type
    convert_checkpoint(str(tmp_path / "moe"), tmp_path / "back", target, dtype=dtype)
    source, back = tensors_of(tmp_path / "source"), tensors_of(tmp_path / "back")
    if dtype == "auto":
        assert_equal(back, source)
    else:
        assert back.keys() == source.keys()
        assert_equal({name: back[name] for name in layers}, {name: t.to(torch.bfloat16) for name, t in layers.items()})
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    assert written[key] == count
    assert not list((tmp_path / "back").glob("mtp*"))
    # a second time through this package changes nothing either
    convert_checkpoint(str(tmp_path / "back"), tmp_path / "moe2")
    again, first = tensors_of(tmp_path / "moe2", "mtp*.safetensors"), tensors_of(tmp_path / "moe", "mtp*.safetensors")
    assert again.keys() == first.keys() == layers.keys()


def test_an_export_without_further_layers_says_so(tmp_path):
    AutoModelForCausalLM.from_config(Glm4MoeConfig(**GLM4)).save_pretrained(tmp_path / "source")
    file = tmp_path / "source" / "config.json"
    values = json.loads(file.read_text())
    (key,) = {"num_nextn_predict_layers", "num_mtp_layers"} & set(values)
    convert_checkpoint(str(tmp_path / "source"), tmp_path / "moe")
    convert_checkpoint(str(tmp_path / "moe"), tmp_path / "back", "glm4_moe")
    assert json.loads((tmp_path / "back" / "config.json").read_text())[key] == 0


def test_the_result_loads_without_a_warning(tmp_path, warnings):
    qwen_source(tmp_path / "source")
    convert_checkpoint(str(tmp_path / "source"), tmp_path / "moe")
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "source")(IDS).logits
    assert (
        "UNEXPECTED" in warnings()
    )  # transformers names the layers of the source, so the fixture would see a warning
    before = warnings()
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "moe", output_loading_info=True)
    _, base = AutoModel.from_pretrained(tmp_path / "moe", output_loading_info=True)
    assert not info["unexpected_keys"]
    assert not base["unexpected_keys"] - {"lm_head.weight"}
    assert "mtp" not in warnings().removeprefix(before)
    torch.testing.assert_close(model(IDS).logits, expected, atol=1e-5, rtol=1e-5)
    files, left_out = published_files(tmp_path / "moe")
    assert {"mtp.safetensors", "model.safetensors", "model.safetensors.index.json"} <= set(files)
    assert left_out == ["SHA256SUMS"]
    assert "mtp.safetensors" in check_hashes(tmp_path / "moe", progress=False)


def test_the_result_loads_where_this_package_is_not_installed(tmp_path):
    qwen_source(tmp_path / "source")
    convert_checkpoint(str(tmp_path / "source"), tmp_path / "moe")
    script = f"""
import sys
sys.modules["modeling_moe"] = None
from transformers import AutoModelForCausalLM
_, info = AutoModelForCausalLM.from_pretrained({str(tmp_path / "moe")!r}, trust_remote_code=True, output_loading_info=True)
assert not info["unexpected_keys"] and not info["missing_keys"], info
"""
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    arguments = [sys.executable, "-P", "-c", script]
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert "UNEXPECTED" not in done.stderr


def test_another_family_drops_them_with_one_sentence(tmp_path, warnings, capsys):
    qwen_source(tmp_path / "source")
    convert_checkpoint(str(tmp_path / "source"), tmp_path / "moe")
    (note,) = open_checkpoint(str(tmp_path / "moe")).notes("olmoe")
    assert note.startswith("The layers that predict further tokens (")
    assert note.endswith("are left out: target olmoe cannot hold them; moe and qwen3_moe can.")
    assert plan_conversion(str(tmp_path / "moe"), "qwen3_moe").notes == []
    record = tmp_path / "moe" / "conversion.json"
    values = json.loads(record.read_text())
    values["recipe"]["prediction_layers"]["model_type"] = "glm4_moe"
    record.write_text(json.dumps(values))
    arguments = ["--model_name_or_path", str(tmp_path / "moe"), "--output_dir", str(tmp_path / "back")]
    command.main([*arguments, "--target", "qwen3_moe", "--dry_run", "true"])
    assert "cannot hold them; moe and glm4_moe can" in " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert not (tmp_path / "back").exists()
    (tmp_path / "moe" / "SHA256SUMS").unlink()
    convert_checkpoint(str(tmp_path / "moe"), tmp_path / "back", target="qwen3_moe")
    assert "target qwen3_moe cannot hold them; moe and glm4_moe can" in warnings()
    assert not [name for name in tensors_of(tmp_path / "back") if "mtp" in name]


def test_a_changed_model_drops_them_with_one_sentence(tmp_path, warnings):
    qwen_source(tmp_path / "source")
    convert_checkpoint(str(tmp_path / "source"), tmp_path / "moe")
    resize_checkpoint(str(tmp_path / "moe"), tmp_path / "grown", ResizeOptions(), GrowthOptions(), PruningOptions())
    assert "are left out: they were trained for the unchanged weights" in warnings()
    assert not prediction_files(tmp_path / "grown")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    get_peft_model(model, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    merge_adapter(MergeArguments(str(tmp_path / "adapter"), str(tmp_path / "merged"), str(tmp_path / "moe")))
    assert "The merged model gets no layers that predict further tokens" in warnings()
    assert not prediction_files(tmp_path / "merged")


def test_another_dtype_casts_them(tmp_path):
    layer = qwen_source(tmp_path / "source")
    convert_checkpoint(str(tmp_path / "source"), tmp_path / "moe", dtype="bfloat16")
    cast = {name: tensor.to(torch.bfloat16) for name, tensor in layer.items()}
    assert_equal(tensors_of(tmp_path / "moe", "mtp*.safetensors"), cast)


@pytest.mark.parametrize("count", [0, 1])
def test_layers_that_config_json_does_not_announce_are_refused(count, tmp_path):
    qwen_source(tmp_path / "source", named=False)
    if count:
        add_layer(tmp_path / "source", "model.layers.3.")
    file = tmp_path / "source" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_nextn_predict_layers": count}))
    with pytest.raises(
        UserError, match=rf"a tensor model\.layers\.{2 + count}\..* that its config.json does not account"
    ):
        open_checkpoint(str(tmp_path / "source"))


def whole_layer(folder, config) -> None:
    """Saves a model with weights that decide its tokens, and one layer that predicts a further token, as its family names it."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    add_layer(folder, "model.layers.2.")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    more = {name: torch.ones(32) for name in ("hnorm.weight", "shared_head.norm.weight")}
    more |= {
        "embed_tokens.weight": tensors["model.embed_tokens.weight"].clone(),
        "shared_head.head.weight": tensors["lm_head.weight"].clone(),
    }
    save_file(tensors | {f"model.layers.2.{name}": value for name, value in more.items()}, file, {"format": "pt"})


GLM = SIZE | {"head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
GLM |= {"moe_intermediate_size": 16, "first_k_dense_replace": 1}


@pytest.mark.skipif(
    not hasattr(modeling_layers, "MtpModel"), reason="this version of transformers drafts with no such layer"
)
@pytest.mark.parametrize("kind", ["deepseek_v3", "glm4_moe"])
def test_transformers_drafts_with_the_layers_that_came_back(kind, tmp_path, monkeypatch):
    config = AutoConfig.for_model(kind, **(LATENT if kind == "deepseek_v3" else GLM), num_mtp_layers=1)
    whole_layer(tmp_path / "source", config)
    # transformers finds the layers by the numbers that the published models have
    names = "_keys_to_ignore_on_load_unexpected"
    monkeypatch.setattr(type(AutoModelForCausalLM.from_config(config)), names, [r"model\.layers\.2.*"])
    convert_checkpoint(str(tmp_path / "source"), tmp_path / "moe")
    convert_checkpoint(str(tmp_path / "moe"), tmp_path / "half", dtype="bfloat16")
    convert_checkpoint(str(tmp_path / "moe"), tmp_path / "back", target=kind)
    convert_checkpoint(str(tmp_path / "half"), tmp_path / "half_back", target=kind)
    assert_equal(tensors_of(tmp_path / "back"), tensors_of(tmp_path / "source"))
    drafted = []
    forward = modeling_layers.MtpModel.forward
    monkeypatch.setattr(
        modeling_layers.MtpModel,
        "forward",
        lambda *args, **more: drafted.append(forward(*args, **more)) or drafted[-1],
    )
    seen = {}
    for name in ("source", "back", "half_back"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32).eval()
        options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
        plain = model.generate(IDS, **options)
        drafted.clear()
        assert torch.equal(model.generate(IDS, **options, use_mtp=True), plain)
        seen[name] = [draft[0] for draft in drafted]
        assert seen[name]
    assert [ids.tolist() for ids in seen["back"]] == [ids.tolist() for ids in seen["source"]]


def test_a_lost_file_is_refused(tmp_path):
    qwen_source(tmp_path / "source")
    convert_checkpoint(str(tmp_path / "source"), tmp_path / "moe")
    (tmp_path / "moe" / "mtp.safetensors").unlink()
    with pytest.raises(UserError, match=r"lacks mtp\*.safetensors, which its conversion.json tells of: download it"):
        convert_checkpoint(str(tmp_path / "moe"), tmp_path / "back", target="qwen3_moe")
    AutoModelForCausalLM.from_pretrained(tmp_path / "moe")


def test_a_merged_model_of_transformers_announces_no_layer_that_it_lacks(tmp_path, warnings):
    """transformers drops the layers and keeps their number, and servers then look for the tensors."""
    deepseek_source(tmp_path / "source")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "source")
    get_peft_model(model, LoraConfig(target_modules=["o_proj"])).save_pretrained(tmp_path / "adapter")
    merge_adapter(MergeArguments(str(tmp_path / "adapter"), str(tmp_path / "merged")))
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["num_nextn_predict_layers"] == 0
    assert "The merged model gets no layers that predict further tokens" in warnings()


def test_a_model_on_the_hub_tells_of_its_layers_by_its_record(tmp_path, warnings, monkeypatch):
    repository = tmp_path / "models--owner--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0a1b")
    (repository / "snapshots" / "0a1b").mkdir(parents=True)
    record = {"modeling_moe_version": "1", "recipe": {"prediction_layers": {"model_type": "glm4_moe", "fields": {}}}}
    (repository / "snapshots" / "0a1b" / "conversion.json").write_text(json.dumps(record))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    warn_of_left_out("owner/other", "The merged model")
    assert not warnings()
    warn_of_left_out("owner/model", "The merged model")
    assert "The merged model gets no layers that predict further tokens, as owner/model has them" in warnings()


def damage_record(folder, **entry) -> None:
    file = folder / "conversion.json"
    values = json.loads(file.read_text())
    values["recipe"]["prediction_layers"] = entry
    file.write_text(json.dumps(values))


@pytest.mark.parametrize(
    "entry", [{"fields": {"hidden_size": 1}}, {"fields": [], "model_type": "x"}, {"model_type": 3}]
)
def test_a_damaged_record_is_refused(entry, tmp_path):
    qwen_source(tmp_path / "source")
    convert_checkpoint(str(tmp_path / "source"), tmp_path / "moe")
    damage_record(tmp_path / "moe", **entry)
    with pytest.raises(UserError, match=r"conversion.json is damaged: its prediction_layers"):
        open_checkpoint(str(tmp_path / "moe"))


def test_a_missing_file_is_refused(tmp_path):
    (tmp_path / "mtp-00001-of-00002.safetensors").touch()
    with pytest.raises(UserError, match="1 files mtp"):
        prediction_files(tmp_path)


KILLED = """
import os, signal, sys
from pathlib import Path

from modeling_moe.checkpoints import writer
from modeling_moe.conversion import convert_checkpoint, saving

root, write_shard, write, written = Path(sys.argv[1]), writer._write_shard, saving.write_checkpoint, []


def counted(kill, file, shard, advance):
    if kill and written and written[-1].startswith("mtp-"):
        os.kill(os.getpid(), signal.SIGKILL)
    written.append(file.name)
    return write_shard(file, shard, advance)


def small(output_dir, state, recipe, finish, overwrite, _, **more):
    write(output_dir, state, recipe, finish, overwrite, "8KB", **more)


def convert(name, kill):
    writer._write_shard = lambda *arguments: counted(kill, *arguments)
    convert_checkpoint(str(root / "source"), root / name)


saving.write_checkpoint = small
child = os.fork()
if not child:
    convert("moe", True)
    os._exit(0)
assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
convert("moe", False)
assert written and all(name.startswith("mtp-") for name in written), written
convert("whole", False)
"""


def test_a_killed_conversion_goes_on_in_the_middle_of_the_prediction_layers(tmp_path):
    """The run is killed after the first of the files that hold the layers; the next run keeps all complete files."""
    qwen_source(tmp_path / "source")
    arguments = [sys.executable, "-c", KILLED, str(tmp_path)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    contents = [
        {file.name: file.read_bytes() for file in (tmp_path / name).iterdir() if file.is_file()}
        for name in ("moe", "whole")
    ]
    assert contents[0] == contents[1]
