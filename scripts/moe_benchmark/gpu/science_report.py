# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module writes the results of part `science` as Markdown: each mixture against the dense model, seed by seed."""

import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from experiments.intervals import Comparison, interval


PART, DENSE = "science", "dense"
Row = dict[str, Any]


@dataclass(frozen=True)
class Found:
    """Holds the last run of the part in a file of results.

    Attributes:
        lines: lines in order, by kind.
        errors: lines with failures.
        scores: lines of evaluations of the counted seeds, by (arm, seed, step).
        seeds: counted seeds: those that are finished, with all arms on equal batches.
        left_out: reason for each seed that is not counted.
    """

    lines: dict[str, list[Row]]
    errors: list[str]
    scores: dict[tuple[str, int, int], Row]
    seeds: list[int]
    left_out: list[str]

    @property
    def plan(self) -> Row | None:
        """Returns the line of the plan, or None if nothing was planned."""
        return self.lines["plan"][-1] if self.lines["plan"] else None


def read_lines(rows: Iterable[Row]) -> Found:
    """Sorts the lines of the last run of the part; other lines are ignored."""
    lines: dict[str, list[Row]] = defaultdict(list)
    errors = []
    for row in rows:
        if row.get("part") != PART:
            continue
        if row.get("what") == "setting":
            lines, errors = defaultdict(list), []
        if "error" in row:
            where = " of ".join(str(row[name]) for name in ("what", "arm") if name in row)
            seed = f", seed {row['seed']}" if "seed" in row else ""
            errors.append(f"{where or PART}{seed}: {row['error']}")
        lines[row.get("what", "")].append(row)
    seeds, left_out = [], []
    for seed in sorted({row["seed"] for row in (*lines["evaluation"], *lines["seed"])}):
        reason = why_left_out(lines, seed)
        (left_out.append(f"seed {seed}: {reason}") if reason else seeds.append(seed))
    scores = {(row["arm"], row["seed"], row["step"]): row for row in lines["evaluation"] if row["seed"] in seeds}
    return Found(lines, errors, scores, seeds, left_out)


def why_left_out(lines: dict[str, list[Row]], seed: int) -> str:
    """Returns why a seed is not counted; empty if it is counted."""
    ends = [row for row in lines["seed"] if row["seed"] == seed]
    if not ends or not ends[-1].get("finished"):
        return ends[-1]["not_run"] if ends else "it was not finished"
    batches = defaultdict(set)
    for row in lines["evaluation"]:
        if row["seed"] == seed:
            batches[row["step"]].add(row["batches"])
    return "" if all(len(seen) == 1 for seen in batches.values()) else "its arms were trained on different batches"


def loss_of(found: Found, arm: str, seed: int, step: int) -> float | None:
    """Returns the held-out loss in nats per token, or None without that evaluation."""
    row = found.scores.get((arm, seed, step))
    return None if row is None else float(row["loss"])


def differences(found: Found, plan: Row, arm: str, dense_step: int) -> list[float]:
    """Returns an arm's last loss minus the dense model's loss after `dense_step` steps, for each seed that has both."""
    pairs = [
        (loss_of(found, arm, seed, plan["steps"]), loss_of(found, DENSE, seed, dense_step)) for seed in found.seeds
    ]
    return [own - dense for own, dense in pairs if own is not None and dense is not None]


def difference_text(values: Sequence[float]) -> str:
    """Returns the mean and the 95% interval of differences as text."""
    if not values:
        return "-"
    if len(values) == 1:
        return f"{values[0]:+.4f} (one seed)"
    mean, low, high = interval(values)
    return f"{mean:+.4f} ({low:+.4f} to {high:+.4f})"


def claims(found: Found, plan: Row) -> list[str]:
    """Returns what may be claimed of each mixture at equal tokens and at equal FLOPs; nothing may be claimed from
    one seed.
    """
    said = []
    for arm in plan["flops"]:
        for equal, step in (("tokens", plan["steps"]), ("FLOPs", plan["dense_steps"][arm])):
            values = differences(found, plan, arm, step)
            if arm != DENSE and len(values) > 1:
                said.append(Comparison(f"held-out loss at equal {equal}", arm, DENSE, *interval(values)).claim)
    return said


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Returns the lines of a Markdown table whose first column is aligned to the left."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def mean_of(rows: Sequence[Row], name: str, form: str) -> str:
    """Returns the mean of a field over the lines that have it, as text."""
    values = [float(row[name]) for row in rows if row.get(name) is not None]
    return form.format(statistics.fmean(values)) if values else "-"


