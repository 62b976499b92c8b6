"""scripts/benchmark.py --what lora at tiny sizes: what it measures, and that it reports nothing where PEFT disagrees."""

import functools
import math
import re

import pytest

from modeling_moe.benchmark import lora
from modeling_moe.benchmark.presets import PRESETS


TINY, TOKENS = PRESETS["tiny"], (1, 24, 128)
OTHERS = ["PEFT", "full", "full, grouped_mm", "attention", "attention, grouped_mm"]


@pytest.fixture(scope="module")
def rows():
    """Rows of one round."""
    return lora.compare_lora(rounds=1, preset=TINY, tokens=TOKENS)


@pytest.fixture
def script(monkeypatch, benchmark):
    """Runs the script on the tiny model; returns its exit code, output and complaint."""
    compare = functools.partial(lora.compare_lora, preset=TINY, tokens=TOKENS)
    monkeypatch.setattr("modeling_moe.benchmark.compare_lora", compare)
    monkeypatch.setattr("modeling_moe.benchmark.print_lora", functools.partial(lora.print_lora, preset=TINY))
    return functools.partial(benchmark, "--what", "lora", "--rounds", "1")


def test_rows(rows):
    passes = [(row["tokens"], row["pass"]) for row in rows]
    assert passes == [(count, mode) for count in TOKENS for mode in ("forward", "forward_backward")]
    fields = ["tokens", "pass", "ours ms", *(f"{name} ms" for name in OTHERS), *(f"ours/{name}" for name in OTHERS)]
    for row in rows:
        saved = ["ours saved", "PEFT saved"] if row["pass"] == "forward_backward" else []
        assert list(row) == fields + saved
        assert all(math.isfinite(row[name]) and row[name] > 0 for name in row if name != "pass")


def test_fewer_bytes_are_saved_than_by_peft(rows):
    """PEFT keeps a copy of all experts, with the update added, in each of the two layers."""
    saved = {row["tokens"]: (row["ours saved"], row["PEFT saved"]) for row in rows if "ours saved" in row}
    copies = 2 * 4 * TINY.experts * TINY.expert_elements
    assert set(saved) == set(TOKENS)
    assert saved[1][0] < copies < saved[1][1]
    assert all(ours < theirs - copies for ours, theirs in saved.values())


def test_table(script):
    code, printed, _ = script()
    assert code == 0
    assert f"E={TINY.experts} K={TINY.per_token} H={TINY.hidden} I={TINY.intermediate} r=8 float32" in printed
    assert all(name in printed for name in OTHERS)
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.splitlines() if line[:1] == "│"]
    assert [line[0] for line in lines] == [str(count) for count in TOKENS for _ in range(2)]
    assert all(re.fullmatch(r"\d+\.\d{3}", ratio) for line in lines for ratio in line[3:-1])
    for line in lines:
        expected = r"-" if line[1] == "forward" else r"\d\.\d\d / \d\.\d = 0\.\d{3}"
        assert re.fullmatch(expected, line[-1])


def scaled(name, contestant, factor):
    """A method of the passes that is a little off for one contestant: in the logits, or in one of the smaller gradients."""
    method = getattr(lora._Pass, name)

    def wrong(self):
        result = method(self)
        if self.name != contestant:
            return result
        return factor * result if name == "forward" else (*result[:-2], factor * result[-2], result[-1])

    return wrong


@pytest.mark.parametrize("contestant", ["ours", "PEFT"])
@pytest.mark.parametrize("method", ["forward", "forward_backward"])
@pytest.mark.parametrize(("factor", "error"), [(1.01, "1.0e-02"), (float("nan"), "nan")])
def test_disagreement_is_refused(contestant, method, factor, error, script, monkeypatch):
    monkeypatch.setattr(lora._Pass, method, scaled(method, contestant, factor))
    code, printed, complaint = script()
    assert code == 1
    assert printed == ""
    refusal = "benchmark.py: nothing is reported: LoRA here and PEFT's differ by"
    last = complaint.splitlines()[-1]
    assert last.startswith(refusal)
    assert error in last or contestant == "PEFT"  # then 1% of what is 1% too large
