# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module loads the experts that the next sparse layer will probably need, while a sparse layer computes.

The next layer's own router predicts them from the state of the layer that runs (mixtral-offloading, arXiv:2312.17238; Fate,
arXiv:2502.12224). The prediction decides what is loaded ahead, never what is computed: the next layer's router runs again at
its turn, and the cache loads what is missing.
"""

import re
from collections.abc import Callable, Collection, Mapping, Sized
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple, NoReturn, Protocol
from weakref import finalize

import torch
from torch import nn
from transformers.utils import logging

from ..attention_experts import attends
from ..monitoring import ModelHook, SparseLayer, sparse_layers
from .attaching import OffloadedModule
from .prediction import NoPrediction, RouterTwin
from .worker import Task, Worker


logger = logging.get_logger(__name__)


class Slots(Protocol):
    """Slots are the memory of a cache."""

    @property
    def experts(self) -> Sized:
        """One entry for each slot."""
        ...


class PrefetchTarget(Protocol):
    """A PrefetchTarget is the part of a layer's expert cache that the prefetcher uses."""

    @property
    def slots(self) -> Slots:
        """The memory of the cache."""
        ...

    def prefetch(self, experts: Collection[int]) -> None:
        """Loads experts into slots that the running pass does not need; may be called by any thread."""


class _Step(NamedTuple):
    """What a sparse layer does for the next one.

    Attributes:
        name: qualified name of the next layer's experts.
        twin: twin of the next layer's router.
        cache: cache of the next layer.
    """

    name: str
    twin: RouterTwin
    cache: PrefetchTarget