def arm_rows(found: Found, plan: Row) -> list[list[str]]:
    """Returns a row for each arm, at the last step of equal tokens."""
    rows, dense_speed = [], None
    for arm, flops in plan["flops"].items():
        ends = [row for seed in found.seeds if (row := found.scores.get((arm, seed, plan["steps"])))]
        speed = statistics.fmean(row["tokens"] / row["training_s"] for row in ends) if ends else None
        dense_speed = speed if arm == DENSE else dense_speed
        ratio = f" ({speed / dense_speed:.2f}x)" if speed and dense_speed and arm != DENSE else ""
        against = ["-", "-"]
        if arm != DENSE:
            steps = (plan["steps"], plan["dense_steps"][arm])
            against = [difference_text(differences(found, plan, arm, step)) for step in steps]
        rows.append([arm, f"{plan['parameters'][arm] / 1e6:,.0f}", f"{flops / 1e9:.3f}"])
        rows[-1].append("-" if speed is None else f"{speed:,.0f}{ratio}")
        rows[-1] += [mean_of(ends, "loss", "{:.4f}"), *against, mean_of(ends, "max_vio", "{:.2f}")]
    return rows


def curve_rows(found: Found, plan: Row) -> list[list[str]]:
    """Returns a row for each arm and evaluation, with means over the seeds."""
    rows = []
    for arm, stops in plan["stops"].items():
        for step in stops:
            scores = [row for seed in found.seeds if (row := found.scores.get((arm, seed, step)))]
            if scores:
                sizes = f"{scores[0]['tokens']:,}", f"{scores[0]['flops'] / 1e15:.2f}"
                each = ", ".join(f"{float(row['loss']):.4f}" for row in scores)
                rows.append([arm, *sizes, mean_of(scores, "loss", "{:.4f}"), each])
    return rows


def exact_lines(found: Found) -> list[str]:
    """Returns a sentence on the logits before training for each mixture."""
    return [
        f"Before training, the fp32 logits of {row['arm']} differ from the dense model's by "
        f"at most {float(row['largest_difference']):.1e}, the loss by {float(row['delta_loss']):+.1e}."
        for row in found.lines["exact"]
        if "largest_difference" in row
    ]


def introduction(found: Found, plan: Row) -> str:
    """Returns the description of models and text."""
    setting, text = found.lines["setting"][-1], found.lines["text"][-1]
    count = len(found.seeds)
    return (
        f"{text['model']} continued training in {setting['dtype']}, with fp32 copies of the weights in AdamW and a learning "
        f"rate of {setting['rate']:g}, which was not tuned for any arm. A run has {plan['steps']} steps of "
        f"{plan['tokens_per_step']:,} tokens ({plan['steps'] * plan['tokens_per_step']:,}), from "
        f"{text['training_tokens']:,} tokens in {text['training_files']:,} Python files; {text['held_out_tokens']:,} tokens "
        f"of other files are held out. The table shows means over {count} seed{'s' * (count != 1)}. A difference is the arm's "
        "held-out loss minus the dense model's, in nats per token, with a 95% interval by Student's t over paired seeds."
    )


def markdown(rows: Iterable[Row]) -> str:
    """Returns the section on the last run of the part.

    Args:
        rows: all lines of a file of results, see [`~moe_benchmark.gpu.results.read`].

    Returns:
        Markdown with a heading of level 2; empty without a line of the part.
    """
    found = read_lines(rows)
    if not any(found.lines.values()):
        return ""
    lines, plan = ["## Upcycled against dense", ""], found.plan
    if plan is None:
        lines += ["Nothing was trained.", ""]
    else:
        header = ["arm", "parameters, M", "GFLOP a token", "tokens/s", "held-out loss"]
        header += ["minus dense, equal tokens", "minus dense, equal FLOPs", "MaxVio"]
        lines += [introduction(found, plan), "", *table(header, arm_rows(found, plan)), ""]
        lines += [f"- {claim}" for claim in (*claims(found, plan), *exact_lines(found))]
        header = ["along training", "tokens", "PFLOP", "held-out loss", "by seed"]
        lines += ["", *table(header, curve_rows(found, plan)), ""]
    for title, entries in (("Not counted", found.left_out), ("Failed", found.errors)):
        if entries:
            lines += [f"{title}:", "", *(f"- {entry}" for entry in entries), ""]
    return "\n".join(lines)
