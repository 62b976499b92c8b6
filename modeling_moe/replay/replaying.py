# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module makes the sparse layers of a model use recorded experts in each pass on texts that a store knows.

# B rows, S tokens per row, T = B*S tokens, L sparse layers, K experts per token
"""

from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import nn
from torch.nn.functional import pad

from ..monitoring import (
    BatchFrame,
    BatchFrames,
    ModelHook,
    SparseLayer,
    cache_of,
    hides_ids,
    in_backward,
    is_distributed,
    refuse_skipped_tokens,
    repeats_batch,
    sparse_block,
    sparse_layers,
    sum_over_ranks,
)
from ..router import Routing
from .recording import RoutingRecorder
from .selection import OwnSelection, Selection, TopKSelection
from .store import NOT_RECORDED, RoutingStore
from .texts import texts_of


# experts whose choice is replayed, since two replays of a layer would disturb each other
_REPLAYED: "WeakSet[nn.Module]" = WeakSet()


class ReplayFigures(NamedTuple):
    """What a replay did since the last reading.

    Attributes:
        coverage: share of the tokens, padding excluded, whose experts were recorded; nan without tokens.
        flipped: share of the recorded assignments whose expert the router would not have chosen; nan without any.
    """

    coverage: float
    flipped: float


class _Record(NamedTuple):
    """The recorded experts (T, L, K) int64 of a batch, -1 where nothing is recorded; None if no text is known."""

    experts: torch.Tensor | None


class RoutingReplay:
    """Hooks on a model that replay recorded experts; [`replay_routing`] makes one.

    Args:
        model: any MoE model.
        store: recorded texts.
        recorder: a recorder that fills the store, whose last generation is needed before a batch is looked up.

    Attributes:
        store: the recorded texts.
    """

    def __init__(self, model: nn.Module, store: RoutingStore, recorder: RoutingRecorder | None = None):
        self.store, self._model, self._recorder = store, model, recorder
        self._layers = sparse_layers(model)
        refuse_skipped_tokens(self._layers)
        if any(layer.experts in _REPLAYED for layer in self._layers):
            raise ValueError("the routing of this model is replayed already: call remove() of the other replay first.")
        _REPLAYED.update(layer.experts for layer in self._layers)
        self._frames = BatchFrames(model, [layer.name for layer in self._layers])
        self._records: WeakKeyDictionary[BatchFrame, _Record] = WeakKeyDictionary()
        self._selections: dict[str, Selection] = {}
        self._checked: set[str] = set()
        self._tokens = self._recorded = 0
        # device -> (2,) int64: recorded assignments that the router would not have chosen, and all recorded ones
        self._assignments: dict[torch.device, torch.Tensor] = {}
        self._handles: list = []
        for place, layer in enumerate(self._layers):
            self._watch(model, place, layer)

    def __enter__(self) -> "RoutingReplay":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Removes all hooks, after which the routers choose by themselves; a second call does nothing."""
        for name in list(self._selections):
            self._end(name)
        while self._handles:
            self._handles.pop().remove()
            _REPLAYED.difference_update(layer.experts for layer in self._layers)
        self._frames.remove()

    def _watch(self, model: nn.Module, place: int, layer: SparseLayer) -> None:
        def begin(module: nn.Module, args: tuple) -> None:
            self._begin(place, layer)

        def reach_experts(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            if kwargs.get("frozen"):
                return  # a straight-through estimate of the router's gradient, before the call with the chosen experts
            selection = self._end(layer.name)
            if selection is not None and not layer.returns_routing and not hides_ids(layer.experts, layer.num_experts):
                self._check(layer, selection, kwargs.get("top_k_index", (*args, None, None)[1]))

        def reach_routing(module: nn.Module, args: tuple, output: Any) -> None:
            if layer.name in self._selections:
                self._check(layer, self._selections[layer.name], Routing(*output).index)

        def leave(*_: Any) -> None:
            self._end(layer.name)

        block = sparse_block(model, layer)
        disable = torch.compiler.disable
        self._handles += [
            block.register_forward_pre_hook(ModelHook(disable(begin))),
            layer.experts.register_forward_pre_hook(ModelHook(disable(reach_experts)), prepend=True, with_kwargs=True),
            block.register_forward_hook(ModelHook(disable(leave)), always_call=True),
        ]
        if layer.returns_routing and layer.router is not None:
            self._handles.append(layer.router.register_forward_hook(ModelHook(disable(reach_routing))))

    def _begin(self, place: int, layer: SparseLayer) -> None:
        frame = self._frames.current
        if frame is None:
            if in_backward():
                raise RuntimeError(
                    "routing replay cannot tell which batch a repeated layer belongs to: checkpoint with transformers' "
                    "gradient_checkpointing_enable."
                )
            return
        for name in list(self._selections):
            self._end(name)  # Ctrl-C ended the pass before, which calls no hook
        experts = self._record(frame).experts
        if experts is None:
            return
        index = experts[:, place]
        selection: Selection
        if layer.returns_routing and layer.router is not None:
            selection = OwnSelection(index, layer.router)
        else:
            selection = TopKSelection(index, layer.num_experts)
        self._selections[layer.name] = selection
        selection.begin()

    def _end(self, name: str) -> Selection | None:
        selection = self._selections.pop(name, None)
        if selection is not None:
            selection.end()
        return selection

    @torch.no_grad()
    def _check(self, layer: SparseLayer, selection: Selection, index: torch.Tensor) -> None:
        """Counts how many recorded experts the router would not have chosen, and checks what it has chosen now.

        Args:
            layer: the layer.
            selection: the recorded experts.
            index: (T, K) the experts that the router returned.

        Raises:
            ValueError: if the router returned other experts than the recorded ones.
        """
        index = index.reshape(len(selection.index), -1)
        selection.refuse_wider(index.shape[-1])
        wanted = selection.index[:, : index.shape[-1]]
        recorded = wanted != NOT_RECORDED
        # the comparison waits for the device, so that a router which asks for its choice is compared once
        if selection.live is None or layer.name not in self._checked:
            if bool((selection.index[:, index.shape[-1] :] != NOT_RECORDED).any()):
                raise ValueError(
                    f"the record has more experts of a token than the {index.shape[-1]} that the router of {layer.name} chooses: "
                    "record this model"
                )
            if bool((recorded & (wanted != index)).any()):
                raise ValueError(
                    f"the experts of {layer.name} cannot be replayed, because its router does not choose by the scores of its "
                    "experts: choose another router_type or routed_attention, or train without replay."
                )
            self._checked.add(layer.name)
        if selection.live is not None and not in_backward():
            agrees = (wanted[:, :, None] == selection.live[:, None, :]).any(dim=-1)
            counts = torch.stack([(recorded & ~agrees).sum(), recorded.sum()])
            # one sum for each device, since nobody may ever ask for the figures
            before = self._assignments.get(counts.device)
            self._assignments[counts.device] = counts if before is None else before + counts

    def _record(self, frame: BatchFrame) -> _Record:
        """Returns the record of a batch, which all layers share and a repeated layer uses again."""
        if frame not in self._records:
            self._records[frame] = self._find(frame.arguments)
        return self._records[frame]

    def _find(self, given: dict[str, Any]) -> _Record:
        """Looks up each text of a batch; a batch with a key-value cache is a generation, which is not replayed."""
        ids = given.get("input_ids")
        if ids is None or ids.dim() != 2 or cache_of(given) is not None:
            return _Record(None)
        if self._recorder is not None:
            self._recorder.flush()
        rows = ids.cpu()
        texts: list[tuple[int, torch.Tensor, torch.Tensor]] = []
        for row, columns in texts_of(ids, given):
            self._tokens += len(columns)
            experts = self.store.find(rows[row, columns])
            if experts is None:
                continue
            if experts.shape[1] != len(self._layers):
                raise ValueError(
                    f"the record has {experts.shape[1]} sparse layers where the model has {len(self._layers)}: record this model"
                )
            texts.append((row, columns[: len(experts)], experts.long()))
            self._recorded += int((experts >= 0).any(dim=(1, 2)).sum())
        if not texts:
            return _Record(None)
        width = max(experts.shape[-1] for *_, experts in texts)
        found = torch.full((*rows.shape, len(self._layers), width), NOT_RECORDED)
        for row, columns, experts in texts:
            found[row, columns] = pad(experts, (0, width - experts.shape[-1]), value=NOT_RECORDED)
        return _Record(found.flatten(0, 1).to(ids.device))

    def figures(self, across_ranks: bool = True) -> ReplayFigures:
        """Returns what was replayed since the last call; it waits for the device, which no pass does.

        In a distributed run the figures are those of all processes together, and every process must call it; a batch that
        tensor-parallel processes share counts once.

        Args:
            across_ranks: False for the figures of this process alone, which then need not call together with others.
        """
        counts = [count.tolist() for count in self._assignments.values()]
        flipped, assigned = (sum(column) for column in zip((0, 0), *counts, strict=True))
        sums = torch.tensor([self._recorded, self._tokens, flipped, assigned], dtype=torch.float64)
        if across_ranks and is_distributed():
            sums = sum_over_ranks({"sums": sums}, None, not repeats_batch(self._model)).tensors["sums"]
        # a share of nothing is nan
        coverage, flips = (sums[::2] / sums[1::2]).tolist()
        self._tokens = self._recorded = 0
        self._assignments.clear()
        return ReplayFigures(coverage, flips)


def replay_routing(model: nn.Module, store: RoutingStore) -> RoutingReplay:
    """Makes each token of a recorded text use the experts of the record; the weights come from the live router.

    It changes passes without a key-value cache, in training and in evaluation, repeated passes of activation checkpointing
    included. A token that was not recorded chooses by itself. Losses and metrics see the replayed choice.

    Args:
        model: any MoE model whose experts follow transformers' experts interface, also in DDP or FSDP.
        store: the recorded texts, from [`~modeling_moe.replay.record_routing`], or from vLLM by
            [`~modeling_moe.replay.RoutingStore.add_output`].

    Returns:
        A context manager, and a handle with `figures()` and `remove()`.

    Raises:
        UnreachableRouting: a ValueError, if the model is dense, its experts cannot be reached, or depth_layers lets sparse layers
            skip tokens. A pass raises ValueError for a router that does not choose by the scores of its experts, and for a
            record of another model.
    """
    return RoutingReplay(model, store)
