# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module records the experts that tokens choose while a model writes or reads texts.

# B rows, S tokens per row, N tokens of a row since the begin of the text, L sparse layers, K experts per token
"""

import weakref
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.functional import pad
from transformers import PreTrainedModel

from ..monitoring import LayerPass, ModelHook, argument_names, cache_of, observe, refuse_skipped_tokens, sparse_layers
from .store import NOT_RECORDED, RoutingStore
from .texts import real_tokens, texts_of


class _Rows(NamedTuple):
    """Rows of a generation in one pass: token ids (B, S), experts (B, S, L, K), and real (B, S), False at padding."""

    ids: torch.Tensor
    experts: torch.Tensor
    real: torch.Tensor


def _joined(passes: list[_Rows]) -> _Rows:
    return _Rows(*(torch.cat(parts, dim=1) for parts in zip(*passes, strict=True)))


class _Pass(NamedTuple):
    """A pass that runs: the arguments of the model, the cache, the length of the cache before the pass, and real (B, S)."""

    given: dict[str, Any]
    cache: Any
    before: int
    real: torch.Tensor


class _NoBeams:
    """This takes the place of a model's `_reorder_cache`, which beam search alone calls, while a recorder is on the model.

    A copy of the model, or a model read from a pickle, has no recorder, and reorders its cache.

    Args:
        recorders: number of recorders on the model.
    """

    def __init__(self, recorders: int = 0):
        self.recorders = recorders

    def __call__(self, cache: Any, beam_idx: torch.Tensor) -> Any:
        if self.recorders:
            raise ValueError(
                "beam search reorders the rows of a generation, whose routing then cannot be recorded: generate with "
                "num_beams=1, or without a recorder on the model."
            )
        cache.reorder_cache(beam_idx)
        return cache

    def __reduce__(self) -> tuple:
        return _NoBeams, ()


class RoutingRecorder:
    """Hooks on a model that record routing into a store; [`record_routing`] makes one.

    A pass with a key-value cache continues the texts whose keys the cache holds, as in `generate`, also those of a pass that
    made the cache. A pass without one, as in evaluation, holds whole texts. The texts of a generation are in the store when the
    next one begins, or after [`RoutingRecorder.flush`], which the end of the `with` block calls.

    Attributes:
        store: where the texts are kept.
    """

    def __init__(self, model: nn.Module, store: RoutingStore, generations_only: bool = False):
        refuse_skipped_tokens(sparse_layers(model))
        self.store, self._generations_only = store, generations_only
        self._model: Any = next(module for module in model.modules() if isinstance(module, PreTrainedModel))
        self._names = argument_names(self._model)
        # the passes of the last generation, and its cache, which is not kept alive
        self._open: list[_Rows] = []
        self._cache: weakref.ref[Any] | None = None
        # the last pass without a cache, and the cache that it returned
        self._whole: tuple[weakref.ref[Any], _Rows] | None = None
        self._pass: _Pass | None = None
        self._chosen: dict[str, torch.Tensor] = {}
        self._observation = observe(model, torch.compiler.disable(self._on_pass))
        outputs = [getattr(layer.router, "num_outputs", layer.num_experts) for layer in self._observation.layers]
        self._dtype = torch.int16 if max(outputs) < 2**15 else torch.int32
        self._handles = [
            self._model.register_forward_pre_hook(ModelHook(self._enter), with_kwargs=True, prepend=True),
            self._model.register_forward_hook(ModelHook(self._leave)),
        ]
        self._no_beams = vars(self._model).setdefault("_reorder_cache", _NoBeams())
        self._no_beams.recorders += 1

    def __enter__(self) -> "RoutingRecorder":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Moves the open texts into the store, and removes all hooks; a second call does nothing."""
        self.flush()
        self._observation.remove()
        if self._handles:
            self._no_beams.recorders -= 1
            if not self._no_beams.recorders:
                del self._model._reorder_cache
        while self._handles:
            self._handles.pop().remove()

    def flush(self) -> None:
        """Moves the texts of the last generation into the store."""
        if self._open:
            rows = _joined(self._open)
            ids, experts = rows.ids.cpu(), rows.experts.cpu()
            for row, kept in enumerate(rows.real):
                self.store.add(ids[row, kept], experts[row, kept])
        self._open, self._cache = [], None

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        given = dict(zip(self._names, args, strict=False)) | kwargs
        ids, cache = given.get("input_ids"), cache_of(given)
        before = 0 if cache is None else int(cache.get_seq_length())
        self._chosen, self._pass = {}, None
        if cache is not None and before == 0:
            self.flush()
        if ids is not None and ids.dim() == 2 and (cache is not None or not self._generations_only):
            self._pass = _Pass(given, cache, before, real_tokens(ids, given, cache))

    @torch.no_grad()
    def _on_pass(self, event: LayerPass) -> None:
        if self._pass is not None and not event.recomputed:
            self._chosen[event.layer.name] = event.index.detach()

    def _leave(self, module: nn.Module, args: tuple, output: Any) -> None:
        run, self._pass = self._pass, None
        if run is None:
            return
        ids = run.given["input_ids"]
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
        experts = torch.stack([layer.to(ids.device) for layer in layers], dim=1).to(self._dtype)
        experts = experts.unflatten(0, ids.shape)
        if run.cache is None:
            whole, chosen = ids.cpu(), experts.cpu()
            texts = texts_of(ids, run.given)
            for row, columns in texts:
                self.store.add(whole[row, columns], chosen[row, columns])
            made = getattr(output, "past_key_values", None)
            if made is not None and len(texts) == len(ids):
                self._whole = weakref.ref(made), _Rows(ids, experts, run.real)
        else:
            self._extend(_Rows(ids, experts, run.real), run)

    def _extend(self, rows: _Rows, run: _Pass) -> None:
        """Adds the rows of one pass of a generation to those before."""
        if run.before == 0:
            self._open, self._cache = [rows], weakref.ref(run.cache)
            return
        whole = self._whole
        if whole is not None and whole[0]() is run.cache and len(whole[1].ids) == len(rows.ids):
            # a loop of one's own, whose first pass made the cache
            self.flush()
            self._open, self._cache, self._whole = [whole[1]], whole[0], None
        length = sum(one.ids.shape[1] for one in self._open)
        if self._cache is None or self._cache() is not run.cache or length < run.before:
            return  # the texts began before the recorder was there, or with embeddings in the place of token ids
        if length > run.before:
            # speculative decoding crops the cache to the accepted tokens
            self._open = [_Rows(*(part[:, : run.before] for part in _joined(self._open)))]
        self._open.append(rows)


def record_routing(model: nn.Module, store: RoutingStore | None = None) -> RoutingRecorder:
    """Records the experts that each token of each text chooses, in `generate` and in single passes.

    Beam search raises a ValueError while a recorder is on the model, since the search reorders the rows of a generation.

    Args:
        model: any MoE model whose experts follow transformers' experts interface.
        store: where to keep the texts; a new one by default.

    Returns:
        A context manager, and a handle with `store` and `remove()`.

    Raises:
        UnreachableRouting: a ValueError, if the model is dense, its experts cannot be reached, or depth_layers lets sparse layers
            skip tokens.

    Example:
        >>> with record_routing(model) as recorder:
        ...     texts = model.generate(**prompts, do_sample=True)
        >>> with replay_routing(model, recorder.store):
        ...     model(texts).logits
    """
    return RoutingRecorder(model, RoutingStore() if store is None else store)
