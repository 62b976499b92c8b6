"""The Triton kernels compile for GPUs that are not there, and each rule that the check has finds what breaks it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest


pytest.importorskip("triton", reason="Triton is not installed")

from moe_benchmark.compilation import TARGETS, Code, compile_all, faults, record
from moe_benchmark.compilation.__main__ import CompilationArguments, main
from moe_benchmark.compilation.calls import part_calls
from moe_benchmark.compilation.compiling import USUAL_TARGETS, tile_of
from moe_benchmark.compilation.machine_code import AMD, NVIDIA, scalar_products, spills_in_loops

from modeling_moe.dispatch.backends.triton import tiles
from modeling_moe.dispatch.backends.triton.backend import INTERPRETED
from modeling_moe.dispatch.backends.triton.launching import Launch
from modeling_moe.utils.errors import UserError


ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "gpu-kernels.md"
PRODUCTS = {"project_up", "multiply", "gate_backward", "weight_gradient"}


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """Makes a cache of Triton's in which nothing is compiled yet."""
    return tmp_path_factory.mktemp("triton")


def python(cache: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Runs Python where Triton compiles; in the tests' own process it interprets."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


def command(cache: Path, folder: Path, *arguments: str) -> tuple[subprocess.CompletedProcess, list[Code]]:
    """Returns the command's process, and the codes that it wrote."""
    output = folder / "codes.json"
    result = python(cache, "-m", "moe_benchmark.compilation", *arguments, "--json", str(output))
    assert output.exists(), result.stderr
    return result, [Code(**code) for code in json.loads(output.read_text())]


@pytest.mark.parametrize(
    ("target", "instruction"), [pytest.param("sm_90", "wgmma", marks=pytest.mark.slow), ("sm_80", "mma.sync")]
)
def test_a_small_part_compiles_and_has_no_fault(target, instruction, cache, tmp_path):
    """Training, LoRA and decoding of one preset compile for a GPU with wgmma and one without."""
    result, codes = command(cache, tmp_path, "--part", "small", "--targets", target, "--jobs", "2")
    assert (result.returncode, [fault for code in codes for fault in faults(code)]) == (0, []), result.stdout
    assert {code.kernel for code in codes} >= PRODUCTS | {"map_rows", "combine", "decode_up", "decode_down"}
    assert all(code.registers and code.lines and code.uses for code in codes)
    for code in codes:
        if code.kernel in PRODUCTS and code.tile.startswith("128x"):
            assert code.instructions[0].startswith(instruction), code
    assert "launches compiled without a fault" in result.stdout


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("target", USUAL_TARGETS)
def test_every_launch_compiles_and_has_no_fault(cache, tmp_path, target):
    """Each preset and edge case, in each scenario, with each configuration of the target's family."""
    result, codes = command(cache, tmp_path, "--part", "all", "--targets", target)
    assert len(codes) > 500
    assert (result.returncode, [fault for code in codes for fault in faults(code)]) == (0, []), result.stdout


@pytest.mark.parametrize("family", tiles.CONFIGS)
def test_every_tile_of_every_configuration_is_compiled(family):
    """No entry of the table of tiles is left out of part `all`."""
    launched = {kind: set() for kind in tiles.CONFIGS[family]}
    for call in part_calls("all", family):
        kind = {"float32": "float32", "tf32": "tf32"}.get(call.dtype, "16bit")
        launched[kind] |= {tile_of(launch) for launch in record(call, family)}
    for kind, table in tiles.CONFIGS[family].items():
        for most, config in table:
            for name in ("up", "down", "gate", "gradient", "narrow"):
                tile: tiles.Tile = getattr(config, name)
                assert tile_of(Launch(None, (), {}, tile.options())) in launched[kind], (kind, most, name)


def test_each_family_has_a_target_with_its_shared_memory():
    """A family's least shared memory is among the targets, so that tiles that do not fit there are found."""
    for family, shared in tiles.FAMILIES.items():
        assert shared == min(TARGETS[name].shared for name in USUAL_TARGETS if TARGETS[name].family == family)


@pytest.mark.slow
def test_faults_of_real_tiles_are_found(cache, tmp_path):
    """A tile that spills in its loop, one that takes too much shared memory, and one that does not compile."""
    shape = ("--presets", "qwen3_30b_a3b", "--tokens", "32768", "--scenarios", "infer", "frozen")
    bad = ("--tiles", "up=128,128,64,4,3", "down=128,256,64,8,6", "gate=128,128,48,8,3")
    result, codes = command(cache, tmp_path, "--targets", "sm_80", *shape, *bad, "--jobs", "2")
    assert result.returncode == 1
    found = [fault for code in codes for fault in faults(code)]
    assert all(fault in result.stdout for fault in found)
    assert any(fault.startswith("sm_80: project_up 128x128x64 w4 s3 spills in its loop: ") for fault in found)
    # five buffers of 128x64 and 64x256 numbers of 2 bytes
    assert "sm_80: multiply 128x256x64 w8 s6 takes 240 KiB of shared memory of 163" in found
    assert any(fault.startswith("sm_80: gate_backward 128x128x48 w8 s3 does not compile: ") for fault in found)
    kernels = {code.kernel for code in codes if not faults(code)}
    assert kernels == {"map_rows", "combine"}


def test_faults_of_a_code():
    """Each rule, at what it allows and beyond."""
    code = Code("sm_100", "multiply", "64x64x64", shared=227 * 1024, tensor_memory=512, spills=8, scalar=[(32, 64)])
    assert faults(code) == []
    code = Code("sm_100", "k", "t", shared=227 * 1024 + 1, tensor_memory=513, loop_spills=1, scalar=[(64, 16)])
    shared, tensor_memory, spills, scalar = faults(code)
    assert shared.endswith("KiB of shared memory of 227")
    assert tensor_memory == "sm_100: k t takes 513 columns of tensor memory of 512"
    assert spills == "sm_100: k t spills in its loop: 1 loads and stores"
    assert scalar == "sm_100: k t multiplies into 64x16 without matrix instructions"


DOT = (
    "%1 = tt.dot %2, %3, %4{precision} : tensor<128x32x{dtype}, #ttg.dot_op<{{opIdx = 0, parent = #{layout}}}>> * "
    "tensor<32x64x{dtype}, #ttg.dot_op<{{opIdx = 1, parent = #{layout}}}>> -> tensor<128x64xf32, #{layout}> loc(#loc9)"
)


@pytest.mark.parametrize(
    ("dtype", "precision", "layout", "expected"),
    [
        ("bf16", "", "mma", (False, [])),
        ("bf16", "", "blocked2", (True, [(128, 64)])),
        ("f32", ", inputPrecision = tf32", "blocked", (True, [(128, 64)])),
        ("f32", "", "blocked", (True, [])),
    ],
)
def test_products_without_matrix_instructions(dtype, precision, layout, expected):
    """Only float32 in full precision may be multiplied without them."""
    dot = DOT.format(dtype=dtype, precision=precision, layout=layout)
    assert scalar_products(f"%0 = arith.constant 1 : i32\n{dot}\n{dot}\n") == expected


def sass(*lines: str) -> str:
    """Returns a disassembly as nvdisasm prints it."""
    return "\n".join(line if line.endswith(":") else f"        /*0010*/    {line} ;" for line in lines)


LOOP = [".L_x_0:", "LDGSTS [R2], [R4]", "HMMA.16816.F32.BF16 R8, R4, R6, R8", "@P0 BRA `(.L_x_0)"]


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["STL [R1], R0", *LOOP, "LDL R0, [R1]", "EXIT"], 0),
        ([*LOOP[:1], "LDL.LU R0, [R1]", *LOOP[1:3], "@!P1 STL [R1], R0", *LOOP[3:], "EXIT"], 2),
        # the loop is left by a far jump, and repeated by one that is always taken
        ([*LOOP[:3], "STL [R1], R0", "@P2 CALL.REL.NOINC `(.L_x_1)", "BRA `(.L_x_0)", ".L_x_1:", "LDL R0, [R1]", "EXIT"], 1),
        # one loop over all tiles, with the end of a tile under a condition
        ([*LOOP[:3], "@P1 BRA `(.L_x_2)", "STL [R1], R0", ".L_x_2:", *LOOP[3:], "EXIT"], 0),
        # only some threads multiply, in a block of their own
        ([".L_x_0:", "BRA.U UP0, `(.L_x_2)", "UTCHMMA gdesc[UR4]", "STL [R1], R0", ".L_x_2:", "@P0 BRA `(.L_x_0)", "EXIT"], 1),
        # a loop over tiles around the loop over the products
        ([".L_x_9:", *LOOP, "STL [R1], R0", "@P3 BRA `(.L_x_9)", "EXIT"], 0),
        # a width of 1 leaves no loop
        (["HMMA R8, R4, R6, R8", "STL [R1], R0", "HMMA R8, R4, R6, R8", "LDL R0, [R1]", "EXIT"], 0),
        # what follows the end is never reached
        ([*LOOP, "EXIT", ".L_x_8:", "STL [R1], R0", "BRA `(.L_x_8)"], 0),
    ],
)  # fmt: skip
def test_spills_in_the_loops_of_nvidias_code(lines, expected):
    """What runs in every round of the innermost loop with products counts, and nothing else."""
    assert spills_in_loops(sass(*lines), NVIDIA, NVIDIA.matrix) == expected


