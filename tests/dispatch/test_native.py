"""These tests check the C back end: products at sizes beyond their blocks, other processors' instructions, any number
of threads, the agreement of its structures with Python, and machines where it cannot be compiled.
"""

import ctypes
import hashlib
import logging
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from modeling_moe.dispatch import backend_of
from modeling_moe.dispatch.backends import BACKENDS
from modeling_moe.dispatch.backends.native import NativeBackend, compiling, structures
from modeling_moe.dispatch.expert_order import order_by_expert
from modeling_moe.dispatch.problem import ExpertsProblem, Needs
from tests.dispatch.kinds import NEEDS_NATIVE, OURS, SHAPES, THEIRS, assert_close, draw, make, oracle, run


ALL = Needs(**dict.fromkeys(Needs._fields[:6], True))
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
SERVED = [kind for kind in [*OURS, *THEIRS] if kind != "gelu"]
# rows, sums and columns of more than one block; odd ones
BLOCKS = {
    "many rows": {"tokens": 600, "experts": 2, "top_k": 1, "hidden": 48, "width": 40},
    "long sums": {"tokens": 1300, "experts": 1, "top_k": 1, "hidden": 1100, "width": 264},
    "odd": {"tokens": 97, "experts": 3, "top_k": 2, "hidden": 51, "width": 37},
    "several waves": {"tokens": 6000, "experts": 3, "top_k": 2, "hidden": 24, "width": 20},
    "few rows": {"tokens": 30, "experts": 20, "top_k": 4, "hidden": 70, "width": 65},
}


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@NEEDS_NATIVE
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", SERVED)
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_kinds(kind, shape, recompute):
    sizes = SHAPES[shape]
    module = make(kind, "moe", sizes["experts"], dtype=torch.float32)
    module.config.experts_recompute = recompute
    inputs = draw(**sizes, dtype=torch.float32)
    assert backend_of(module, *inputs[:2]) == "native"
    assert_close(run(module, *inputs), oracle(module, *inputs), TOLERANCES[torch.float32])
    with torch.no_grad():
        few = [tensor[:4] for tensor in inputs[:3]]
        expected = "native" if kind == "gpt_oss" else "native (decode)"  # gpt-oss's matrices are transposed
        assert backend_of(module, *few[:2]) == expected
        output = module(*few[:1], few[1].int(), few[2])
    assert_close([output], [oracle(module, *inputs)[0][:4]], TOLERANCES[torch.float32])


def expected_and_got(dtype, tokens, experts, top_k, hidden, width, transposed=False, native=BACKENDS["native"]):
    """Returns output, gradients and decoded output, by the loop in float64 and by `native` on equal numbers."""
    generator = torch.Generator().manual_seed(0)

    def normal(*size):
        return torch.randn(*size, generator=generator).div_(size[-1] ** 0.5).to(dtype)

    up, down = normal(experts, 2 * width, hidden), normal(experts, hidden, width)
    if transposed:
        up, down = (matrices.mT.contiguous().mT for matrices in (up, down))
    tensors = [normal(tokens, hidden), up, down, normal(experts, 2 * width), normal(experts, hidden)]
    grad, weight = normal(tokens, hidden), torch.rand(tokens, top_k, generator=generator)
    index = torch.randint(experts + 1, (tokens, top_k), generator=generator)
    order = order_by_expert(index, experts)

    def both(backend, tensors, weight, grad):
        x, *parameters = tensors
        problem = ExpertsProblem(x, weight, *parameters, "silu_gated", [])
        output, h = backend.forward(problem, order, True)
        return [output, *backend.backward(problem, order, grad, h, ALL)[:6]]

    expected = both(BACKENDS["loop"], [tensor.double() for tensor in tensors], weight.double(), grad.double())
    got = both(native, tensors, weight, grad)
    if not transposed:
        x, *parameters = tensors
        expected.append(expected[0][:16])
        problem = ExpertsProblem(x[:16], weight[:16], *parameters, "silu_gated", [])
        got.append(native.decode(problem, index[:16]))
    return expected, got


