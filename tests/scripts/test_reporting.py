"""The test reads the files that scripts/finetune.py --report_to tensorboard writes."""

import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing import event_accumulator

from tests.scripts.test_finetune import finetune, small


def scalars(output: Path) -> dict[str, dict[int, float]]:
    """Returns the scalars of all event files: tag to step to value."""
    found: dict[str, dict[int, float]] = {}
    for file in output.glob("runs/*/events.out.tfevents.*"):
        events = event_accumulator.EventAccumulator(str(file)).Reload()
        for tag in events.Tags()["scalars"]:
            found.setdefault(tag, {}).update({event.step: event.value for event in events.Scalars(tag)})
    return found


def printed_loss(output: str) -> float:
    """Returns the held-out loss of the last printed table."""
    return float([line for line in output.splitlines() if "held-out loss, wiki" in line][-1].split("│")[2])


def test_tensorboard(checkpoint, text_file, tmp_path, monkeypatch, capsys):
    """A resumed run adds events to the events of the first run."""
    output = tmp_path / "out"
    flags = ["--report_to", "tensorboard", "--logging_steps", "2", "--save_steps", "2"]
    finetune(monkeypatch, *small(checkpoint, text_file, output, steps=2), *flags)
    first = scalars(output)
    assert list(first["train/loss"]) == [1, 2]
    flags += ["--resume_from_checkpoint", "true"]
    finetune(monkeypatch, *small(checkpoint, text_file, output, steps=4), *flags)
    both = scalars(output)
    log = json.loads((output / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
    for name in ("loss", "grad_norm", "learning_rate"):
        expected = {row["step"]: row[name] for row in log if name in row}
        assert list(expected) == [1, 2, 4]
        assert both[f"train/{name}"] == pytest.approx(expected, rel=1e-6)  # events are float32
        assert first[f"train/{name}"].items() <= both[f"train/{name}"].items()
    held_out = both["eval/wiki_loss"]
    assert sorted(held_out) == [2, 4]
    assert held_out[4] == pytest.approx(printed_loss(capsys.readouterr().out), abs=6e-5)
