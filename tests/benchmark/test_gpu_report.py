"""These tests check scripts/gpu_report.py on invented lines of a GPU: targets, page, proposed tiles and summary."""

import math

import pytest
from moe_benchmark.gpu import report, summary, tile_table
from moe_benchmark.gpu.targets import TARGETS

from modeling_moe.dispatch.backends.triton.tiles import CONFIGS, DECODING, Config, Tile


def case_row(tokens, mode, **changes):
    row = {
        "part": "comparison",
        "preset": "qwen3_30b_a3b",
        "tokens": tokens,
        "mode": mode,
        "routing": "balanced",
        "dtype": "bfloat16",
        "ms": {"moe": 4.0, "grouped_mm": 6.0, "liger": 8.0, "dense": 3.0},
        "ratios": {"ours/transformers": 0.5},
        "floors_ms": {"floor": 2.0},
        "limit_ms": 3.0,
    }
    return row | changes


def swept(field, value, ms, current, tokens=32768, rows=2048.0, scenario="train"):
    return {
        "part": "sweep",
        "preset": "qwen3_30b_a3b",
        "tokens": tokens,
        "dtype": "bfloat16",
        "scenario": scenario,
        "family": "hopper",
        "rows_per_expert": rows,
        "field": field,
        "value": value,
        "ms": ms,
        "current": current,
    }


def height(rows, low, high):
    label = {"part": "sweep", "preset": "qwen3_30b_a3b", "rows_per_expert": rows}
    return [label | {"block_m": block, "forward_ms": 1.0, "both_ms": ms} for block, ms in ((64, low), (128, high))]


def bytes_row(name, peak):
    sizes = {"peak_bytes": peak, "saved_bytes": peak // 2, "gradient_bytes": 100}
    return {"part": "memory", "preset": "qwen3_30b_a3b", "tokens": 32768, "implementation": name, **sizes}


ROWS = [
    case_row(32768, "forward"),
    case_row(32768, "forward_backward", ms={"moe": 20.0, "grouped_mm": 22.0}, ratios={"ours/transformers": 0.9}),
    case_row(1, "decode", ms={"moe": 0.06, "moe (graph)": 0.02}, ratios={"ours/limit (graph)": 1.4}, limit_ms=0.015),
    bytes_row("moe", 1000),
    bytes_row("grouped_mm", 4000),
    {"part": "lora", "preset": "qwen3_30b_a3b", "tokens": 32768, "lora_over_full": 1.3},
]


def test_targets():
    verdicts = {target.what: target.cells(ROWS)[2:] for target in TARGETS}
    assert verdicts["forward, 32,768 tokens"] == ["4 ms", "met"]
    assert verdicts["forward and backward, 32,768 tokens"] == ["20 ms", "**not met**"]
    assert verdicts["forward, 32,768 tokens, speed over grouped_mm"] == ["2.00", "met"]
    assert verdicts["forward and backward, 32,768 tokens, speed over grouped_mm"] == ["1.11", "**not met**"]
    assert verdicts["peak memory with backward, 32,768 tokens, over grouped_mm"] == ["0.25", "met"]
    assert verdicts["LoRA of rank 16 over full fine-tuning, 32,768 tokens"] == ["1.30", "**not met**"]
    assert verdicts["decoding of 1 token over bytes / bandwidth"] == ["1.40", "met"]
    assert verdicts["forward, 4,096 tokens"] == ["-", "not measured"]


def test_page():
    page = report.markdown([*ROWS, {"part": "sweep", "what": "it", "error": "broke | off"}], "figure.png")
    # 2 FLOPs x 32768 tokens x 8 experts x 3 x 2048 x 768 in 4 ms; twice the floor; others' times over ours
    assert "| qwen3_30b_a3b | 32,768 | forward | balanced | 4 | 618 | 50% | 1.50 | 2.00 | 0.75 |" in page
    assert "| qwen3_30b_a3b | 1 | 60 | 20 | 15 | 1.4 | - |" in page
    assert "| 0.25 | 0.23 | 0.25 |" in page
    assert "- sweep: it: broke | off" in page
    assert "![Forward and backward at 32,768 tokens](figure.png)" in page
    assert page.count("## ") == len({line for line in page.splitlines() if line.startswith("## ")})


def test_the_proposed_tiles():
    rows = [
        swept("gradient", [128, 256, 64, 8, 5], 5.0, True),
        swept("gradient", [128, 128, 64, 8, 5], 4.0, False),
        swept("gate", [128, 128, 64, 8, 3], 2.0, True),
        swept("gate", [128, 256, 64, 8, 3], 1.99, False),
        swept("persistent", False, 3.0, True, tokens=2048, rows=128.0),
        swept("persistent", True, 2.0, False, tokens=2048, rows=128.0),
        *height(64.0, 1.0, 2.0),
        *height(128.0, 1.0, 1.1),
        *height(192.0, 1.2, 1.1),
    ]
    family, numbers, table = tile_table.propose(rows)
    old = CONFIGS["hopper"]["16bit"]
    assert (family, numbers) == ("hopper", "16bit")
    assert table[:2] == old[:2]
    assert table[2] == (160, old[2][1]._replace(persistent=True))
    # the gate's tile is faster by less than the noise
    assert table[3] == (old[3][0], old[3][1]._replace(gradient=Tile(128, 128, 64, 8, 5)))
    names = {"Config": Config, "Tile": Tile, "math": math}
    assert eval(f"{{{tile_table.as_text(numbers, table)}}}", names) == {"16bit": table}


def test_the_proposed_blocks_of_decoding():
    def decoded(field, value, ms, current, tokens):
        return swept(field, value, ms, current, tokens, tokens / 16, "decode")

    rows = [
        *(decoded("up", value, ms, value == 16, 1) for value, ms in ((16, 2.0), (32, 1.5))),
        *(decoded("up", value, ms, value == 16, 16) for value, ms in ((16, 2.0), (32, 3.0))),
        *(decoded("down", value, ms, value == 8, 1) for value, ms in ((8, 2.0), (4, 1.0))),
    ]
    assert tile_table.propose_decoding(rows) == DECODING["hopper"]._replace(down=4)
    assert tile_table.propose(rows) is None
    assert tile_table.propose_decoding([]) is None


@pytest.mark.parametrize(
    ("won", "bound"),
    [([True, True], float("inf")), ([False, False], None), ([True, False], 96.0), ([False, True], 1e9)],
)
def test_crossover(won, bound):
    rows = [
        row for count, low in zip((64.0, 128.0), won, strict=True) for row in height(count, 1.0 if low else 3.0, 2.0)
    ]
    assert tile_table.crossover(rows) == (float("inf") if bound == 1e9 else bound)


def test_the_last_run_of_a_part_counts():
    first = [{"part": "kernels", "ms": 1}, {"part": "lora", "ms": 2}]
    assert report.latest([first, [{"part": "kernels", "ms": 3}]]) == [
        {"part": "kernels", "ms": 3},
        {"part": "lora", "ms": 2},
    ]


def test_summary_of_parts(capsys):
    rows = [
        {"part": "correctness", "at_s": 1.0, "check": "a", "passed": True},
        {"part": "correctness", "at_s": 2.0, "check": "b", "skipped": "bitsandbytes is not installed"},
        {"part": "correctness", "at_s": 3.0, "ended": True},
    ]
    assert summary.print_summary(rows) == 0
    assert "bitsandbytes is not installed" in capsys.readouterr().out
    assert summary.print_summary([*rows, {"part": "tests", "test": "t" * 300, "error": "e" * 300}]) == 1
    assert all(len(line) <= 100 for line in capsys.readouterr().out.splitlines())
