"""These tests check what a push uploads, and what it refuses before it uploads anything."""

import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from modeling_moe import MoEForCausalLM
from modeling_moe.hub import check_without_package, push, push_folder
from modeling_moe.hub.files import published_files
from modeling_moe.utils.errors import UserError
from tests.builders import tiny_config, train_tokenizer


PRIVATE = (
    "hf_token.txt",
    "id_rsa",
    "secrets.json",
    "core.123",
    ".env",
    "events.out.tfevents.1",
    "*",
    "[a-z].json",
    "train.py.txt",
)


class Hub:
    """Records calls instead of the Hub."""

    def __init__(self, error: Exception | None = None):
        self.calls, self.error = [], error

    def create_repo(self, repo_id, **options):
        self.calls.append(("create", repo_id, options))

    def create_commit(self, repo_id, operations, commit_message):
        if self.error is not None:
            raise self.error
        contents = {}
        for operation in operations:
            with operation.as_file() as file:
                contents[operation.path_in_repo] = file.read()
        self.calls.append(("commit", repo_id, contents))


@pytest.fixture
def hub(monkeypatch):
    hub = Hub()
    monkeypatch.setattr(push, "HfApi", lambda: hub)
    return hub


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    MoEForCausalLM(tiny_config()).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(saved, folder)
    (folder / "checkpoint-3").mkdir()
    (folder / "checkpoint-3" / "optimizer.pt").write_text("big")
    (folder / "training_args.bin").write_text("private")
    return folder


@pytest.fixture
def unchecked(monkeypatch):
    """Skips the process without this package, which takes seconds."""
    monkeypatch.setattr(push, "check_without_package", lambda folder, **options: 0.0)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_push_uploads_the_model_with_code_and_card(hub, folder):
    published = push_folder(folder, "you/moe", private=True, license="mit")
    assert hub.calls[0] == ("create", "you/moe", {"private": True, "exist_ok": True})
    _, repo_id, contents = hub.calls[1]
    assert repo_id == "you/moe"
    assert contents == {name: (folder / name).read_bytes() for name in published.files}
    assert {"README.md", "config.json", "model.safetensors", "modeling_moe.py", "router.py"} <= contents.keys()
    assert published.left_out == ["checkpoint-3/optimizer.pt", "training_args.bin"]
    assert published.files["model.safetensors"] == (folder / "model.safetensors").stat().st_size
    assert 'from_pretrained("you/moe"' in (folder / "README.md").read_text()


def test_nothing_but_the_model_is_uploaded_whatever_lies_beside_it(hub, folder, unchecked):
    """Keys, tokens and event files are not uploaded, not even if a file is called `*`."""
    for name in PRIVATE:
        (folder / name).write_text("secret")
    (folder / "wandb").mkdir()
    (folder / "wandb" / "config.json").write_text("{}")
    (folder / "model-00001-of-00009.safetensors").write_text("of another run")
    (folder / "LICENSE").write_text("the license")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    published = push_folder(folder, "you/moe", license="mit")
    assert {*PRIVATE, "wandb/config.json", "model-00001-of-00009.safetensors"} <= set(published.left_out)
    assert not any(b"secret" in data for data in hub.calls[1][2].values())
    assert {"LICENSE", "chat_template.jinja"} <= hub.calls[1][2].keys()


def test_shards_go_by_the_index(hub, folder, unchecked):
    model = MoEForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="50KB")
    (folder / "model-99999-of-99999.safetensors").write_text("stale")
    shards = set(json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"].values())
    files = push_folder(folder, "you/moe", license="mit").files
    assert len(shards) > 1
    assert {name for name in files if name.endswith(".safetensors")} == shards


def test_pictures_go_up_only_if_the_card_shows_them(hub, folder, unchecked):
    for name in ("loss.png", "other.png", "key.pem"):
        (folder / name).write_text("x")
    (folder.parent / "outside.png").write_text("x")
    (folder / "README.md").write_text("![loss](./loss.png) ![no](key.pem) ![no](../outside.png) <img src='loss.png'>")
    files = push_folder(folder, "you/moe").files
    assert "loss.png" in files
    assert not {"other.png", "key.pem", "../outside.png"} & files.keys()


def test_a_link_that_leads_outside_is_refused(hub, folder, unchecked):
    (folder.parent / "secret").write_text("secret")
    (folder / "LICENSE").symlink_to(folder.parent / "secret")
    with pytest.raises(UserError, match="LICENSE is a link that leads outside the folder"):
        push_folder(folder, "you/moe", license="mit")
    assert hub.calls == []


def test_an_index_does_not_make_a_secret_a_weight(hub, folder, unchecked):
    (folder / "hf_token.txt").write_text("secret")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "hf_token.txt"}}))
    with pytest.raises(UserError, match=r"names hf_token.txt, which is no file of weights"):
        push_folder(folder, "you/moe", license="mit")
    assert hub.calls == []