def test_spills_in_loops_without_products():
    """Any loop counts, the far end of one included."""
    lines = [
        ".L_x_0:",
        "STL [R1], R0",
        "@P1 BRA `(.L_x_1)",
        "LDL R0, [R1]",
        ".L_x_1:",
        "@P0 BRA `(.L_x_0)",
        "LDL R0, [R1]",
    ]
    assert spills_in_loops(sass(*lines, "EXIT"), NVIDIA, None) == 2


def test_spills_in_the_loops_of_amds_code():
    """Returns a disassembly in AMD's assembler."""
    lines = [
        "scratch_store_dword off, v0",
        ".LBB0_1:",
        "scratch_load_dword v0, off",
        "v_mfma_f32_32x32x8_bf16 a[0:15]",
    ]
    lines += ["s_cbranch_scc1 .LBB0_1", "; a comment", "scratch_load_dword v1, off", "s_endpgm"]
    text = "\n".join(line if line.endswith(":") or line.startswith(";") else f"\t{line}" for line in lines)
    assert spills_in_loops(text, AMD, AMD.matrix) == 1


def test_a_compiler_that_crashes_is_a_fault_of_the_launch_alone():
    """The process of the crash dies; the other launches are compiled nonetheless."""

    def kernel(warmup) -> SimpleNamespace:
        return SimpleNamespace(fn=SimpleNamespace(__name__="k"), warmup=warmup)

    def compiled(*arguments, **options) -> SimpleNamespace:
        return SimpleNamespace(metadata=SimpleNamespace(shared=5))

    def crash(*arguments, **options) -> None:
        os._exit(1)

    launches = [Launch(kernel(warmup), (1,), {}, {"BLOCK_M": 16}) for warmup in (compiled, crash, compiled)]
    codes = [*compile_all(launches, "sm_90", jobs=2, analysed=False)]
    assert [code.error for code in codes] == ["", "the compiler crashed", ""]
    assert [code.shared for code in codes] == [5, 0, 5]


