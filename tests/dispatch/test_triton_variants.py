"""These tests check the Triton back end's low-rank updates, tensor descriptors, sort, TF32 and choice of a GPU."""

import os
import subprocess
import sys
import types

import pytest
import torch


pytest.importorskip("triton", reason="Triton is not installed")

import triton
from packaging.version import Version

from modeling_moe.dispatch.backends import BACKENDS
from modeling_moe.dispatch.backends.triton import backend as triton_backend
from modeling_moe.dispatch.backends.triton import launching, tiles
from modeling_moe.dispatch.backends.triton.row_tiles import RowTiles
from modeling_moe.dispatch.expert_order import order_by_expert, row_of_assignment
from modeling_moe.dispatch.low_rank import LowRank
from modeling_moe.dispatch.problem import ExpertsProblem, Needs
from tests.conftest import DEVICE, NEEDS_TRITON
from tests.dispatch.test_triton import INDEX, TRITON, Problem


pytestmark = [pytest.mark.gpu, NEEDS_TRITON]
FACTORS = ["up_a", "up_b", "down_a", "down_b"]


def updates_for(problem: Problem, rank: int, which=("up", "down"), dropout=False, strided=False, scaling=1.7):
    """Draws updates of the two matrices, with dropout masks if asked for."""
    _, _, up, down, *_ = problem.inputs
    tokens, assignments = len(problem.index), problem.index.numel()

    def update(matrix: torch.Tensor, rows: int) -> LowRank:
        experts, n, m = matrix.shape
        a, b = torch.randn(experts, rank, m, device=matrix.device), torch.randn(n, rank, experts, device=matrix.device)
        b = b.permute(2, 0, 1) if strided else b.permute(2, 0, 1).contiguous()
        kept = torch.rand(rows, m, device=matrix.device) > 0.3 if dropout else None
        return LowRank(a / m**0.5, b / rank**0.5, scaling, kept=kept)

    return update(up, tokens) if "up" in which else None, update(down, assignments) if "down" in which else None


def run_low_rank(backend, problem, updates, needs, dtype, recompute=False, config=None):
    x, weight, *parameters = (None if t is None else t.to(dtype) for t in problem.inputs)
    if dtype != torch.float64:
        weight = problem.inputs[1]
    experts = ExpertsProblem(x, weight, *parameters, problem.gate, problem.constants, *updates)
    options = {} if config is None else {"config": config}
    out, h = backend.forward(experts, problem.order, not recompute, **options)
    h = h[:0] if recompute else h
    return out, backend.backward(experts, problem.order, problem.grad.to(dtype), h, Needs(*needs), **options)


def in_double(updates):
    return [u and u._replace(a=u.a.double(), b=u.b.double()) for u in updates]


def check_low_rank(problem, updates, needs, **options):
    dtype = problem.grad.dtype
    out, grads = run_low_rank(TRITON, problem, updates, needs, dtype, **options)
    expected, expected_grads = run_low_rank(BACKENDS["loop"], problem, in_double(updates), needs, torch.float64)
    tolerance = 2e-2 if dtype == torch.float16 else 1e-5
    named = [("out", out, expected), *zip(["x", "weight", *"1234", *FACTORS], grads, expected_grads, strict=True)]
    for name, got, reference in named:
        assert (got is None) == (reference is None), name
        if got is not None:
            error = (got.double() - reference).abs().max() / reference.abs().max().clamp(min=1e-3)
            assert error < tolerance, f"{name}: {error}"
    return grads