def test_the_index_of_a_model_is_not_used_for_an_adapter(tmp_path):
    """A file that a model's index names is not uploaded with an adapter."""
    for name in ("adapter_config.json", "adapter_model.safetensors", "secret.safetensors"):
        (tmp_path / name).write_text("{}")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "secret.safetensors"}}))
    files, left_out = published_files(tmp_path)
    assert files == ["adapter_config.json", "adapter_model.safetensors"]
    assert left_out == ["model.safetensors.index.json", "secret.safetensors"]


def test_a_link_to_a_secret_in_the_folder_is_refused(hub, folder, unchecked):
    (folder / "hf_token.txt").write_text("secret")
    (folder / "LICENSE").symlink_to("hf_token.txt")
    with pytest.raises(UserError, match=r"LICENSE is a link to hf_token.txt, which is not published"):
        push_folder(folder, "you/moe", license="mit")
    assert hub.calls == []


def test_hidden_pictures_are_left_out_and_long_cards_are_fast(folder):
    (folder / ".ssh").mkdir()
    (folder / ".ssh" / "key.png").write_text("secret")
    files, _ = published_files(folder, "![a](.ssh/key.png) ![a](./.ssh/key.png)" + "![" * 100_000 + "<img " * 100_000)
    assert "config.json" in files
    assert not [name for name in files if "key.png" in name]


def test_descriptions_go_up_without_the_paths_of_this_machine(hub, folder, unchecked):
    """transformers 4 writes the folders of the model and of the tokenizer's files into these descriptions."""
    config = json.loads((folder / "config.json").read_text()) | {"_name_or_path": "/home/me/secret/model"}
    (folder / "config.json").write_text(json.dumps(config))
    template = "{{ '/home/me' }}"
    described = {"name_or_path": "/home/me/x", "tokenizer_file": "/home/me/tokenizer.json", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    push_folder(folder, "you/moe", license="mit")
    contents = hub.calls[-1][2]
    assert json.loads(contents["config.json"]) == config | {"_name_or_path": "model"}
    assert json.loads(contents["tokenizer_config.json"]) == {
        "name_or_path": "x",
        "tokenizer_file": "tokenizer.json",
        "chat_template": template,
    }


def test_dry_run_uploads_nothing_and_leaves_nothing(hub, folder, unchecked):
    """A dry run leaves no card, whose name the next push would keep."""
    before = snapshot(folder)
    assert "README.md" in push_folder(folder, "you/moe", dry_run=True, license="mit").files
    assert snapshot(folder) == before
    assert hub.calls == []


def test_a_users_own_card_is_kept(hub, folder, unchecked):
    (folder / "README.md").write_text("my own card")
    push_folder(folder, "you/moe")
    assert hub.calls[1][2]["README.md"] == b"my own card"
    assert (folder / "README.md").read_text() == "my own card"


def test_a_card_of_this_package_gets_the_new_name_and_keeps_its_fields(hub, folder, unchecked):
    """A card of this package gets the name of the current push and keeps fields that were given earlier."""
    push_folder(folder, "you/first", license="mit", metrics={"wiki": {"loss": 2.5}})
    push_folder(folder, "you/second")
    text = (folder / "README.md").read_text()
    assert "you/first" not in text
    assert 'from_pretrained("you/second"' in text
    card = ModelCard(text)
    assert card.data.license == "mit"
    assert [result.metric_value for result in card.data.eval_results] == [2.5]


def test_an_edited_card_is_kept(hub, folder, unchecked):
    push_folder(folder, "you/first", license="mit")
    edited = (folder / "README.md").read_text().replace("## Limits", "## What I found\n\nIt is good.\n\n## Limits")
    (folder / "README.md").write_text(edited)
    push_folder(folder, "you/second")
    assert (folder / "README.md").read_text() == edited


def test_a_missing_license_is_asked_for(hub, folder, unchecked):
    """A license that is recorded nowhere is asked for, and no default is published."""
    with pytest.raises(UserError, match="pass --license"):
        push_folder(folder, "you/moe")
    assert hub.calls == []
    push_folder(folder, "you/moe", license="llama3.2")
    card = ModelCard.load(folder / "README.md")
    assert card.data.license == "llama3.2"
    assert card.data.language is None


def test_license_lineage_data_and_losses_come_from_the_records(hub, folder, unchecked, monkeypatch):
    """The card shows license, lineage, data and losses from the records beside the model."""
    lineage = {"base_model": "owner/dense", "license": "gemma", "language": "de"}
    recipe = {"sources": [{"name": "dense"}], "options": {"method": "drop", "num_experts": 5}, "lineage": lineage}
    (folder / "conversion.json").write_text(json.dumps({"modeling_moe_version": "0.2.0", "recipe": recipe}))
    trained = {
        "base_model": "/home/me/moe",
        "method": "lora",
        "data": {"wiki": "/home/me/wiki.txt"},
        "steps": 40,
        "tokens": 20480,
        "learning_rate": 1e-4,
        "seed": 3,
        "eval_loss": {"wiki": 2.25},
        "modeling_moe_version": "0.2.0",
    }
    (folder / "finetuning.json").write_text(json.dumps(trained))
    push_folder(folder, "you/moe")
    card = ModelCard.load(folder / "README.md")
    assert (card.data.base_model, card.data.license, card.data.language) == (["owner/dense"], "gemma", "de")
    assert [(r.dataset_name, r.metric_type, r.metric_value) for r in card.data.eval_results] == [
        ("wiki", "loss", 2.25)
    ]
    for row in (
        "| Method | drop |",
        "| Experts | 5 |",
        "| Steps | 40 |",
        "| wiki | wiki.txt |",
        "| Seed | 3 |",
    ):
        assert row in card.text
    assert not any(b"/home/me" in data for data in hub.calls[1][2].values())


def test_scores_of_eval_lm_come_to_the_card(hub, folder, unchecked):
    scores = {"wiki": {"loss": 2.0, "perplexity": 7.389, "bits_per_byte": 0.9, "tokens": 10, "expert_share": [0.5]}}
    push_folder(folder, "you/moe", license="mit", metrics=scores)
    assert "| wiki | 2.000 | 7.389 | 0.900 |" in (folder / "README.md").read_text()


def test_a_chat_model_gets_a_chat_example(hub, folder, unchecked):
    train_tokenizer().save_pretrained(folder)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    push_folder(folder, "you/moe", license="mit")
    assert "tokenizer.apply_chat_template(messages, add_generation_prompt=True" in (folder / "README.md").read_text()


@pytest.mark.parametrize("error", [OSError("no network"), RuntimeError("of another library"), ValueError("401")])
def test_a_failed_upload_is_one_line_and_leaves_the_folder_as_it_was(hub, folder, unchecked, error):
    before, hub.error = snapshot(folder), error
    with pytest.raises(UserError, match=f"the upload to you/moe failed, and the folder is as it was: {error}"):
        push_folder(folder, "you/moe", license="mit")
    assert snapshot(folder) == before


NAMES = ["", "noslash", "a/b/c", "../x", "a b/c", "-a/b", "a/b--c", 'a/"b', "a/b\n", "a/<b>", "a/'b", "a/" + "b" * 100]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dry_run", [True, False])
def test_a_wrong_repo_id_is_refused_in_a_dry_run_too(hub, folder, name, dry_run):
    with pytest.raises(UserError, match="is no name on the Hub"):
        push_folder(folder, name, dry_run=dry_run, license="mit")
    assert hub.calls == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(hub, folder, value):
    """A dry run finds weights that are not finite."""
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"model\.norm\.weight holds numbers that are not finite"):
        push_folder(folder, "you/moe", dry_run=True, license="mit")