@NEEDS_NATIVE
@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("shape", BLOCKS)
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_blocks(dtype, shape, transposed):
    expected, got = expected_and_got(dtype, **BLOCKS[shape], transposed=transposed)
    assert got[3].stride() == ((got[3][0].numel(), 1, got[3].shape[1]) if transposed else got[3].contiguous().stride())
    assert_close(got, expected, TOLERANCES[dtype])


def processors() -> dict[str, list[str]]:
    """Returns the compiler's options for torch's CPU capability and for lesser ones."""
    names, capability = list(compiling.PROCESSORS), torch.backends.cpu.get_cpu_capability()
    served = names[: names.index(capability) + 1] if capability in names else []
    return {"any": []} | {name: compiling.PROCESSORS[name] for name in served}


@NEEDS_NATIVE
@pytest.mark.parametrize("processor", processors())
@pytest.mark.parametrize("shape", ["odd", "few rows"])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_other_processors(dtype, shape, processor, monkeypatch, tmp_path):
    monkeypatch.setattr(compiling.constants, "HF_HOME", tmp_path)
    library = compiling.load(compiling.compiled(dtype, processors()[processor]), dtype)
    expected, got = expected_and_got(dtype, **BLOCKS[shape], native=NativeBackend(lambda dtype: library))
    assert_close(got, expected, TOLERANCES[dtype])


@NEEDS_NATIVE
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_result_does_not_depend_on_threads(dtype):
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(
                [expected_and_got(dtype, **BLOCKS[shape])[1] for shape in ("several waves", "odd", "few rows")]
            )
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], atol=0, rtol=0)


@NEEDS_NATIVE
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "relu", "relu2"])
def test_activations_far_from_zero(activation):
    """An expert of width one computes the activation of one number, and backward its derivative."""
    x = torch.cat([torch.linspace(-120, 120, 4001), torch.linspace(-1, 1, 2001)])[:, None]
    ones, order = torch.ones(1, 1, 1), order_by_expert(torch.zeros(len(x), 1, dtype=torch.long), 1)
    results = []
    for backend, dtype in ((BACKENDS["loop"], torch.float64), (BACKENDS["native"], torch.float32)):
        tensors = [each.to(dtype) for each in (x, torch.ones(len(x), 1), ones, ones)]
        problem = ExpertsProblem(*tensors, None, None, activation, [])
        output, h = backend.forward(problem, order, True)
        results.append((output, backend.backward(problem, order, torch.ones_like(output), h, Needs(x=True)).x))
    for exact, got in zip(*results, strict=True):
        torch.testing.assert_close(got.double(), exact, atol=2e-7, rtol=2e-6)


@NEEDS_NATIVE
def test_nan_and_infinity_reach_the_output():
    module = make("gated", "moe", dtype=torch.float32)
    states, index, weight, _ = draw(40, 5, 3, torch.float32)
    states[3, 1], states[20, 2] = float("nan"), float("inf")
    for output in (module(states, index, weight), module(states[:16], index[:16], weight[:16])):
        bad = output.isnan().all(dim=1).nonzero().flatten().tolist()
        assert bad == [row for row in (3, 20) if row < len(output)]


@NEEDS_NATIVE
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_structures_of_c_are_those_of_python(dtype):
    library = compiling.load(compiling.compiled(dtype, compiling.processor_flags()), dtype)
    assert library.scratch_words.restype is ctypes.c_long
    # loading a library of another dtype finds that the elements have another size
    other = torch.bfloat16 if dtype == torch.float32 else torch.float32
    with pytest.raises(
        RuntimeError, match=r"experts.c has the constant \d for sizeof\(Element\) and structures.py has \d: "
    ):
        compiling.load(compiling.compiled(dtype, compiling.processor_flags()), other)


@pytest.mark.parametrize("expected", [structures.expected_sizes(), structures.expected_constants(torch.float32)])
def test_a_structure_that_differs_is_refused(expected):
    numbers = list(expected.values())
    structures.check_agreement("size", expected, numbers)
    for place, name in enumerate(expected):
        changed = [number + (place == other) for other, number in enumerate(numbers)]
        with pytest.raises(
            RuntimeError, match=f"the size {numbers[place] + 1} for {re.escape(name)} and .* reinstall"
        ):
            structures.check_agreement("size", expected, changed)
    with pytest.raises(ValueError, match="shorter"):
        structures.check_agreement("size", expected, numbers[:-1])