OLD_TRITON = Version(triton.__version__) < Version("3.7")
ADAPTER = [True, True, *[False] * 4, *[True] * 4]


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize(
    ("rank", "options"),
    [
        pytest.param(1, {}, id="rank 1"),
        pytest.param(5, {"bias": True, "gate": "clamped_swiglu_pairs", "transposed": True}, id="gpt-oss"),
        pytest.param(16, {"hidden": 70, "inner": 37}, id="odd widths"),
        pytest.param(70, {"gate": "gelu"}, id="several steps"),
        pytest.param(16, {"dtype": torch.float16, "hidden": 32, "inner": 16}, id="half precision"),
    ],
)
def test_low_rank_updates(rank, options, dropout):
    problem = Problem([[3, 0], [-1, 2], [1, -1], [7, 2], [2, 1]], **options)
    check_low_rank(problem, updates_for(problem, rank, dropout=dropout), ADAPTER)


@pytest.mark.parametrize("which", ["up", "down"])
def test_an_update_of_one_matrix(which):
    problem = Problem(INDEX, bias=True)
    needs = [True] * 6 + [which == "up"] * 2 + [which == "down"] * 2
    check_low_rank(problem, updates_for(problem, 4, which=[which], strided=True), needs)


@pytest.mark.parametrize("dropout", [False, True])
def test_updates_with_recomputation_and_each_frozen_input(dropout):
    problem = Problem(INDEX, bias=True)
    updates = updates_for(problem, 4, dropout=dropout)
    everything = check_low_rank(problem, updates, [True] * 10, recompute=True)
    for wanted in range(10):
        needs = [place == wanted for place in range(10)]
        _, grads = run_low_rank(TRITON, problem, updates, needs, torch.float32, recompute=True)
        assert torch.equal(grads[wanted], everything[wanted])
        assert all(grad is None for place, grad in enumerate(grads) if place != wanted)


@pytest.mark.parametrize("family", tiles.CONFIGS)
def test_updates_in_every_tile(family):
    for numbers, table in tiles.CONFIGS[family].items():
        problem = Problem(INDEX, dtype=torch.float16 if numbers == "16bit" else torch.float32)
        for _, config in table:
            check_low_rank(problem, updates_for(problem, 3), ADAPTER, config=config)


def test_an_update_costs_no_pass_over_wide_rows():
    """LoRA's forward is five products, two of them as narrow as the rank, and makes nothing of the size of h but h."""
    problem = Problem(INDEX)
    launches = []

    def record(launch):
        launches.append((launch.name, launch.options.get("BLOCK_N", 0)))
        launch.run()

    with launching.intercepted(record):
        run_low_rank(TRITON, problem, updates_for(problem, 3), [False] * 10, torch.float32)
    forward = launches[: next(place for place, (name, _) in enumerate(launches) if name == "combine") + 1]
    assert [name for name, _ in forward] == ["map_rows", *["project_up"] * 2, *["multiply"] * 2, "combine"]
    assert forward[1][1] == forward[3][1] == 16


def persistent(dtype: torch.dtype) -> tiles.Config:
    return tiles.choose_config(9999, (1, 64, 64), dtype, "hopper")._replace(persistent=True)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_persistent_product(transposed, bias):
    index = torch.randint(-1, 4, (70, 3)).tolist()
    problem = Problem(index, hidden=40, inner=24, bias=bias, transposed=transposed, dtype=torch.float16)
    names = []
    with launching.intercepted(lambda launch: (names.append(launch.name), launch.run())):
        problem.check(config=persistent(torch.float16))
    assert names.count("multiply_persistent") == 2
    assert "multiply" not in names


def test_persistent_product_of_rows_that_the_copy_engine_does_not_take():
    problem = Problem(INDEX, hidden=10, inner=6, dtype=torch.float16)
    names = []
    with launching.intercepted(lambda launch: (names.append(launch.name), launch.run())):
        problem.check(config=persistent(torch.float16))
    assert "multiply_persistent" not in names
    assert names.count("multiply") == 2


