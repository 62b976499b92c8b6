# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module defines metrics of the evaluate library without a download: language-model loss, router balance, expert caching.

All take sums, batch by batch. Several processes can compute a metric in two ways, and both give the result of one
process: each process of torch.distributed adds its own batches and all call `compute(gather=True)`; or the metric is
created with evaluate's `num_process`, `process_id` and `experiment_id`, which need a shared file system.
"""

import math
from collections.abc import Iterable
from itertools import chain

import datasets
import evaluate
import torch
from torch import distributed

from ..monitoring import dead_experts, max_violation


def _all_ranks(rows: list) -> list:
    """Returns the rows of all ranks, in the order of the ranks."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return rows
    parts = [rows] * distributed.get_world_size()
    distributed.all_gather_object(parts, rows)
    return list(chain.from_iterable(parts))


class BitsPerByte(evaluate.Metric):
    """Computes loss, perplexity and bits per byte from sums over batches; use one metric for each domain.

    Example:
        >>> metric = BitsPerByte(keep_in_memory=True)
        >>> metric.add_batch(nll_sum=[6.0], tokens=[3], bytes=[10])
        >>> metric.add_batch(nll_sum=[2.0], tokens=[1], bytes=[2])
        >>> metric.compute()["loss"]
        2.0
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Loss in nats per token, perplexity, and bits per UTF-8 byte of the text predicted.",
            citation="",
            inputs_description="nll_sum: nats of a batch; tokens: its predicted tokens; bytes: UTF-8 bytes of these tokens.",
            features=datasets.Features(
                {
                    "nll_sum": datasets.Value("float64"),
                    "tokens": datasets.Value("int64"),
                    "bytes": datasets.Value("int64"),
                }
            ),
        )

    # evaluate passes the columns that `_info` names, of which the annotation of its method knows nothing
    # pyrefly: ignore[bad-override]
    def _compute(self, nll_sum, tokens, bytes, gather: bool = False) -> dict[str, float | int]:
        columns = (nll_sum, tokens, bytes)
        nll_sum, tokens, bytes = [_all_ranks(column) if gather else column for column in columns]
        # `fsum` rounds once, so the order of the batches does not matter
        nats, tokens, bytes = math.fsum(nll_sum), sum(tokens), sum(bytes)
        loss = nats / tokens if tokens else math.nan
        return {
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "bits_per_byte": nats / math.log(2) / bytes if bytes else math.nan,
            "tokens": tokens,
            "bytes": bytes,
        }


class RouterBalance(evaluate.Metric):
    """Measures how evenly routers spread tokens over the experts, from the experts' loads in each batch.

    `compute` sums the load over all batches, and returns means over the layers of four figures: `max_violation`, the
    largest load divided by the mean load, minus 1 (MaxVio, arXiv:2408.15664; 0 is balanced); `load_entropy` in nats
    (log(E) is balanced, 0 means one expert receives all); `dead_experts`, the share of the experts without a token;
    `expert_share`, the share of the load of each of the E experts, or None if the layers have different numbers of
    experts. The load of any Mixture of Experts in transformers comes from `modeling_moe.watch`.

    Example:
        >>> metric = RouterBalance(keep_in_memory=True)
        >>> metric.add_batch(load=[[[4, 0], [2, 2]]])  # a batch, of 2 layers with 2 experts
        >>> result = metric.compute()
        >>> result["max_violation"], result["dead_experts"], result["expert_share"]
        (0.5, 0.25, [0.75, 0.25])

    The load of a model, batch by batch:

        with modeling_moe.watch(model) as routing:
            for batch in batches:
                model(**batch)
                figures = routing.read(reset=True, across_ranks=False)
                metric.add_batch(load=[[layer.load.tolist() for layer in figures.layers]])
        metric.compute(gather=True)["max_violation"]
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Balance of the load of a Mixture of Experts.",
            citation="",
            inputs_description="load: for each batch and sparse layer the tokens that each of its experts received.",
            features=datasets.Features({"load": datasets.List(datasets.List(datasets.Value("float64")))}),
        )

    # evaluate passes the columns that `_info` names, of which the annotation of its method knows nothing
    # pyrefly: ignore[bad-override]
    def _compute(self, load, gather: bool = False) -> dict[str, float | list[float] | None]:
        rows = _all_ranks(load) if gather else load
        layers = [
            torch.tensor(batches, dtype=torch.float64).sum(dim=0) for batches in zip(*rows, strict=True)
        ]  # of (E,)
        shares = [layer / layer.sum().clamp(min=1) for layer in layers]
        alike = len({len(layer) for layer in layers}) == 1
        return {
            "max_violation": _mean(max_violation(layer) for layer in layers),
            "load_entropy": _mean(torch.special.entr(share).sum() for share in shares),
            "dead_experts": _mean(dead_experts(layer) for layer in layers),
            "expert_share": torch.stack(shares).mean(dim=0).tolist() if alike else None,
        }


class ExpertCaching(evaluate.Metric):
    """Measures the expert caches of a model whose experts are offloaded, from the counts of each batch.

    `compute` sums the counts over all batches and processes, and returns `hit_rate`, the share of the uses that found the
    expert resident; `prefetch_precision`, the share of the prefetched experts that were used (NaN if there is none); and the
    sums `hits`, `misses`, `bytes_read` and `stall_seconds`.

    Example:
        >>> metric = ExpertCaching(keep_in_memory=True)
        >>> metric.add_batch(
        ...     hits=[3], misses=[1], bytes_read=[4096], prefetched=[2], prefetched_used=[1], stall_seconds=[0.5]
        ... )
        >>> metric.compute()["hit_rate"]
        0.75

    The counts of a model, batch by batch:

        statistics = offload_statistics(model)
        for batch in batches:
            statistics.reset()
            model(**batch)
            metric.add_batch(**{name: [count] for name, count in asdict(statistics.total).items()})
        metric.compute(gather=True)["hit_rate"]
    """

    def _info(self) -> evaluate.MetricInfo:
        counts = ("hits", "misses", "bytes_read", "prefetched", "prefetched_used")
        return evaluate.MetricInfo(
            description="Hits, bytes and waiting time of the expert caches of a Mixture of Experts.",
            citation="",
            inputs_description="The fields of modeling_moe.offload.statistics.LayerStatistics, summed over the layers.",
            features=datasets.Features(
                {name: datasets.Value("int64") for name in counts} | {"stall_seconds": datasets.Value("float64")}
            ),
        )

    # evaluate passes the columns that `_info` names, of which the annotation of its method knows nothing
    # pyrefly: ignore[bad-override]
    def _compute(
        self, hits, misses, bytes_read, prefetched, prefetched_used, stall_seconds, gather: bool = False
    ) -> dict[str, float | int]:
        columns = (hits, misses, bytes_read, prefetched, prefetched_used, stall_seconds)
        columns = [_all_ranks(column) if gather else column for column in columns]
        hits, misses, bytes_read, prefetched, used = (sum(column) for column in columns[:5])
        return {
            "hit_rate": hits / (hits + misses) if hits + misses else math.nan,
            "prefetch_precision": used / prefetched if prefetched else math.nan,
            "hits": hits,
            "misses": misses,
            "bytes_read": bytes_read,
            "stall_seconds": math.fsum(columns[5]),
        }


def _mean(values: Iterable[torch.Tensor]) -> float:
    """Returns the mean of the values of each layer."""
    return torch.stack(list(values)).mean().item()
