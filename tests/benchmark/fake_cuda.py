"""This module fakes a GPU: CUDA devices are the CPU, torch.cuda is replaced, and Triton's kernels are interpreted.

    python -m tests.benchmark.fake_cuda -m moe_benchmark.gpu kernels --size tiny

runs a module with it. The times mean nothing; the run executes every line that a run on a real GPU executes.
"""

import contextlib
import functools
import os
import runpy
import sys
import time
import types

import pytest


NAME = "NVIDIA H200"
SYNCHRONISING = (
    "item",
    "tolist",
    "nonzero",
    "unique",
    "masked_select",
    "__bool__",
    "__int__",
    "__float__",
    "__index__",
)


class Event:
    def __init__(self, enable_timing=False):
        self.at = None

    def record(self, *_):
        self.at = time.perf_counter()

    def elapsed_time(self, other):
        return 1e3 * (other.at - self.at) + 1e-6


class Stream:
    def wait_stream(self, other):
        pass


class Graph:
    """A fake CUDA graph: the captured calls have run already, and replaying does nothing."""

    def replay(self):
        pass


def _mode(torch, state):
    cpu = torch.device("cpu")

    def moved(value):
        if isinstance(value, torch.device) and value.type == "cuda":
            return cpu
        return "cpu" if isinstance(value, str) and value.startswith("cuda") else value

    class ToCpu(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            kwargs = kwargs or {}
            if function is torch.device:
                return function(*args, **kwargs)
            if state["sync"] == "error" and getattr(function, "__name__", "") in SYNCHRONISING:
                raise RuntimeError(f"called a synchronizing CUDA operation: {function.__name__}")
            return function(*map(moved, args), **{key: moved(value) for key, value in kwargs.items()})

    return ToCpu()


def _patch_torch(patch, torch, state):
    cuda = torch.cuda
    properties = types.SimpleNamespace(name=NAME, major=9, minor=0, multi_processor_count=132, total_memory=139 << 30)
    found = {
        "is_available": lambda: True,
        "Event": Event,
        "Stream": Stream,
        "CUDAGraph": Graph,
        "stream": lambda stream: contextlib.nullcontext(),
        "graph": lambda graph: contextlib.nullcontext(),
        "current_stream": lambda *_: Stream(),
        "current_device": lambda: 0,
        "synchronize": lambda *_: None,
        "empty_cache": lambda: None,
        "get_device_name": lambda *_: NAME,
        "get_device_capability": lambda *_: (9, 0),
        "get_device_properties": lambda *_: properties,
        "reset_peak_memory_stats": lambda *_: None,
        "memory_allocated": lambda *_: 0,
        "max_memory_allocated": lambda *_: 1000,
        "set_sync_debug_mode": lambda mode: state.update(sync=mode),
    }
    for name, value in found.items():
        patch.setattr(cuda, name, value)

    class Generator(torch.Generator):
        def __new__(cls, device="cpu"):
            return super().__new__(cls, "cpu")

    patch.setattr(torch, "Generator", Generator)
    compile_really = torch.compile

    def compile(module, **options):
        compiled = compile_really(module, backend="eager", **options)

        def call(*arguments):
            # the compiler asks the GPU for more than is faked here
            with pytest.MonkeyPatch.context() as inner, torch._C.DisableTorchFunction():
                inner.setattr(cuda, "is_available", lambda: False)
                return compiled(*arguments)

        return call

    patch.setattr(torch, "compile", compile)


def _patch_package(patch, torch, mode):
    from moe_benchmark import measure
    from moe_benchmark.gpu import capturing, precompile

    from modeling_moe.dispatch import interface
    from modeling_moe.dispatch.backends.triton import launching, tiles
    from modeling_moe.dispatch.backends.triton.backend import TritonBackend

    choose, run = interface.choose, launching.Launch.run

    def run_outside(launch):
        # calls of the interpreter are not recorded
        with torch._C.DisableTorchFunction():
            run(launch)

    def watched(call):
        # torch disables its modes inside an operator
        @functools.wraps(call)
        def within(*arguments, **options):
            with mode():
                return call(*arguments, **options)

        return within

    def make_small_clock(clock, device):
        # emptying buffers as large as a GPU's caches would take more than a second
        clock.device, clock.source, clock.target = device, torch.zeros(1024), torch.zeros(1024)
        clock.copied_bytes = 8192

    patch.setattr(measure.Clock, "__init__", make_small_clock)
    for name in ("order_by_expert", "forward", "backward", "decode"):
        patch.setattr(TritonBackend, name, watched(getattr(TritonBackend, name)))
    patch.setattr(interface, "choose", lambda backend, problem: choose(backend or "triton", problem))
    patch.setattr(launching.Launch, "run", run_outside)
    patch.setattr(tiles, "_family_of_gpu", lambda index: "hopper")
    # a real capture runs nothing, and each replay runs the call once
    patch.setattr(capturing, "capture", lambda call: call)
    patch.setattr(precompile, "describe_gpu", lambda: "sm_90")


@contextlib.contextmanager
def faked():
    """Fakes the GPU within the body; modules that it uses must be imported before."""
    import moe_benchmark.gpu.adapters  # noqa: F401
    import torch

    state = {"sync": "default"}
    with pytest.MonkeyPatch.context() as patch:
        _patch_package(patch, torch, lambda: _mode(torch, state))
        _patch_torch(patch, torch, state)
        with _mode(torch, state):
            yield


def main():
    """Runs `python -m MODULE ARGUMENTS`; parts that compile for a GPU run without the interpreter."""
    _, module, *arguments = sys.argv[1:]
    os.environ["TRITON_INTERPRET"] = "0" if "precompile" in arguments else "1"
    sys.argv = [module, *arguments]
    with faked():
        runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
