"""This module tests the counts of expert caches, their sums and their table, and the metric made of them."""

import math
from dataclasses import asdict

import pytest

from modeling_moe.evaluation import ExpertCaching
from modeling_moe.offload.statistics import LayerStatistics, OffloadStatistics


FIRST = LayerStatistics(hits=3, misses=1, bytes_read=3 * 2**20, prefetched=4, prefetched_used=1, stall_seconds=0.25)
SECOND = LayerStatistics(hits=0, misses=4, bytes_read=2**19, stall_seconds=1.5)


def both() -> OffloadStatistics:
    """Returns the statistics of two layers, made anew."""
    return OffloadStatistics(
        {"a.experts": LayerStatistics(**vars(FIRST)), "b.experts": LayerStatistics(**vars(SECOND))}
    )


def test_rates_of_a_layer():
    assert (FIRST.hit_rate, FIRST.prefetch_precision) == (0.75, 0.25)
    assert SECOND.hit_rate == 0.0
    assert math.isnan(SECOND.prefetch_precision)
    assert math.isnan(LayerStatistics().hit_rate)


def test_total_adds_every_field():
    assert both().total == LayerStatistics(3, 5, 3 * 2**20 + 2**19, 4, 1, 1.75)
    assert OffloadStatistics({}).total == LayerStatistics()


def test_reset_starts_the_same_objects_from_zero():
    statistics = both()
    layer = statistics.layers["a.experts"]
    statistics.reset()
    assert layer == LayerStatistics()
    assert statistics.total == LayerStatistics()
    layer.hits += 2
    assert statistics.total.hits == 2


def test_table_has_a_row_for_each_layer_and_the_total():
    lines = both().table().splitlines()
    assert [line.split() for line in lines] == [
        ["layer", "hits", "misses", "hit", "rate", "MiB", "read", "prefetched", "precision", "stall", "s"],
        ["a.experts", "3", "1", "75.0%", "3.0", "4", "25.0%", "0.25"],
        ["b.experts", "0", "4", "0.0%", "0.5", "0", "-", "1.50"],
        ["total", "3", "5", "37.5%", "3.5", "4", "25.0%", "1.75"],
    ]
    assert len({len(line) for line in lines}) == 1


def test_metric_sums_the_batches():
    metric = ExpertCaching(keep_in_memory=True)
    for layer in (FIRST, SECOND):
        metric.add_batch(**{name: [count] for name, count in asdict(layer).items()})
    assert metric.compute() == {
        "hit_rate": 3 / 8,
        "prefetch_precision": 1 / 4,
        "hits": 3,
        "misses": 5,
        "bytes_read": 3 * 2**20 + 2**19,
        "stall_seconds": 1.75,
    }


@pytest.mark.parametrize("rate", ["hit_rate", "prefetch_precision"])
def test_metric_of_nothing_has_no_rates(rate):
    found = ExpertCaching(keep_in_memory=True).compute(**{name: [0] for name in asdict(LayerStatistics())})
    assert found["hits"] == 0
    assert math.isnan(found[rate])
