# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module measures time and memory of calls that take turns."""

import statistics
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch


MAX_ROUNDS = 50
# smallest number of rounds on a GPU, where a round takes at most a second
MIN_CUDA_ROUNDS = 3


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether `error` reports that the device or the host has no memory left."""
    messages = ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(text in str(error) for text in messages)


@dataclass(frozen=True)
class Failure:
    """Describes a failure as text, because an exception would keep the tensors of its frames alive.

    Attributes:
        message: first line of the error.
        traceback: traceback of the error.
        out_of_memory: whether the only cause is missing memory.
    """

    message: str
    traceback: str
    out_of_memory: bool

    @classmethod
    def of(cls, error: BaseException) -> "Failure":
        """Returns the description of `error`."""
        text = str(error).strip() or type(error).__name__
        exhausted = is_out_of_memory(error)
        message = "out of memory" if exhausted else text.splitlines()[0][:300]
        return cls(message, "".join(traceback.format_exception(error)), exhausted)


@dataclass(frozen=True)
class Contestant:
    """Describes something to time.

    Attributes:
        name: name in tables.
        run: function that is timed.
        prepare: function that is called before each run and not timed.
    """

    name: str
    run: Callable[[], Any]
    prepare: Callable[[], object] = lambda: None


class Clock:
    """Times calls on one device, and copies memory on it.

    Attributes:
        copied_bytes: number of bytes that one `copy` reads and writes; larger than any cache.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.source = torch.zeros((256 if device.type == "cuda" else 64) << 20, dtype=torch.uint8, device=device)
        self.target = torch.zeros_like(self.source)
        self.copied_bytes = 2 * self.source.nbytes

    def copy(self) -> None:
        """Moves `copied_bytes` bytes, and so replaces the contents of all caches."""
        self.target.copy_(self.source)

    def time(self, run: Callable[[], Any]) -> float:
        """Returns the time of one call in milliseconds, including its launches."""
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
    """Times all contestants once in each round, so that disturbances of the machine affect all alike.

    Args:
        contestants: contestants in the order of their turns.
        clock: clock of their device.
        rounds: number of rounds; without it as many as fit into `seconds`, at most `MAX_ROUNDS`, at least one on a
            CPU and `MIN_CUDA_ROUNDS` on a GPU.
        seconds: length of the measurement without `rounds`.
        cold: whether caches are emptied before each call, as the other layers of a model would do.

    Returns:
        The milliseconds of each round by contestant, and the failures of contestants that failed in any round. The
            first
        round is a warm-up and omitted, unless it is so long on a CPU that there is no time for another.
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
    """Times each contestant once, except those in `failed`; a contestant that fails is moved there."""
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
    """Returns the median over rounds of the ratio of two contestants in one round."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


def saved_bytes(forward: Callable[[], Any], excluded: Iterable[torch.Tensor]) -> int:
    """Returns the number of bytes that a forward pass saves for backward.

    Args:
        forward: function that builds a graph and returns its output.
        excluded: tensors that exist without the pass, such as parameters and inputs; their storages are not counted.

    Returns:
        Sum of the sizes of all distinct storages; a storage is counted in full, because all of it is kept.
    """
    alive = {tensor.untyped_storage().data_ptr() for tensor in excluded}
    kept: dict[int, int] = {}
    tensors = []  # keeps storages alive, so that no address is used twice

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
    """Returns the peak of CUDA memory during a call, minus the memory allocated before it."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = run()
    torch.cuda.synchronize(device)
    del result
    return torch.cuda.max_memory_allocated(device) - before
