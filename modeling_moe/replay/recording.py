# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module records the experts that tokens choose while a model writes or reads texts.

# B rows, S tokens per row, N tokens of a row since the begin of the text, L sparse layers, K experts per token
"""

from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.functional import pad
from transformers import PreTrainedModel

from ..monitoring import LayerPass, ModelHook, argument_names, cache_of, observe
from .store import NOT_RECORDED, RoutingStore


class _Rows(NamedTuple):
    """Rows of texts: token ids (B, N), experts (B, N, L, K) int16, and the attention mask (B, N) or None."""

    ids: torch.Tensor
    experts: torch.Tensor
    mask: torch.Tensor | None


class RoutingRecorder:
    """Hooks on a model that record routing into a store; [`record_routing`] makes one.

    A pass with a key-value cache continues the texts whose keys the cache holds, as in `generate`. A pass without one, as in
    evaluation, holds whole texts. The texts of a generation are in the store when the next one begins, or after
    [`RoutingRecorder.flush`], which the end of the `with` block calls.

    Attributes:
        store: where the texts are kept.
    """

    def __init__(self, model: nn.Module, store: RoutingStore, generations_only: bool = False):
        self.store, self._generations_only = store, generations_only
        self._model: Any = next(module for module in model.modules() if isinstance(module, PreTrainedModel))
        self._names = argument_names(self._model)
        self._open: _Rows | None = None
        self._given: dict[str, Any] | None = None
        self._before = 0
        self._chosen: dict[str, torch.Tensor] = {}
        self._observation = observe(model, torch.compiler.disable(self._on_pass))
        self._handles = [
            self._model.register_forward_pre_hook(ModelHook(self._enter), with_kwargs=True, prepend=True),
            self._model.register_forward_hook(ModelHook(self._leave)),
        ]

    def __enter__(self) -> "RoutingRecorder":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Moves the open texts into the store, and removes all hooks; a second call does nothing."""
        self.flush()
        self._observation.remove()
        while self._handles:
            self._handles.pop().remove()

    def flush(self) -> None:
        """Moves the texts of the last generation into the store."""
        if self._open is not None:
            self._keep(self._open)
            self._open = None

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        given = dict(zip(self._names, args, strict=False)) | kwargs
        ids, cache = given.get("input_ids"), cache_of(given)
        self._chosen = {}
        self._given = given if ids is not None and (cache is not None or not self._generations_only) else None
        self._before = 0 if cache is None else int(cache.get_seq_length())

    @torch.no_grad()
    def _on_pass(self, event: LayerPass) -> None:
        if self._given is not None and not event.recomputed:
            self._chosen[event.layer.name] = event.index.detach()

    def _leave(self, *_: Any) -> None:
        given, self._given = self._given, None
        if given is None:
            return
        ids = given["input_ids"]
        chosen = [self._chosen.get(layer.name) for layer in self._observation.layers]
        self._chosen = {}
        width = max((index.shape[-1] for index in chosen if index is not None), default=1)
        missing = ids.new_full((ids.numel(), width), NOT_RECORDED)
        # layers may differ in K
        layers = [
            missing if index is None else pad(index, (0, width - index.shape[-1]), value=NOT_RECORDED)
            for index in chosen
        ]
        if any(len(layer) != ids.numel() for layer in layers):
            raise ValueError(
                "the sparse layers did not see each token of input_ids once: their routing cannot be recorded."
            )
        experts = torch.stack([layer.to(ids.device) for layer in layers], dim=1).to(torch.int16)
        self._extend(_Rows(ids, experts.unflatten(0, ids.shape), given.get("attention_mask")), given)

    def _extend(self, rows: _Rows, given: dict[str, Any]) -> None:
        """Adds the rows of one pass to the open texts, or begins new ones."""
        mask = rows.mask if rows.mask is not None and rows.mask.dim() == 2 else None
        if cache_of(given) is None:
            self._keep(rows._replace(mask=mask))
            return
        if self._before == 0:
            self.flush()
            self._open = rows._replace(mask=mask)
            return
        begun = self._open
        if begun is None or len(begun.ids) != len(rows.ids) or begun.ids.shape[1] < self._before:
            self._open = None  # the texts began before the recorder was there
            return
        # speculative decoding crops the cache to the accepted tokens
        ids = torch.cat([begun.ids[:, : self._before], rows.ids], dim=1)
        experts = torch.cat([begun.experts[:, : self._before], rows.experts], dim=1)
        self._open = _Rows(ids, experts, begun.mask if mask is None else mask)

    def _keep(self, rows: _Rows) -> None:
        ids, experts = rows.ids.cpu(), rows.experts.cpu()
        real = torch.ones_like(ids, dtype=torch.bool)
        if rows.mask is not None:
            known = rows.mask[:, : ids.shape[1]].cpu() > 0
            real[:, : known.shape[1]] = known
        for row, kept in enumerate(real):
            self.store.add(ids[row, kept], experts[row, kept])


def record_routing(model: nn.Module, store: RoutingStore | None = None) -> RoutingRecorder:
    """Records the experts that each token of each text chooses, in `generate` and in single passes.

    Beam search reorders the rows of a generation, which the model does not see: record greedy search or sampling.

    Args:
        model: any MoE model whose experts follow transformers' experts interface.
        store: where to keep the texts; a new one by default.

    Returns:
        A context manager, and a handle with `store` and `remove()`.

    Raises:
        UnreachableRouting: a ValueError, if the model is dense, or its experts cannot be reached.

    Example:
        >>> with record_routing(model) as recorder:
        ...     texts = model.generate(**prompts, do_sample=True)
        >>> with replay_routing(model, recorder.store):
        ...     model(texts).logits
    """
    return RoutingRecorder(model, RoutingStore() if store is None else store)