def test_a_missing_norm_is_refused_by_name(hub, folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"it has no model\.norm\.weight"):
        push_folder(folder, "you/moe", dry_run=True, license="mit")


def mixtral(folder: Path) -> Path:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = MixtralConfig(vocab_size=64, num_key_value_heads=2, num_local_experts=4, **sizes)
    MixtralForCausalLM(config).save_pretrained(folder)
    return folder


def test_an_export_can_be_published(hub, tmp_path):
    """A card can be made for a model in the format of another family."""
    folder = mixtral(tmp_path / "mixtral")
    files = push_folder(folder, "you/mixtral", license="mit").files
    assert set(files) == {"README.md", "config.json", "generation_config.json", "model.safetensors"}
    text = (folder / "README.md").read_text()
    assert "in the format `mixtral`" in text
    assert "trust_remote_code" not in text
    assert "import modeling_moe" not in text
    assert "| Routed experts | 4 of width 32 |" in text


def test_an_adapter_can_be_published_if_its_base_is_on_the_hub(hub, tmp_path):
    """An adapter needs a base model on the Hub, and the local path of the base model is not uploaded."""
    base, folder = mixtral(tmp_path / "mixtral"), tmp_path / "adapter"
    adapted = get_peft_model(MixtralForCausalLM.from_pretrained(base), LoraConfig(r=4, target_modules=["q_proj"]))
    adapted.save_pretrained(folder)
    assert "Model Card for Model ID" in (folder / "README.md").read_text()
    with pytest.raises(
        UserError, match=r"pass --license.*; the adapter's base model .*: pass --base_model owner/name"
    ):
        push_folder(folder, "you/adapter")
    with pytest.raises(UserError, match="pass --base_model owner/name"):
        push_folder(folder, "you/adapter", license="mit")
    push_folder(folder, "you/adapter", license="mit", base_model="owner/base")
    contents = hub.calls[1][2]
    assert set(contents) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert json.loads(contents["adapter_config.json"])["base_model_name_or_path"] == "owner/base"
    card = ModelCard(contents["README.md"].decode())
    assert (card.data.base_model, card.data.library_name) == (["owner/base"], "peft")
    assert "Model Card for Model ID" not in card.text
    assert not any(str(tmp_path).encode() in data for data in contents.values())


