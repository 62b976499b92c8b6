# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module computes the loss that the experiments report."""

import torch


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Returns the mean loss in nats per token.

    Args:
        logits: (B, S, V).
        labels: token ids (B, S); position s is scored with the logits of position s - 1.
    """
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()).item()
