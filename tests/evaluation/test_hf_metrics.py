"""These tests compare the metrics with values computed by hand, and two processes with one."""

import math
import multiprocessing

import pytest
import torch
from torch import distributed

from modeling_moe.evaluation.hf_metrics import BitsPerByte, RouterBalance
from modeling_moe.monitoring import watch
from tests.resizing.families import tiny_family


NLL = {"nll_sum": [0.1, 1e16, 0.7, -1e16, 0.3], "tokens": [3, 4, 5, 1, 2], "bytes": [10, 0, 7, 1, 2]}
# 5 batches, 2 layers, 3 experts
LOAD = {"load": [[[i, 0, 4], [i * i, 2, 0]] for i in range(5)]}
# the second layer has 2 experts
UNEQUAL = {"load": [[[i, 0, 4], [i * i, 2]] for i in range(5)]}
CASES = [(BitsPerByte, NLL), (RouterBalance, LOAD), (RouterBalance, UNEQUAL)]


def fed(metric, columns, batches):
    for i in batches:
        metric.add_batch(**{name: column[i : i + 1] for name, column in columns.items()})
    return metric


def whole(metric_class, columns) -> dict:
    return fed(metric_class(keep_in_memory=True), columns, range(5)).compute()


def test_bits_per_byte_by_hand():
    metric = BitsPerByte(keep_in_memory=True)
    metric.add_batch(nll_sum=[6.0], tokens=[3], bytes=[10])
    metric.add_batch(nll_sum=[2.0], tokens=[1], bytes=[2])
    result = metric.compute()
    assert result["loss"] == 2.0
    assert result["perplexity"] == pytest.approx(math.e**2)
    assert result["bits_per_byte"] == pytest.approx(8 / 12 / math.log(2))
    assert (result["tokens"], result["bytes"]) == (4, 12)


def test_nothing_scored_is_not_a_number():
    metric = BitsPerByte(keep_in_memory=True)
    metric.add_batch(nll_sum=[0.0], tokens=[0], bytes=[0])
    result = metric.compute()
    assert all(math.isnan(result[name]) for name in ("loss", "perplexity", "bits_per_byte"))


def test_router_balance_by_hand():
    metric = RouterBalance(keep_in_memory=True)
    metric.add_batch(load=[[[4, 0, 0, 0], [1, 1, 1, 1]]])
    metric.add_batch(load=[[[0, 0, 4, 0], [1, 1, 1, 1]]])
    result = metric.compute()
    assert result == {
        "max_violation": 0.5,
        "load_entropy": pytest.approx((math.log(2) + math.log(4)) / 2),
        "dead_experts": 0.25,
        "expert_share": [0.375, 0.125, 0.375, 0.125],
    }


def test_balance_of_all_batches_is_not_the_mean_of_each():
    metric = RouterBalance(keep_in_memory=True)
    metric.add_batch(load=[[[2, 0]], [[0, 2]]])
    assert metric.compute()["max_violation"] == 0.0


def test_layers_with_different_numbers_of_experts():
    metric = RouterBalance(keep_in_memory=True)
    metric.add_batch(load=[[[4, 0, 0, 0], [1, 3]]])
    assert metric.compute() == {
        "max_violation": (3 + 0.5) / 2,
        "load_entropy": pytest.approx((0 + math.log(4) - 0.75 * math.log(3)) / 2),
        "dead_experts": 0.375,
        "expert_share": None,
    }


@torch.no_grad()
def test_the_load_of_any_model_comes_from_watch():
    model, metric = tiny_family("mixtral"), RouterBalance(keep_in_memory=True)
    batches = torch.arange(3, 43).view(2, 2, 10)
    with watch(model) as routing:
        for ids in batches:
            model(ids)
            figures = routing.read(reset=True)
            metric.add_batch(load=[[layer.load.tolist() for layer in figures.layers]])
        model(batches.flatten(0, 1))
        whole = routing.read()
    result = metric.compute()
    assert result["max_violation"] == pytest.approx(whole.overall["max_violation"])
    assert sum(result["expert_share"]) == pytest.approx(1)


def test_a_layer_without_load():
    metric = RouterBalance(keep_in_memory=True)
    metric.add_batch(load=[[[0, 0]]])
    assert metric.compute() == {
        "max_violation": 0.0,
        "load_entropy": 0.0,
        "dead_experts": 1.0,
        "expert_share": [0.0, 0.0],
    }


@pytest.mark.parametrize(("metric_class", "columns"), CASES)
def test_a_computed_metric_starts_anew(metric_class, columns, tmp_path):
    metric = metric_class(cache_dir=str(tmp_path))
    assert fed(metric, columns, range(5)).compute() == fed(metric, columns, range(5)).compute()


def by_file_system(rank, cache_dir, queue):
    options = {"num_process": 2, "process_id": rank, "cache_dir": cache_dir}
    results = []
    for case, (kind, columns) in enumerate(CASES):
        metric = kind(**options, experiment_id=f"case{case}")
        results.append(fed(metric, columns, range(rank, 5, 2)).compute())
    queue.put((rank, results))


def by_gloo(rank, folder, queue):
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    results = []
    for kind, columns in CASES:
        metric = fed(kind(keep_in_memory=True), columns, range(rank, 5, 2))
        results.append(metric.compute(gather=True))
    queue.put((rank, results))
    distributed.barrier()
    distributed.destroy_process_group()


@pytest.mark.parametrize("work", [by_file_system, by_gloo])
def test_two_processes_are_one(work, tmp_path):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    workers = [context.Process(target=work, args=(rank, str(tmp_path), queue)) for rank in (0, 1)]
    for worker in workers:
        worker.start()
    results = dict(queue.get(timeout=100) for _ in workers)
    for worker in workers:
        worker.join(timeout=100)
        assert worker.exitcode == 0
    expected = [whole(kind, columns) for kind, columns in CASES]
    assert results[0] == expected
    assert results[1] == (expected if work is by_gloo else [None] * len(CASES))