def test_without_gcc(monkeypatch):
    monkeypatch.setattr(compiling.shutil, "which", lambda name: None)
    assert compiling.native_library.__wrapped__(torch.float32) is None
    monkeypatch.setitem(BACKENDS, "native", NativeBackend(lambda dtype: None))
    module = make("gated", "moe_native", dtype=torch.float32)
    inputs = draw(40, 5, 3, torch.float32)
    assert backend_of(module, *inputs[:2]) == "loop"
    assert_close(run(module, *inputs), oracle(module, *inputs), 2e-5)


@NEEDS_NATIVE
def test_gcc_that_fails(monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(compiling.constants, "HF_HOME", tmp_path)
    monkeypatch.setattr(compiling, "FLAGS", [*compiling.FLAGS, "--no-such-flag"])
    monkeypatch.setattr(compiling.logger, "propagate", True)
    with caplog.at_level(logging.WARNING):
        assert compiling.native_library.__wrapped__(torch.float32) is None
    assert "the experts run without their compiled functions, slower: gcc: error" in caplog.text
    assert not list((tmp_path / "modeling_moe").iterdir())


@NEEDS_NATIVE
def test_folder_that_cannot_be_written(monkeypatch, tmp_path, caplog):
    (tmp_path / "modeling_moe").write_text("a file")
    monkeypatch.setattr(compiling.constants, "HF_HOME", tmp_path)
    monkeypatch.setattr(compiling.logger, "propagate", True)
    with caplog.at_level(logging.WARNING):
        assert compiling.native_library.__wrapped__(torch.float32) is None
    assert "the experts run without their compiled functions" in caplog.text


@NEEDS_NATIVE
def test_compiled_by_several_at_once(monkeypatch, tmp_path):
    monkeypatch.setattr(compiling.constants, "HF_HOME", tmp_path)
    with ThreadPoolExecutor() as pool:
        libraries = set(pool.map(lambda _: compiling.compiled(torch.float32, []), range(3)))
    assert list((tmp_path / "modeling_moe").iterdir()) == list(libraries)


@NEEDS_NATIVE
def test_left_to_the_loop():
    """The loop takes over float64 and the exact GELU."""
    for kind, dtype in (("gated", torch.float64), ("gelu", torch.float32)):
        module, inputs = make(kind, "moe_native", dtype=dtype), draw(40, 5, 3, dtype)
        assert backend_of(module, *inputs[:2], backend="native") == "loop"
        assert_close(run(module, *inputs), oracle(module, *inputs), 2e-5)


@NEEDS_NATIVE
def test_a_damaged_library_is_compiled_anew_and_does_not_kill_the_process(monkeypatch, tmp_path):
    monkeypatch.setattr(compiling.constants, "HF_HOME", tmp_path)
    monkeypatch.setattr(compiling, "FLAGS", ["-O0" if flag == "-O3" else flag for flag in compiling.FLAGS])
    library = compiling.compiled(torch.float32, [])
    whole = library.read_bytes()
    for damaged in (whole[:5000], b"", whole[:-1], whole[:200] + b"x" * 99 + whole[299:]):
        library.write_bytes(damaged)
        assert compiling.compiled(torch.float32, []) == library
        assert hashlib.sha256(library.read_bytes()[:-32]).digest() == library.read_bytes()[-32:]
    assert ctypes.CDLL(str(library)).scratch_words


@NEEDS_NATIVE
def test_compiles_in_an_ascii_locale(tmp_path):
    """The sources are read as UTF-8 in every locale."""
    command = """
import torch
from modeling_moe.dispatch.backends.native import compiling
compiling.FLAGS.remove("-O3")
compiling.compiled(torch.float32, [])
"""
    environment = os.environ | {"HF_HOME": str(tmp_path), "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    result = subprocess.run([sys.executable, "-c", command], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
