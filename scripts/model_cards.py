#!/usr/bin/env python
"""Write the model cards that the project keeps: the demo's, and one of a tiny model of each shipped configuration.

    python scripts/model_cards.py
    python scripts/model_cards.py --demo_dir outputs/demo

Each tiny model is made with a fixed seed and saved in a temporary folder, from which its card is written. The demo's card is
written from the records of a run, which lie beside the card; --demo_dir replaces them by those of a new run.
"""

import json
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from demo_report import STAGES, read_scores, write_demo_card
from demo_report import Arguments as DemoArguments

from modeling_moe import MoEConfig, MoEForCausalLM
from modeling_moe.hub import take_pictures, write_model_card
from modeling_moe.hub.pictures import ASSETS
from modeling_moe.hub.wording import without_paths
from modeling_moe.utils.command_line import parse, run
from modeling_moe.utils.json_files import read_json, write_json
from modeling_moe.utils.lineage import CONVERSION, FINETUNING
from modeling_moe.utils.presets import presets


ROOT = Path(__file__).resolve().parents[1]
CARDS = ROOT / "model_cards"
SEED = 0
# sizes that replace those of a configuration; all other fields stay
SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
SMALLER_SIZES = {
    "num_experts": 8,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "head_dim": 8,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
# files of a run of the demo from which its card can be written again
DEMO_RECORDS = ("config.json", CONVERSION, FINETUNING, "tokenizer_config.json", "chat_template.jinja")
DEMO_FACTS = DemoArguments(
    model_dir="outputs/demo/model",
    scores_dir="outputs/demo",
    base_model="HuggingFaceTB/SmolLM2-135M-Instruct",
    license="apache-2.0",
    language=["en", "code"],
    data_license="PSF-2.0",
)


@dataclass
class Arguments:
    """These arguments say where the cards are written."""

    output_dir: str = field(default=str(CARDS), metadata={"help": "folder of the cards"})
    demo_dir: str | None = field(default=None, metadata={"help": "result of scripts/demo.sh, for new records"})


def tiny_config(values: dict[str, Any]) -> MoEConfig:
    """Returns a configuration of two layers with the fields of another one, and sizes that fit on one line of text.

    Args:
        values: fields of a configuration, as in its JSON file.
    """
    smaller = {name: min(values[name], size) for name, size in SMALLER_SIZES.items() if values.get(name) is not None}
    tokens = {name: token for name, token in TOKENS.items() if name in values}
    heads = values.get("num_key_value_heads", values["num_attention_heads"]) / values["num_attention_heads"]
    sizes: dict[str, Any] = (
        SIZES | smaller | tokens | {"num_key_value_heads": max(1, round(SIZES["num_attention_heads"] * heads))}
    )
    if "mlp_layer_types" in values:
        # one layer of each kind, in the order of the configuration
        kinds = list(dict.fromkeys(values["mlp_layer_types"]))
        sizes["mlp_layer_types"] = (kinds * SIZES["num_hidden_layers"])[: SIZES["num_hidden_layers"]]
    if (rope := values.get("rope_parameters", {})).get("original_max_position_embeddings"):
        sizes["rope_parameters"] = rope | {"original_max_position_embeddings": 16, "factor": 4}
    return MoEConfig(**{name: value for name, value in (values | sizes).items() if name != "model_type"})


def write_tiny_card(name: str, file: Path, output_dir: Path) -> Path:
    """Makes the tiny model of a shipped configuration, and writes its card as `tiny/NAME.md`."""
    torch.manual_seed(SEED)
    model = MoEForCausalLM(tiny_config(json.loads(file.read_text(encoding="utf-8"))))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / f"tiny_{name}"
        model.save_pretrained(folder)
        card = write_model_card(
            folder,
            license="apache-2.0",
            description=f"The weights are random, so the model writes nonsense: it has the structure of the configuration "
            f"{name} of modeling_moe, with two layers and sizes that make a test fast.",
            intended_use="Tests of code that loads, trains, converts or serves a Mixture of Experts.",
        )
    written = output_dir / "tiny" / f"{name}.md"
    written.parent.mkdir(parents=True, exist_ok=True)
    written.write_text(card.content, encoding="utf-8")
    return written


def keep_demo_records(demo_dir: Path, kept: Path) -> None:
    """Copies what a card is made of from a run of the demo, without paths of this machine."""
    records = kept / "records"
    records.mkdir(parents=True, exist_ok=True)
    for name in DEMO_RECORDS:
        if name.endswith(".json"):
            write_json(records / name, without_paths(read_json(demo_dir / "model" / name)))
        else:
            shutil.copyfile(demo_dir / "model" / name, records / name)
    for stage in STAGES:
        shutil.copyfile(demo_dir / f"{stage}.json", records / f"{stage}.json")
    take_pictures(demo_dir / "report", kept)


def write_demo_card_from(kept: Path, output_dir: Path) -> Path:
    """Writes the demo's card as `demo/README.md` from the records that lie in a folder `demo`."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        shutil.copytree(kept / "records", folder)
        shutil.copytree(kept / ASSETS, folder / ASSETS)
        # the card says that a model has code if this file is there
        shutil.copyfile(ROOT / "modeling_moe" / "modeling_moe.py", folder / "modeling_moe.py")
        card = write_demo_card(DEMO_FACTS, read_scores(kept / "records"), folder)
    written = output_dir / "demo" / "README.md"
    written.parent.mkdir(parents=True, exist_ok=True)
    written.write_text(card.content, encoding="utf-8")
    return written


def main() -> None:
    """Writes all cards and prints their names."""
    (args,) = parse([Arguments], __doc__)
    output_dir = Path(args.output_dir)
    if args.demo_dir is not None:
        keep_demo_records(Path(args.demo_dir), CARDS / "demo")
    for name, file in presets().items():
        print(write_tiny_card(name, file, output_dir))
    print(write_demo_card_from(CARDS / "demo", output_dir))


if __name__ == "__main__":
    run(main)
