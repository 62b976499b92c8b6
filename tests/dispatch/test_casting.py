"""Triton's experts in fp32 under autocast to fp16: results against float64, gradients in fp32, and each cast counted.

bfloat16, which Triton's interpreter does not round as a GPU does, has one test on the GPU.
"""

import gc
import math
import threading
from contextlib import nullcontext

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from modeling_moe.dispatch import backend_of
from modeling_moe.dispatch.backends.triton import casting, launching
from modeling_moe.dispatch.backends.triton.casting import cast_once
from tests.conftest import NEEDS_GPU, NEEDS_TRITON
from tests.dispatch.kinds import HIDDEN, WIDTH, assert_close, draw, make, oracle, run
from tests.dispatch.test_dispatch import run_compiled, saved_bytes


pytestmark = NEEDS_TRITON
MATRICES = ("gate_up_proj", "down_proj")


def experts(device: str, kind: str = "gated", **fields):
    return make(kind, "moe_triton", dtype=torch.float32, device=device, **fields)


def inputs_on(device: str, tokens: int = 40):
    return draw(tokens, 5, 3, torch.float32, device=device)


def autocast(device: str, dtype: torch.dtype = torch.float16):
    return torch.autocast(device, dtype=dtype)


def train(module, inputs, checkpointing: bool = False) -> list[torch.Tensor]:
    """Returns what `run` does, but adds the gradients to those of the parameters."""
    states, index, weight, direction = inputs
    states = states.detach().requires_grad_()
    with autocast(states.device.type):
        if checkpointing:
            output = checkpoint(module, states, index, weight, use_reentrant=False)
        else:
            output = module(states, index, weight)
    (output * direction).sum().backward()
    return [output, states.grad, *(parameter.grad for parameter in module.parameters())]


def count_casts(module, call) -> dict[str, int]:
    """Counts how often `call` copies each matrix of `module` into another dtype."""
    sizes = {name: getattr(module, name).numel() for name in MATRICES}
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as watched:
        call()
    shapes = [event.input_shapes[0] for event in watched.events() if event.name == "aten::_to_copy"]
    copied = [math.prod(shape) for shape in shapes]
    return {name: copied.count(size) for name, size in sizes.items()}