class Prefetcher:
    """Loads experts ahead of each sparse layer of a model, in one thread, until the model is deleted or [`Prefetcher.close`].

    When the experts of a layer are called, the thread runs a twin of the next layer's router on the input of the layer's own
    router, and asks the next layer's cache for the experts that the twin chooses. Results do not change: the twin has no effect
    on the router, and the cache decides by the true choice. A prediction that comes too late is dropped. Passes that record
    gradients, compiled passes and the first sparse layer get no prefetch.

    On a GPU the twin runs on a stream of its own, which is current when the cache is asked, so that copies run beside the
    computation. The cache must call no expert resident before its copy has ended. This part was written without a GPU and never
    ran on one.

    An error in the thread never reaches the model: the layer gets no prefetch from then on, and the reason is logged once. A copy
    of the model has no prefetch.

    Args:
        model: any model of transformers whose experts follow its experts interface.
        caches: qualified name of an experts module -> the cache of the layer; layers without a cache get no prefetch.
        extra: number of experts to load beyond those that the twin chooses, by the next largest router logits.

    Attributes:
        reasons: qualified name of an experts module -> why the layer gets no prefetch.

    Raises:
        UnreachableRouting: if the model is dense, or its experts cannot be reached.
        ValueError: if `extra` is negative.
    """

    def __init__(self, model: nn.Module, caches: Mapping[str, PrefetchTarget], *, extra: int = 0):
        if extra < 0:
            raise ValueError(f"extra is {extra}: the number of further experts to load must be at least 0")
        self.reasons: dict[str, str] = {}
        self._extra = extra
        self._inputs: dict[str, torch.Tensor] = {}  # of the routers, until their experts are called
        self._streams: dict[torch.device, Any] = {}
        self._handles: list = []
        self._worker = Worker("expert prefetch")
        offloadable = [layer for layer in sparse_layers(model) if not attends(layer.experts)]
        for layers in _sequences(offloadable):
            for layer, following in pairwise(layers):
                self._watch(layer, self._step_to(following, caches))
            self._watch(layers[-1], None)
        # the thread knows nothing of the model, so the model's end ends the thread; so does the interpreter's
        self._ending = finalize(model, self._worker.close)

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Prefetcher cannot be copied or pickled: it belongs to one model in one process")

    def close(self) -> None:
        """Removes the hooks and ends the thread; a second call does nothing."""
        while self._handles:
            self._handles.pop().remove()
        self._inputs.clear()
        self._ending()

    def wait(self) -> None:
        """Waits until nothing is being loaded ahead."""
        self._worker.wait()

    def _step_to(self, layer: SparseLayer, caches: Mapping[str, PrefetchTarget]) -> _Step | None:
        """Returns what the layer before does for a layer; None if the layer gets no prefetch."""
        if layer.name not in caches:
            return None
        try:
            return _Step(layer.name, RouterTwin(layer), caches[layer.name])
        except NoPrediction as error:
            self._refuse(layer.name, str(error))
            return None

    def _refuse(self, name: str, reason: str) -> None:
        """Notes why a layer gets no prefetch, and logs each reason once, with the first layer that it holds for."""
        if reason not in self.reasons.values():
            logger.warning(f"{name} gets no prefetch: {reason}.")
        self.reasons[name] = reason

    def _watch(self, layer: SparseLayer, step: _Step | None) -> None:
        """Adds the hooks of a layer: on its router, whose input is kept, and on its experts, whose call starts the task."""

        def keep(module: nn.Module, args: tuple, output: Any) -> None:
            if args and isinstance(args[0], torch.Tensor) and not torch.is_grad_enabled():
                self._inputs[layer.name] = args[0]

        def begin(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            if not torch.compiler.is_compiling():
                self._begin(step, self._inputs.pop(layer.name, None), (*args, *kwargs.values()))

        if step is not None and layer.router is not None:
            self._handles.append(layer.router.register_forward_hook(ModelHook(keep)))
        self._handles.append(layer.experts.register_forward_pre_hook(ModelHook(begin), with_kwargs=True))

    def _begin(self, step: _Step | None, states: torch.Tensor | None, values: tuple[Any, ...]) -> None:
        """Starts to load for the next layer, and drops what is left to load for the layer that runs."""
        index = next((v for v in values if isinstance(v, torch.Tensor) and not v.is_floating_point()), None)
        if step is None or step.name in self.reasons or states is None or index is None:
            self._worker.drop()
        else:
            self._worker.submit(self._task(step, states, index.shape[-1]))

    def _task(self, step: _Step, states: torch.Tensor, top_k: int) -> Task:
        """Returns the task that predicts and loads for the next layer."""
        predict = partial(step.twin.predict, states, top_k, self._extra, len(step.cache.slots.experts))
        return self._steps(step, predict, _autocast(states.device.type), self._stream_for(states))

    def _stream_for(self, states: torch.Tensor) -> Callable[[], AbstractContextManager]:
        """Returns the context in which the thread works: on CUDA a stream that waits for the states, elsewhere none."""
        device = states.device
        if device.type != "cuda":
            return nullcontext
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        stream = self._streams[device]
        stream.wait_event(torch.cuda.current_stream(device).record_event())
        states.record_stream(stream)
        return partial(torch.cuda.stream, stream)

    def _steps(
        self,
        step: _Step,
        predict: Callable[[], list[int]],
        autocast: AbstractContextManager,
        stream: Callable[[], AbstractContextManager],
    ) -> Task:
        """Predicts, then loads; an error of either is noted."""
        try:
            with stream(), autocast:
                experts = predict()
            yield
            with stream():
                step.cache.prefetch(experts)
        except NoPrediction as error:
            self._refuse(step.name, str(error))
        except Exception as error:
            self._refuse(step.name, f"the experts cannot be loaded ahead ({type(error).__name__}: {error})")


def prefetch_experts(model: nn.Module, *, extra: int = 0) -> Prefetcher:
    """Loads the experts of an offloaded model ahead of each sparse layer, in a thread, from now on.

    Example:
        >>> offload_experts(model, slots=8)
        >>> prefetcher = prefetch_experts(model)
        >>> model.generate(**inputs)
        >>> offload_statistics(model).total.prefetch_precision

    Args:
        model: a model of [`~modeling_moe.offload.offload_experts`].
        extra: number of experts to load beyond those that the next router chooses. More of them are there in time, and more
            bytes are read in vain.

    Returns:
        The prefetcher, which ends with the model or with `close()`.

    Raises:
        ValueError: if the model is not offloaded, or `extra` is negative.
    """
    caches = {
        name: module.offloaded.cache for name, module in model.named_modules() if isinstance(module, OffloadedModule)
    }
    if not caches:
        raise ValueError(f"{type(model).__name__} is not offloaded: call offload_experts first")
    return Prefetcher(model, caches, extra=extra)


def _sequences(layers: list[SparseLayer]) -> list[list[SparseLayer]]:
    """Divides the layers into sequences whose names differ in numbers only, as of an encoder and of a decoder."""
    sequences: dict[str, list[SparseLayer]] = {}
    for layer in layers:
        sequences.setdefault(re.sub(r"\d+", "#", layer.name), []).append(layer)
    return list(sequences.values())


def _autocast(device_type: str) -> AbstractContextManager:
    """Returns the autocast of the calling thread, for another thread."""
    if not torch.is_autocast_enabled(device_type):
        return nullcontext()
    return torch.autocast(device_type, torch.get_autocast_dtype(device_type))