PRECOMPILE = """
import torch, triton
from triton.runtime import driver
from moe_benchmark.compilation import compiling, precompile, preset_calls, record

(call,) = preset_calls("hopper", ["qwen3_30b_a3b"], ["bfloat16"], ["decode"], [1])
launches = record(call, "hopper")
codes = precompile(launches * 2, "sm_90", jobs=2)
assert [code.error for code in codes] == ["", ""], codes
assert not torch.cuda.is_initialized() and driver._active is None
hits = []
triton.knobs.compilation.listener = lambda cache_hit, **rest: hits.append(cache_hit)
with compiling._standing_in("sm_90"):
    for launch in launches:
        launch.kernel.warmup(**launch.arguments, grid=(1,), **launch.options)
print(hits)
"""


@pytest.mark.slow
def test_precompiling_fills_the_cache_without_a_gpu(tmp_path):
    """What another process compiled is taken from the cache; repeated launches are compiled once."""
    result = python(tmp_path, "-c", PRECOMPILE)
    assert result.stdout.splitlines()[-1:] == ["[True, True]"], result.stderr


def test_the_page_shows_the_kernels_and_tiles_of_today():
    """docs/gpu-kernels.md has a line for each kernel and tile of the presets, and no other."""
    sections = PAGE.read_text().split("\n## ")[1:]
    assert [section.splitlines()[0] for section in sections] == list(USUAL_TARGETS)
    for section in sections:
        lines = [line.split(" | ") for line in section.splitlines() if line.startswith("| ")][1:]
        shown = {(line[0].removeprefix("| "), line[1]) for line in lines}
        family = TARGETS[section.splitlines()[0]].family
        launches = [launch for call in part_calls("presets", family) for launch in record(call, family)]
        assert shown == {(launch.name, tile_of(launch) or "-") for launch in launches}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"targets": ["sm_70"]}, "targets 'sm_70' is unknown: it must be one of sm_80, "),
        ({"part": "most"}, "part 'most' is unknown: it must be one of small, presets, all"),
        ({"tokens": [4]}, "tokens, dtypes and scenarios need presets: give --presets"),
        ({"presets": ["olmoe"], "tokens": [0]}, "jobs and tokens must be positive"),
        ({"tiles": ["up=1,2,3"]}, "tiles 'up=1,2,3' is malformed: write FIELD=BLOCK_M,BLOCK_N,BLOCK_K,warps,"),
    ],
)
def test_mistakes_are_answered(fields, message):
    """A wrong argument is named with the remedy."""
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        CompilationArguments(**fields)


@pytest.mark.skipif(not INTERPRETED, reason="Triton does not interpret on a machine with a GPU")
def test_interpreted_kernels_are_refused():
    """With TRITON_INTERPRET the command says what to do."""
    with pytest.raises(UserError, match="TRITON_INTERPRET is set: unset it"):
        main()
