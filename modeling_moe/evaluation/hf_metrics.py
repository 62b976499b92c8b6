# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""Metrics of the evaluate library that need no download: a language model's loss, and the balance of its routers.

Both are fed sums, batch by batch. Over several processes there are two ways, with the same result as one process:
`compute(gather=True)` on all ranks of torch.distributed, each having fed what it alone saw, or evaluate's own
`num_process`, `process_id` and `experiment_id`, which need a file system that the processes share.
"""

import math
from itertools import chain

import datasets
import evaluate
import torch
from torch import distributed

from .routing_metrics import dead_experts, max_violation


def _all_ranks(rows: list) -> list:
    """Rows of all ranks, in their order."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return rows
    parts = [rows] * distributed.get_world_size()
    distributed.all_gather_object(parts, rows)
    return list(chain.from_iterable(parts))


class BitsPerByte(evaluate.Metric):
    """Loss, perplexity and bits per byte from sums over batches; one for each domain.

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
            inputs_description="nll_sum: nats of a batch; tokens: tokens predicted in it; bytes: UTF-8 bytes they are.",
            features=datasets.Features(
                {
                    "nll_sum": datasets.Value("float64"),
                    "tokens": datasets.Value("int64"),
                    "bytes": datasets.Value("int64"),
                }
            ),
        )

    def _compute(self, nll_sum, tokens, bytes, gather: bool = False) -> dict[str, float | int]:
        columns = (nll_sum, tokens, bytes)
        nll_sum, tokens, bytes = [_all_ranks(column) if gather else column for column in columns]
        # rounded once, so that the order of the batches does not matter
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
    """How evenly routers spread tokens over their experts, from the experts' loads in each batch.

    `compute` returns, of the load over all batches and as the mean over the layers: `max_violation`, largest over mean
    load, less 1 (MaxVio of arXiv:2408.15664; 0 in balance); `load_entropy` in nats (log(E) in balance, 0 if one expert
    gets all); `dead_experts`, the share of the experts that got nothing; and `expert_share`, the E shares of the load.

    Example:
        >>> metric = RouterBalance(keep_in_memory=True)
        >>> metric.add_batch(load=[[[4, 0], [2, 2]]])  # a batch, of 2 layers with 2 experts
        >>> result = metric.compute()
        >>> result["max_violation"], result["dead_experts"], result["expert_share"]
        (0.5, 0.25, [0.75, 0.25])
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Balance of the load of a Mixture of Experts.",
            citation="",
            inputs_description="load: (sparse layers, E) for each batch, tokens that each expert received.",
            features=datasets.Features({"load": datasets.List(datasets.List(datasets.Value("float64")))}),
        )

    def _compute(self, load, gather: bool = False) -> dict[str, float | list[float]]:
        total = torch.tensor(load, dtype=torch.float64).sum(dim=0)  # (layers, E)
        if gather:
            total = torch.stack(_all_ranks([total])).sum(dim=0)
        share = total / total.sum(dim=-1, keepdim=True).clamp(min=1)
        return {
            "max_violation": max_violation(total).mean().item(),
            "load_entropy": torch.special.entr(share).sum(dim=-1).mean().item(),
            "dead_experts": dead_experts(total).mean().item(),
            "expert_share": share.mean(dim=0).tolist(),
        }
