# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module trains small models on bytes, for experiments that take minutes on one core.

# B rows, S tokens per row
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from modeling_moe import MoEConfig, MoEForCausalLM

from .scoring import cross_entropy


# token id of padding: ids below it are bytes
PAD = 256
CONFIG: dict[str, Any] = {
    "vocab_size": PAD + 1,
    "pad_token_id": PAD,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "moe_intermediate_size": 64,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "router_aux_loss_coef": 0.005,
}


def new_model(seed: int, **fields) -> MoEForCausalLM:
    """Returns a model of some hundred thousand parameters with random weights."""
    torch.manual_seed(seed)
    return MoEForCausalLM(MoEConfig(**(CONFIG | fields)))


def rows_of(text: np.ndarray, rows: int, length: int, rng: np.random.Generator) -> torch.Tensor:
    """Returns rows (B, S) int64 from random places of a text (n,) of bytes."""
    starts = rng.integers(len(text) - length + 1, size=rows)
    return torch.from_numpy(np.stack([text[start : start + length] for start in starts]).astype(np.int64))


def mixed_rows(
    texts: Sequence[np.ndarray], rows: int, length: int, steps: int, rng: np.random.Generator
) -> Iterator[torch.Tensor]:
    """Yields `steps` batches (B, S), each row from a text chosen at random."""
    for _ in range(steps):
        chosen = rng.integers(len(texts), size=rows)
        yield torch.cat([rows_of(texts[text], 1, length, rng) for text in chosen])


def train(
    model: MoEForCausalLM,
    batches: Iterator[torch.Tensor],
    learning_rate: float,
    *,
    parameters: Sequence[nn.Parameter] | None = None,
    after_step: Callable[[], None] | None = None,
) -> None:
    """Trains on batches (B, S) with AdamW and gradients clipped to the norm 1.

    Args:
        model: the model.
        batches: yields a batch for each step.
        learning_rate: the learning rate.
        parameters: weights to train; None for all that require a gradient.
        after_step: function that is called after each step.
    """
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad] if parameters is None else list(parameters)
    optimizer = torch.optim.AdamW(trained, lr=learning_rate)
    for ids in batches:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        if after_step is not None:
            after_step()
        model.zero_grad()
        model.update_routers()


@torch.no_grad()
def loss_on(model: MoEForCausalLM, ids: torch.Tensor) -> float:
    """Returns the cross entropy of rows (B, S) in nats per byte, in evaluation mode."""
    model.eval()
    return cross_entropy(model(input_ids=ids, use_cache=False).logits, ids)


@contextmanager
def one_thread() -> Iterator[None]:
    """Lets torch compute on one thread, so that runs side by side do not disturb each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def means(losses: Mapping[str, float]) -> float:
    """Returns the mean over domains."""
    return sum(losses.values()) / len(losses)
