#!/usr/bin/env python
"""Compare the scores of the dense, the upcycled and the trained model of the demo in a table and in the model card.

    python scripts/demo_report.py --model_dir outputs/demo/model --scores_dir outputs/demo --base_model SmolLM2-135M

The script reads dense.json, before.json and after.json, which scripts/eval_lm.py wrote.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from modeling_moe.hub import write_model_card
from modeling_moe.utils.command_line import parse, run
from modeling_moe.utils.errors import UserError


STAGES = ("dense", "before", "after")
# largest difference between the losses of the dense and the upcycled model
TOLERANCE = 1e-3


@dataclass
class Arguments:
    """These arguments name the parts of the demo."""

    model_dir: str = field(metadata={"help": "folder of the trained model"})
    scores_dir: str = field(metadata={"help": "folder with dense.json, before.json and after.json"})
    base_model: str = field(metadata={"help": "name of the dense model, for the card"})


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


def main() -> None:
    """Checks that upcycling kept the dense loss, writes the model card, and prints the table."""
    (args,) = parse([Arguments], __doc__)
    scores = {stage: json.loads((Path(args.scores_dir) / f"{stage}.json").read_text()) for stage in STAGES}
    for domain, dense in scores["dense"].items():
        difference = abs(scores["before"][domain]["loss"] - dense["loss"])
        if difference > TOLERANCE:
            raise UserError(
                f"upcycling changed the loss on {domain} by {difference:.4f}; it must not: please report this"
            )
    metrics = {
        domain: {"before": scores["before"][domain], "after": scores["after"][domain]} for domain in scores["after"]
    }
    write_model_card(
        args.model_dir,
        base_model=args.base_model,
        metrics=metrics,
        upcycling={"method": "copy, function-preserving", "tool": "scripts/upcycle.py"},
        training={"method": "LoRA on attention and experts, merged", "domains": list(metrics)},
    )
    Console().print(scores_table(scores))


if __name__ == "__main__":
    run(main)
