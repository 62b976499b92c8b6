#!/usr/bin/env python
"""Compare the scores of the dense, the upcycled and the trained model of the demo in a table and in the model card.

    python scripts/demo_report.py --model_dir outputs/demo/model --scores_dir outputs/demo --report_dir outputs/demo/report \\
        --base_model HuggingFaceTB/SmolLM2-135M-Instruct --license apache-2.0 --language en code --data_license PSF-2.0

The script reads dense.json, before.json and after.json, which scripts/eval_lm.py wrote, and takes the pictures of the routing
from the folder that scripts/router_report.py wrote.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import ModelCard
from rich.console import Console
from rich.table import Table

from modeling_moe.hub import take_pictures, write_model_card
from modeling_moe.utils.command_line import parse, run
from modeling_moe.utils.errors import UserError
from modeling_moe.utils.json_files import read_json
from modeling_moe.utils.lineage import FINETUNING


STAGES = ("dense", "before", "after")
# largest difference between the losses of the dense and the upcycled model
TOLERANCE = 1e-3
INTENDED_USE = (
    "Showing on a small computer how a dense model becomes a Mixture of Experts and is trained. It is too small, and trained "
    "too briefly, for other uses."
)


@dataclass
class Arguments:
    """These arguments name the parts of the demo."""

    model_dir: str = field(metadata={"help": "folder of the trained model"})
    scores_dir: str = field(metadata={"help": "folder with dense.json, before.json and after.json"})
    base_model: str = field(metadata={"help": "name of the dense model, for the card"})
    report_dir: str | None = field(default=None, metadata={"help": "folder of the report on the routing"})
    license: str | None = field(default=None, metadata={"help": "license of the dense model, for the card"})
    language: list[str] | None = field(default=None, metadata={"help": "languages of the model, for the card"})
    data_license: str | None = field(default=None, metadata={"help": "license of the training data, for the card"})


def scores_table(scores: dict[str, dict]) -> Table:
    """Returns a table with one row for each domain and stage."""
    table = Table("domain", "model", "loss", "perplexity", "bits per byte", "% of tokens per expert")
    names = {"dense": "dense", "before": "upcycled", "after": "fine-tuned"}
    for domain in scores["after"]:
        for stage in STAGES:
            score = scores[stage][domain]
            share = " ".join(f"{100 * part:.0f}" for part in score["expert_share"] or [])
            row = [f"{score['loss']:.4f}", f"{score['perplexity']:.2f}", f"{score['bits_per_byte']:.4f}", share or "-"]
            table.add_row(domain if stage == "dense" else "", names[stage], *row, end_section=stage == "after")
    return table


def read_scores(folder: Path) -> dict[str, dict]:
    """Returns the scores of each stage, and checks that upcycling kept the dense loss.

    Raises:
        UserError: if upcycling changed the loss of a domain.
    """
    scores = {stage: json.loads((folder / f"{stage}.json").read_text(encoding="utf-8")) for stage in STAGES}
    for domain, dense in scores["dense"].items():
        difference = abs(scores["before"][domain]["loss"] - dense["loss"])
        if difference > TOLERANCE:
            raise UserError(
                f"upcycling changed the loss on {domain} by {difference:.4f}; it must not: please report this"
            )
    return scores


def write_demo_card(args: Arguments, scores: dict[str, dict], folder: Path) -> ModelCard:
    """Writes the card of the trained model into a folder whose records say how the model was made."""
    sources = read_json(folder / FINETUNING)["data"]
    return write_model_card(
        folder,
        repo_id=args.model_dir,
        base_model=args.base_model,
        license=args.license,
        language=args.language,
        metrics={
            domain: {stage: scores[stage][domain] for stage in ("before", "after")} for domain in scores["after"]
        },
        data={domain: {"source": source, "license": args.data_license} for domain, source in sources.items()},
        intended_use=INTENDED_USE,
    )


def main() -> None:
    """Takes the pictures of the report, writes the model card, and prints the table."""
    (args,) = parse([Arguments], __doc__)
    scores = read_scores(Path(args.scores_dir))
    if args.report_dir is not None:
        take_pictures(args.report_dir, args.model_dir)
    write_demo_card(args, scores, Path(args.model_dir))
    Console().print(scores_table(scores))


if __name__ == "__main__":
    run(main)
