# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""Time and memory of calls that take turns."""

import statistics
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch


MAX_ROUNDS = 50
# least rounds of a case on a GPU, where a round takes a second at most
MIN_CUDA_ROUNDS = 3


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that the device or the host has no memory left."""
    messages = ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(text in str(error) for text in messages)


@dataclass(frozen=True)
class Failure:
    """What went wrong, as text: an exception would keep the tensors of its frames alive.

    Attributes:
        message: its first line.
        traceback: where it was raised.
        out_of_memory: whether there was only no memory left.
    """

    message: str
    traceback: str
    out_of_memory: bool

    @classmethod
    def of(cls, error: BaseException) -> "Failure":
        """The text of `error`."""
        text = str(error).strip() or type(error).__name__
        exhausted = is_out_of_memory(error)
        message = "out of memory" if exhausted else text.splitlines()[0][:300]
        return cls(message, "".join(traceback.format_exception(error)), exhausted)


@dataclass(frozen=True)
class Contestant:
    """Something to time.

    Attributes:
        name: in the table.
        run: what is timed.
        prepare: what comes before each run, outside the time.
    """

    name: str
    run: Callable[[], Any]
    prepare: Callable[[], object] = lambda: None


class Clock:
    """Times calls on one device, and copies memory on it.

    Attributes:
        copied_bytes: read plus written by one `copy`; larger than any cache.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.source = torch.zeros((256 if device.type == "cuda" else 64) << 20, dtype=torch.uint8, device=device)
        self.target = torch.zeros_like(self.source)
        self.copied_bytes = 2 * self.source.nbytes

    def copy(self) -> None:
        """Moves `copied_bytes`, and with them whatever the caches held."""
        self.target.copy_(self.source)

    def time(self, run: Callable[[], Any]) -> float:
        """Milliseconds of one call, its launches included."""
        if self.device.type != "cuda":
            start = time.perf_counter()
            result = run()
            elapsed = time.perf_counter() - start
            del result
            return 1e3 * elapsed
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self.device)
        start.record()
        result = run()
        end.record()
        torch.cuda.synchronize(self.device)
        del result
        return start.elapsed_time(end)


def interleave(
    contestants: Sequence[Contestant], clock: Clock, rounds: int | None, seconds: float, cold: bool
) -> tuple[dict[str, list[float]], dict[str, Failure]]:
    """Times all contestants once in each round, so that what disturbs the machine disturbs them alike.

    Args:
        contestants: in the order of their turns.
        clock: of their device.
        rounds: how many; if not given as many as fit into `seconds`, at most `MAX_ROUNDS`, and at least one, on a GPU
            `MIN_CUDA_ROUNDS`.
        seconds: length of the measurement without `rounds`.
        cold: empty the caches before each call, as the other layers of a model would.

    Returns:
        For each contestant the milliseconds of each round, and for those that failed in any round the failure in their
        place. A first round to warm up is left out, unless it is so long on a CPU that there is no time for another.
    """
    times: dict[str, list[float]] = {contestant.name: [] for contestant in contestants}
    failed: dict[str, Failure] = {}
    least = MIN_CUDA_ROUNDS if clock.device.type == "cuda" else 1

    def enough() -> bool:
        if rounds is not None:
            return done >= rounds
        return done >= least and (done >= MAX_ROUNDS or time.perf_counter() - start >= seconds)

    start, done = time.perf_counter(), 1
    _turn(contestants, clock, cold, times, failed)
    if rounds is not None or least > 1 or time.perf_counter() - start < seconds / 4:
        for measured in times.values():
            measured.clear()
        start, done = time.perf_counter(), 0
    while times and not enough():
        _turn(contestants, clock, cold, times, failed)
        done += 1
    return times, failed


def _turn(
    contestants: Sequence[Contestant],
    clock: Clock,
    cold: bool,
    times: dict[str, list[float]],
    failed: dict[str, Failure],
) -> None:
    """Times each contestant once, save those that have `failed`, and moves those that fail now there."""
    for contestant in contestants:
        name = contestant.name
        if name in failed:
            continue
        try:
            contestant.prepare()
            if cold:
                clock.copy()
            times[name].append(clock.time(contestant.run))
        except Exception as error:
            failed[name] = Failure.of(error)
            del times[name]


def median_ratio(numerators: Iterable[float], denominators: Iterable[float]) -> float:
    """Median over the rounds of the ratio of two contestants in the same round."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


def saved_bytes(forward: Callable[[], Any], excluded: Iterable[torch.Tensor]) -> int:
    """Bytes that a forward pass keeps for backward.

    Args:
        forward: builds a graph and returns its end.
        excluded: tensors that live anyhow, parameters and inputs; what aliases them does not count.

    Returns:
        Sum over the distinct storages, each counted whole, since it is kept whole.
    """
    alive = {tensor.untyped_storage().data_ptr() for tensor in excluded}
    kept: dict[int, int] = {}
    tensors = []  # keeps a storage from being freed and its address from being given to another

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.nbytes() and storage.data_ptr() not in alive:
            kept[storage.data_ptr()] = storage.nbytes()
        tensors.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    del output
    return sum(kept.values())


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int:
    """Most CUDA memory that a call holds beyond what was held before it."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = run()
    torch.cuda.synchronize(device)
    del result
    return torch.cuda.max_memory_allocated(device) - before