def test_a_model_and_an_adapter_in_one_folder_are_refused(hub, folder):
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="holds a model and an adapter"):
        push_folder(folder, "you/moe", license="mit")


def test_the_pictures_of_a_report_go_up_with_the_card(hub, folder, tmp_path, unchecked):
    report = tmp_path / "report"
    report.mkdir()
    with pytest.raises(UserError, match=r"holds no routing_load\.png: make it with moe report --output_dir"):
        push_folder(folder, "you/moe", license="mit", report=report)
    for name in ("routing_load.png", "routing_specialisation.png", "paths.png"):
        (report / name).write_bytes(name.encode())
    before = snapshot(folder)
    dry = push_folder(folder, "you/moe", license="mit", report=report, dry_run=True)
    assert snapshot(folder) == before
    published = push_folder(folder, "you/moe", license="mit", report=report)
    assert published.files == dry.files
    contents = hub.calls[1][2]
    assert contents["assets/routing_load.png"] == b"routing_load.png"
    assert "assets/paths.png" not in contents
    assert contents["README.md"].decode().count("](assets/routing_") == 2
    assert contents == {name: (folder / name).read_bytes() for name in published.files}
    again = push_folder(folder, "you/moe", license="mit", dry_run=True)
    assert again.files == published.files
    (folder / "README.md").write_text("# Mine")
    with pytest.raises(UserError, match="is your own card, to which no picture is added: omit report"):
        push_folder(folder, "you/moe", license="mit", report=report)


def test_both_ways_of_loading_agree(folder):
    assert check_without_package(folder) == 0


def test_missing_code_is_refused(hub, folder):
    (folder / "router.py").unlink()
    with pytest.raises(UserError, match="does not load without this package"):
        push_folder(folder, "you/moe", license="mit")
    assert hub.calls == []


def test_other_code_is_refused(hub, folder):
    code = (folder / "router.py").read_text()
    (folder / "router.py").write_text(
        code.replace("weight = weight * self.scaling", "weight = 2 * weight * self.scaling")
    )
    with pytest.raises(UserError, match="computes something else by its own code"):
        push_folder(folder, "you/moe", license="mit", trust_remote_code=True)
    assert hub.calls == []


@pytest.mark.slow
def test_code_that_decodes_without_its_cache_is_refused(hub, folder):
    """Code from before 0.2.0 computes whole texts correctly on transformers 5.24, but `generate` is wrong."""
    code = (folder / "attention.py").read_text()
    (folder / "attention.py").write_text(code.replace("if cache is not None:", "if cache is not None and False:"))
    with pytest.raises(UserError, match="computes something else by its own code"):
        push_folder(folder, "you/moe", license="mit", trust_remote_code=True)
    assert hub.calls == []


def test_script_checks_and_lists(folder, unchecked, monkeypatch, capsys):
    flags = ["--model_name_or_path", str(folder), "--repo_id", "you/moe", "--dry_run", "true", "--license", "mit"]
    monkeypatch.setattr(sys, "argv", ["push_to_hub.py", *flags])
    runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "push_to_hub.py"), run_name="__main__")
    assert "modeling_moe.py" in capsys.readouterr().out


def test_a_trusted_model_of_its_authors_own_code_can_be_published(hub, tmp_path):
    """With --trust_remote_code, the card reads the configuration by the code that the folder brings."""
    folder = tmp_path / "own"
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    LlamaForCausalLM(LlamaConfig(num_attention_heads=2, **sizes)).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    code = {"AutoConfig": "own_llama.OwnConfig", "AutoModelForCausalLM": "own_llama.OwnModel"}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "own_llama", "auto_map": code}))
    (folder / "own_llama.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own_llama'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    with pytest.raises(UserError, match="--trust_remote_code true"):
        push_folder(folder, "you/own", license="mit")
    published = push_folder(folder, "you/own", license="mit", trust_remote_code=True)
    assert "own_llama.py" in published.files


def test_damaged_weights_are_refused(hub, folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.2.mlp.experts.1.down_proj.weight"] = torch.zeros(3, 3)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"does not fit its config\.json"):
        push_folder(folder, "you/moe", license="mit")
    assert hub.calls == []