@pytest.mark.parametrize(
    ("tokens", "top_k", "experts"), [(1, 1, 1), (7, 3, 5), (1500, 2, 3), (1100, 1, 300), (3, 2, 64)]
)
def test_sort(tokens, top_k, experts):
    index = torch.randint(-2, experts + 2, (tokens, top_k), device=DEVICE)
    # the id of an empty assignment does not matter to the order
    empty = (index < 0) | (index >= experts)
    order = triton_backend.sort(index, experts)
    expected = order_by_expert(index.masked_fill(empty, experts), experts)
    assert torch.equal(order.assignment, expected.assignment)
    assert torch.equal(order.offsets, expected.offsets)
    assert order.assignment.dtype == order.offsets.dtype == torch.int32


def test_sort_of_more_assignments_than_small_blocks_take():
    index = torch.randint(-1, 4, (triton_backend.LARGE_SORT // 2 + 700, 2), device=DEVICE)
    order, expected = triton_backend.sort(index, 4), order_by_expert(index.masked_fill(index < 0, 4), 4)
    assert torch.equal(order.assignment, expected.assignment)
    assert torch.equal(order.offsets, expected.offsets)


def test_sort_of_bytes():
    """The last of 256 experts has the greatest byte as id, which must not be taken for the end."""
    index = torch.randint(0, 256, (20, 3), device=DEVICE).to(torch.uint8)
    order, expected = triton_backend.sort(index, 256), order_by_expert(index.long(), 256)
    assert torch.equal(order.assignment, expected.assignment)
    assert torch.equal(order.offsets, expected.offsets)


def test_sort_of_nothing():
    order = triton_backend.sort(torch.zeros(0, 2, dtype=torch.long, device=DEVICE), 3)
    assert order.offsets.tolist() == [0, 0, 0, 0]
    assert not len(order.assignment)


@pytest.mark.parametrize("experts", [1, 5, 64])
def test_map_of_rows(experts):
    index = torch.randint(-1, experts, (400, 2), device=DEVICE)
    order = order_by_expert(index, experts)
    config = tiles.choose_config(16, (1, 64, 64), torch.float16, "hopper")
    half = {"dtype": torch.float16, "device": DEVICE}
    x, weight = torch.empty(400, 64, **half), torch.empty(400, 2, device=DEVICE)
    matrices = torch.empty(experts, 64, 64, **half), torch.empty(experts, 64, 64, **half)
    rows = RowTiles(ExpertsProblem(x, weight, *matrices, None, None, "silu", []), order, config)
    assert torch.equal(rows.inverse, row_of_assignment(order.assignment))
    block, offsets = rows.config.up.BLOCK_M, order.offsets.tolist()
    expected = [
        (expert, first) for expert in range(experts) for first in range(offsets[expert], offsets[expert + 1], block)
    ]
    number, table = rows.number, rows.tiles.tolist()
    assert table[-1] == len(expected) <= number
    assert list(zip(table[: len(expected)], table[number:], strict=False))[: len(expected)] == expected
    assert set(table[len(expected) : number]) <= {-1}


@pytest.fixture
def tf32():
    """Allows fp32 to be rounded to TF32, as a user does."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


def test_tf32_where_the_user_allows_it(tf32):
    assert tiles.precision_of(torch.float32) == "tf32"
    assert tiles.precision_of(torch.bfloat16) == "ieee"
    config = tiles.choose_config(9999, (1, 64, 64), torch.float32, "hopper")
    assert config in [entry for _, entry in tiles.CONFIGS["hopper"]["tf32"]]
    precisions = []
    problem = Problem(INDEX)
    with launching.intercepted(lambda launch: (precisions.append(launch.options.get("PRECISION")), launch.run())):
        problem.run()
    assert set(precisions) - {None} == {"tf32"}


def test_widths_that_are_no_multiple_of_16_have_small_tiles():
    for widths in ((64, 24), (1000, 64)):
        assert tiles.choose_config(9999, (1, *widths), torch.bfloat16, "hopper") is tiles.UNALIGNED


def test_ieee_is_the_default():
    precisions = []
    with launching.intercepted(lambda launch: (precisions.append(launch.options.get("PRECISION")), launch.run())):
        Problem(INDEX).run()
    assert set(precisions) - {None} == {"ieee"}


def fake_gpu(monkeypatch, kib: int, capability=(9, 0), hip=None):
    utils = types.SimpleNamespace(get_device_properties=lambda index: {"max_shared_mem": kib * 1024})
    active = types.SimpleNamespace(utils=utils)
    monkeypatch.setattr(triton.runtime, "driver", types.SimpleNamespace(active=active))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.version, "hip", hip and "6.4")
    properties = types.SimpleNamespace(gcnArchName=f"{hip}:sramecc+:xnack-")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    return tiles._family_of_gpu.__wrapped__(0)


@pytest.mark.parametrize(
    ("kib", "capability", "hip", "family"),
    [
        (227, (9, 0), None, "hopper"),
        pytest.param(227, (10, 0), None, "hopper", marks=pytest.mark.skipif(OLD_TRITON, reason="see the next test")),
        (163, (8, 0), None, "ampere"),
        (99, (8, 9), None, "ampere"),
        (99, (12, 0), None, "ampere"),
        (96, (7, 5), None, None),
        (64, (9, 4), "gfx942", "cdna"),
        (160, (9, 5), "gfx950", "cdna"),
        (64, (11, 0), "gfx1100", None),
    ],
)
def test_family_of_a_gpu(monkeypatch, kib, capability, hip, family):
    assert fake_gpu(monkeypatch, kib, capability, hip) == family


def test_blackwell_with_a_triton_that_miscompiles_is_left_to_grouped_mm(monkeypatch):
    monkeypatch.setattr(triton, "__version__", "3.6.0")
    with pytest.warns(UserWarning, match=r"triton>=3\.7"):
        assert fake_gpu(monkeypatch, 227, (10, 0)) is None
    assert fake_gpu(monkeypatch, 227, (9, 0)) == "hopper"


def test_a_gpu_that_triton_cannot_reach_is_left_to_grouped_mm(monkeypatch):
    def no_compiler(index):
        raise RuntimeError("Failed to find C compiler")

    active = types.SimpleNamespace(utils=types.SimpleNamespace(get_device_properties=no_compiler))
    monkeypatch.setattr(triton.runtime, "driver", types.SimpleNamespace(active=active))
    with pytest.warns(UserWarning, match="no_compiler|C compiler.*grouped_mm"):
        assert tiles._family_of_gpu.__wrapped__(0) is None


def test_kernels_that_do_not_launch_are_left_to_grouped_mm(monkeypatch):
    def broken(index, num_experts):
        raise OSError("ptxas: not found")

    device = torch.device(DEVICE)
    launches = []
    with launching.intercepted(launches.append):
        assert triton_backend.launches_on.__wrapped__(device)
    assert not launches
    monkeypatch.setattr(triton_backend, "sort", broken)
    with pytest.warns(UserWarning, match="ptxas: not found"):
        assert not triton_backend.launches_on.__wrapped__(device)


BATCHES = """
import torch
from moe_benchmark.compilation import Call, Experts, distinct, record

generator = torch.Generator().manual_seed(0)
seen, late = set(), []
for step in range(300):
    tokens = int(torch.randint(600, 8192, (), generator=generator))
    for scenario in ("routing", "train"):
        call = Call("batches", Experts(2048, 768, 128, 8, bias=True), tokens, "bfloat16", scenario)
        new = set(distinct(record(call, "hopper"), "sm_90")) - seen
        late += [(step, key) for key in new if step >= 20]
        seen |= new
print(len(seen), late)
"""


def test_batches_of_other_sizes_compile_nothing_new():
    """Over 300 batches of random sizes, which fall under two configurations, the last new kernel comes by step 20."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", BATCHES]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    number, late = result.stdout.split(maxsplit=1)
    assert late.strip() == "[]"
    assert int(number) == 22