@pytest.mark.parametrize(
    ("recompute", "once"),
    [
        pytest.param(False, True, id="kept-once"),
        pytest.param(True, False, id="recomputed-each time"),
        pytest.param(False, False, id="kept-each time", marks=pytest.mark.slow),
        pytest.param(True, True, id="recomputed-once", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("kind", ["gated-bias", "plain", "mixtral", "gpt_oss"])
def test_results(kind, recompute, once, device):
    module, inputs = experts(device, kind), inputs_on(device)
    module.config.experts_recompute = recompute
    with cast_once() if once else nullcontext(), autocast(device):
        got = run(module, *inputs)
    assert {tensor.dtype for tensor in got} == {torch.float32}
    assert_close(got, oracle(module, *inputs), 6e-3)
    for gradient in got[3:]:
        # numbers that came through 16 bits are numbers of 16 bits
        assert (gradient != gradient.half().float()).float().mean() > 0.5


@NEEDS_GPU
def test_bfloat16(device):
    module, inputs = experts(device, "gated-bias"), inputs_on(device, 300)
    with cast_once(), autocast(device, torch.bfloat16):
        got = run(module, *inputs)
    assert_close(got, oracle(module, *inputs), 3e-2)
    assert all((gradient != gradient.bfloat16().float()).float().mean() > 0.5 for gradient in got[3:])


@pytest.mark.parametrize("kind", ["gated", "gpt_oss"])
def test_sharing_changes_no_bit(kind, device):
    module, inputs = experts(device, kind), inputs_on(device)
    with autocast(device):
        expected = run(module, *inputs)
        with cast_once():
            torch.testing.assert_close(run(module, *inputs), expected, atol=0, rtol=0)
            torch.testing.assert_close(run(module, *inputs), expected, atol=0, rtol=0)


@pytest.mark.parametrize("kind", ["gated", "gpt_oss"])  # gpt-oss's matrices are transposed for each call
@pytest.mark.parametrize(("checkpointing", "passes"), [(False, 2), (True, 3)], ids=["kept", "checkpointed"])
def test_one_cast_for_all_micro_batches(kind, checkpointing, passes, device):
    module, inputs = experts(device, kind), inputs_on(device, 6)

    def step():
        for _ in range(2):
            train(module, inputs, checkpointing)

    def step_within():
        with cast_once():
            step()

    assert count_casts(module, step) == dict.fromkeys(MATRICES, 2 * passes)
    assert count_casts(module, step_within) == dict.fromkeys(MATRICES, 1)


def test_threads_share_the_copies(device):
    module, inputs = experts(device), inputs_on(device)

    with cast_once():
        thread = threading.Thread(target=train, args=(module, inputs))
        thread.start()
        thread.join()
        assert count_casts(module, lambda: train(module, inputs)) == dict.fromkeys(MATRICES, 0)


def test_micro_batches_add_up(device):
    module, inputs = experts(device), inputs_on(device)
    expected = oracle(module, *inputs)
    with cast_once():
        for _ in range(3):
            got = train(module, inputs)
    assert_close([got[0], *(gradient / 3 for gradient in got[2:])], [expected[0], *expected[3:]], 6e-3)


def output_of(module, inputs) -> torch.Tensor:
    with autocast(inputs[0].device.type):
        return module(*inputs[:3]).detach()


def test_a_step_in_place_is_seen_within(device):
    module, inputs = experts(device), inputs_on(device)
    with cast_once():
        before = output_of(module, inputs)
        torch.optim.SGD(module.parameters(), lr=0.0).step()
        with torch.no_grad():
            module.down_proj.mul_(2)
        torch.testing.assert_close(output_of(module, inputs), 2 * before, atol=0, rtol=0)


def test_what_is_written_behind_autograd_is_seen_after(device):
    module, inputs = experts(device), inputs_on(device)
    with cast_once():
        before = output_of(module, inputs)
    module.down_proj.data.mul_(2)
    with cast_once():
        torch.testing.assert_close(output_of(module, inputs), 2 * before, atol=0, rtol=0)
        module.down_proj.data = module.down_proj.data * 2
        torch.testing.assert_close(output_of(module, inputs), 4 * before, atol=0, rtol=0)
    module.down_proj.data.mul_(2)
    torch.testing.assert_close(output_of(module, inputs), 8 * before, atol=0, rtol=0)


def gone(copies: list[StorageWeakRef]) -> bool:
    """Returns True if no copy is left; Triton's interpreter leaves its arguments to the garbage collector."""
    gc.collect()
    return all(copy.expired() for copy in copies)


def copies_of_a_pass(module, inputs) -> list[StorageWeakRef]:
    """Returns references to the memory of the 16-bit matrices that a pass multiplies."""
    seen = []

    def record(launch):
        matrices = [each for each in launch.arguments.values() if isinstance(each, torch.Tensor) and each.dim() == 3]
        seen.extend(StorageWeakRef(each.untyped_storage()) for each in matrices if each.dtype == torch.float16)
        launch.run()

    with launching.intercepted(record):
        output_of(module, inputs)
    return seen


def test_leaving_drops_the_copies(device):
    module, inputs = experts(device), inputs_on(device)
    assert len(copies_of_a_pass(module, inputs)) == 2
    assert gone(copies_of_a_pass(module, inputs))
    with cast_once():
        with cast_once():  # the outer one keeps the copies
            copies = copies_of_a_pass(module, inputs)
        gc.collect()
        assert not any(copy.expired() for copy in copies)
        again = copies_of_a_pass(module, inputs)
        assert {copy.cdata for copy in again} == {copy.cdata for copy in copies}
        del module
        assert gone(copies)
        module = experts(device)
        copies = copies_of_a_pass(module, inputs)
    assert gone(copies)
    with pytest.raises(ZeroDivisionError), cast_once():
        raise ZeroDivisionError
    assert not casting._open


def test_nothing_in_16_bits_is_saved(device):
    """Autograd saves h, the input in 16 bits and the expert order, and no copy of a matrix, also within `cast_once`."""
    module, (states, index, weight, _) = experts(device), inputs_on(device)
    known = [states, weight, *module.parameters()]
    weight.requires_grad_()
    expected = 2 * 40 * 3 * 2 * WIDTH + 2 * 40 * HIDDEN + 4 * (40 * 3 + 5 + 1)
    for context in (nullcontext(), cast_once()):
        with context, autocast(device):
            assert saved_bytes(lambda: module(states, index, weight), *known) == expected


def test_decoding_casts_no_matrix(device):
    module, inputs = experts(device, "gated-bias"), inputs_on(device, 4)
    got = []

    def decode():
        with torch.no_grad():
            got.append(output_of(module, inputs))
            assert backend_of(module, *inputs[:2], backend="triton") == "triton (decode)"

    assert count_casts(module, decode) == dict.fromkeys(MATRICES, 0)
    assert_close(got, oracle(module, *inputs)[:1], 2e-3)


def test_frozen_and_16_bit_experts(device):
    """Frozen experts get no gradient, and experts in the dtype of autocast are not cast."""
    module, inputs = experts(device).requires_grad_(False), inputs_on(device)
    states = inputs[0].requires_grad_()
    with cast_once(), autocast(device):
        (gradient,) = torch.autograd.grad((module(states, *inputs[1:3]) * inputs[3]).sum(), states)
    reference = experts(device)
    assert_close([gradient], [oracle(reference, *inputs)[1]], 6e-3)
    assert count_casts(module.half(), lambda: output_of(module, inputs)) == dict.fromkeys(MATRICES, 0)


def test_compiles_whole(device):
    module, inputs = experts(device, "gated-bias"), inputs_on(device)
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with autocast(device), cast_once():
        expected = run(module, *inputs)
        got = run_compiled(compiled, module, *inputs)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@NEEDS_GPU
def test_a_cuda_graph_casts_for_itself(device):
    """A graph that was captured within `cast_once` outlives the copies."""
    torch.use_deterministic_algorithms(False)
    module, inputs = experts(device).requires_grad_(False), inputs_on(device)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with cast_once():
        expected = output_of(module, inputs)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            output_of(module, inputs)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            captured = output_of(module, inputs)
    module.down_proj.data.mul_(2)
    graph.replay()
    torch.testing.assert_close(captured, 2 * expected, atol=0, rtol=0)
