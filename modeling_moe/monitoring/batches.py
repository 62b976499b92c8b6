# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module keeps, while a model runs, what its arguments say of the rows and the padding of the batch.

# B rows, S tokens per row, T = B*S tokens
"""

import inspect
from typing import Any, NamedTuple

import torch
from torch import nn

from ..compatibility import CACHE_NAMES


def next_labels(ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
    """Returns the labels (B, S - 1) of all positions but the last: the next token, -100 where it or the token is padding.

    Args:
        ids: (B, S) int64 token ids.
        attention_mask: (B, S), 0 at padding; None without padding.
    """
    labels = ids[:, 1:]
    if attention_mask is None:
        return labels
    return labels.masked_fill((attention_mask[:, 1:] == 0) | (attention_mask[:, :-1] == 0), -100)


class PaddingMask(NamedTuple):
    """What an attention mask says of padding.

    Attributes:
        tokens: (B, S) bool, False at padding; None if all tokens are real or unknown.
        unknown: sentence that says why padding cannot be told from the mask; None if it can.
    """

    tokens: torch.Tensor | None = None
    unknown: str | None = None


class Batch(NamedTuple):
    """A batch, from the arguments of the models that run on it.

    Attributes:
        records_gradient: whether the caller of the outermost model records gradients.
        rows: number B of rows; 1 if unknown.
        padding: what the attention mask says of padding.
    """

    records_gradient: bool
    rows: int = 1
    padding: PaddingMask = PaddingMask()

    def mask_of(self, tokens: int, device: torch.device) -> tuple[torch.Tensor | None, int, str | None]:
        """Returns for the `tokens` of a layer the mask (T,) or None, the number of rows, and why padding is unknown."""
        rows = self.rows if tokens % max(self.rows, 1) == 0 else 1
        if self.padding.tokens is None:
            return None, rows, self.padding.unknown
        if self.padding.tokens.numel() != tokens:
            return None, rows, "padding counts as tokens: the layer's tokens are not those of the attention mask"
        return self.padding.tokens.to(device).reshape(-1), rows, None


def padding_of(attention_mask: Any, rows: int, length: int, cache: Any = None) -> PaddingMask:
    """Reads padding from an attention mask.

    Args:
        attention_mask: (B, past + S), 0 at padding; or (B, 1, S, N), True or 0.0 where a token attends; or a dictionary of
            them; or None.
        rows: B.
        length: S.
        cache: key-value cache of the tokens before the batch; None without one.
    """
    if isinstance(attention_mask, dict):
        attention_mask = next((mask for mask in attention_mask.values() if mask is not None), None)
    if attention_mask is None:
        return PaddingMask()
    if isinstance(attention_mask, torch.Tensor) and attention_mask.shape[:1] == (rows,):
        if attention_mask.dim() == 2 and attention_mask.shape[1] >= length:
            return PaddingMask(attention_mask[:, -length:] > 0)
        if attention_mask.dim() == 4:
            return PaddingMask(_attends_to_itself(attention_mask, length, cache))
    kind = (
        f"a mask of shape {tuple(attention_mask.shape)}"
        if hasattr(attention_mask, "shape")
        else type(attention_mask).__name__
    )
    return PaddingMask(unknown=f"padding cannot be told from {kind} as attention_mask, and counts as tokens")


def _attends_to_itself(attention_mask: torch.Tensor, length: int, cache: Any) -> torch.Tensor:
    """Returns (B, S) bool, true where a token attends to itself: a real token does, and no token attends to padding."""
    past = 0 if cache is None else cache.get_seq_length()
    # a static cache has its length on the device
    column = torch.arange(length, device=attention_mask.device) + past
    rows = attention_mask[:, 0, -length:]
    own = rows.gather(-1, column.clamp(max=rows.shape[-1] - 1).expand(len(rows), length)[..., None])[..., 0]
    return own if own.dtype == torch.bool else own == 0


class Batches:
    """The batches of the models that run, outermost first."""

    def __init__(self) -> None:
        self._running: list[tuple[list[str] | None, Batch]] = []

    def enter(self, names: list[str] | None, args: tuple, kwargs: dict[str, Any]) -> None:
        """Notes the arguments of a model that begins to run.

        Args:
            names: names of the positional arguments of the model, one list for each model; None for a module that only
                holds a model.
            args, kwargs: the arguments.
        """
        if names is not None and any(names is running for running, _ in self._running):
            self._running.clear()  # Ctrl-C ended the pass before, and torch calls no hook then
        outer = self._running[-1][1] if self._running else Batch(torch.is_grad_enabled())
        batch = outer if names is None else _inner(outer, dict(zip(names, args, strict=False)) | kwargs)
        self._running.append((names, batch))

    def leave(self, *_: Any) -> None:
        """Forgets the arguments of the model that ends, also by an exception."""
        if self._running:
            self._running.pop()

    @property
    def current(self) -> Batch:
        """Returns the batch of the innermost model that runs."""
        return self._running[-1][1] if self._running else Batch(torch.is_grad_enabled())


def cache_of(given: dict[str, Any]) -> Any:
    """Returns the key-value cache among the arguments of a model; None without one."""
    return next((given[name] for name in CACHE_NAMES if given.get(name) is not None), None)


def argument_names(module: nn.Module) -> list[str]:
    """Returns the names of the arguments of a module's forward."""
    return list(inspect.signature(module.forward).parameters)


def _inner(outer: Batch, given: dict[str, Any]) -> Batch:
    """Returns the batch of a model that another one may have called; the other one's mask has precedence."""
    tokens = given.get("input_ids")
    if tokens is None:
        tokens = given.get("inputs_embeds")
    if not isinstance(tokens, torch.Tensor) or tokens.dim() < 2:
        return outer
    rows, length = tokens.shape[:2]
    batch = outer._replace(rows=rows)
    known = outer.padding.tokens is not None and outer.padding.tokens.shape == (rows, length)
    if known or given.get("attention_mask") is None:
        return batch
    cache = cache_of(given)
    return batch._replace(padding=padding_of(given.get("attention_mask"), rows, length, cache))
