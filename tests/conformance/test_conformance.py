"""Runs transformers' own model tests on our classes: what its callers rely on is what these tests assert.

The tests are not in transformers' wheel, so the source distribution of the installed version is fetched once, into
`.cache/conformance/`. Its test files become a package `transformers_tests`, next to the files in `harness/`: the test
class for our model, and stand-ins for the few modules that the source distribution leaves out. Each run is a pytest
process of its own, on the CPU. Needs pip, setuptools and `parameterized`; the distributed tests need two cores.

A variant passes if no test fails and it skips none that Qwen3-MoE, run the same way, does not skip.
"""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import NamedTuple

import pytest
import transformers
from filelock import FileLock


pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

REPOSITORY = Path(__file__).parents[2]
HARNESS = Path(__file__).parent / "harness"
CACHE = REPOSITORY / ".cache" / "conformance"
FILES = [f"test_{name}_common.py" for name in ("configuration", "modeling")]
FILES += [
    f"test_{name}_mixin.py" for name in ("expert_parallel", "fsdp", "memory_cleanup", "tensor_parallel", "training")
]
STANDINS = {  # modules that these files import and the source distribution lacks, and what they take from them
    "exporters.test_export": "ExportTesterMixin",
    "generation.test_utils": "GenerationTesterMixin",
    "utils.test_configuration_utils": "config_common_kwargs",
}
PIP_OPTIONS = "--quiet --disable-pip-version-check --no-deps --no-binary :all: --no-build-isolation"
_SPLIT = "is_tensor_parallel_test or is_expert_parallel_test"
DISTRIBUTED = {"parallel": _SPLIT, "moa_parallel": _SPLIT, "fsdp": "is_fsdp_test"}
OUTCOMES = {"failure": "failed", "error": "failed", "skipped": "skipped"}  # by tag in the report


def upstream_tests() -> Path:
    """Returns the folder with transformers' test files, which is filled when it is not there yet."""
    version = transformers.__version__
    folder = CACHE / version
    CACHE.mkdir(parents=True, exist_ok=True)
    if folder.exists():
        return folder
    with tempfile.TemporaryDirectory(dir=CACHE) as temporary:
        pip = [sys.executable, "-m", "pip", "download", *PIP_OPTIONS.split(), "--dest", temporary]
        subprocess.run([*pip, f"transformers=={version}"], check=True)
        (archive,) = Path(temporary).glob("*.tar.gz")
        extracted = Path(temporary) / "tests"
        extracted.mkdir()
        with tarfile.open(archive) as tar:
            for name in FILES:
                content = tar.extractfile(f"transformers-{version}/tests/{name}").read()
                (extracted / name).write_bytes(content)
        extracted.rename(folder)
    return folder


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    """Returns a folder with the package `transformers_tests`: upstream's files, ours, and the stand-ins. xdist shares it."""
    base = tmp_path_factory.getbasetemp()
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "conformance"
    package = root / "transformers_tests"
    with FileLock(f"{root}.lock"):
        if root.exists():
            return root
        shutil.copytree(upstream_tests(), package)
        shutil.copytree(HARNESS, package, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
        (package / "__init__.py").touch()
        for module, name in STANDINS.items():
            folder, file = module.split(".")
            (package / folder).mkdir()
            (package / folder / "__init__.py").touch()
            (package / folder / f"{file}.py").write_text(f"from ..standins import {name}  # noqa: F401\n")
        (root / "pytest.ini").write_text("[pytest]\n")  # else pytest would read that of a parent folder
    return root


class Outcomes(NamedTuple):
    """Names of tests; where a test failed or was skipped, with the message."""

    passed: set[str]
    skipped: dict[str, str]
    failed: dict[str, str]


def run_suite(workspace: Path, variant: str) -> Outcomes:
    """Runs the suite, once in a session. A test whose subtest fails or is skipped counts as failed or skipped."""
    report = workspace / f"{variant}.xml"
    marks = DISTRIBUTED.get(variant, f"not ({' or '.join(dict.fromkeys(DISTRIBUTED.values()))})")
    command = [sys.executable, "-m", "pytest", "transformers_tests/suite.py", "-m", marks, f"--junitxml={report}"]
    command += ["-p", "no:cacheprovider", "--disable-warnings", "--show-capture=no", "--tb=short", "--timeout=600"]
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTEST_ADDOPTS", "RUN_SLOW")} | {
        "CONFORMANCE_VARIANT": variant,
        "PYTHONPATH": os.pathsep.join([str(workspace), str(REPOSITORY)]),
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    with FileLock(f"{report}.lock"):
        if not report.exists():
            run = subprocess.run(command, cwd=workspace, env=environment, capture_output=True, text=True)
            assert report.exists(), (run.stdout + run.stderr)[-5000:]

    tests = {}
    suite = ET.parse(report).find("testsuite")
    for case in suite.iter("testcase"):
        found = tests.setdefault(re.match(r"\w+", case.get("name")).group(), {})
        found.update({OUTCOMES[child.tag]: child.get("message", "") for child in case if child.tag in OUTCOMES})
    failed = {name: found["failed"] for name, found in tests.items() if "failed" in found}
    skipped = {name: found["skipped"] for name, found in tests.items() if "skipped" in found and name not in failed}
    outcomes = Outcomes(tests.keys() - failed.keys() - skipped.keys(), skipped, failed)
    counts = ", ".join(f"{len(names)} {outcome}" for outcome, names in outcomes._asdict().items())
    print(f"{variant}: {counts}; {suite.get('tests')} with subtests; {suite.get('time')} s")
    return outcomes


@pytest.fixture(scope="module")
def control(workspace) -> Outcomes:
    """Runs Qwen3-MoE in the harness, as a measure for our own result."""
    return run_suite(workspace, "control")


def listing(tests: dict[str, str]) -> str:
    return "\n".join(f"{name}: {message}" for name, message in tests.items())


# tests of transformers that load a checkpoint with almost nothing in it, and what our models say to that
REFUSED = {"test_model_weights_reload_no_missing_tied_weights": "CheckpointError: the checkpoint"}
# expert parallelism sends tokens to processes that do not have their keys, so that attention keeps its experts
REPLICATED = {
    "test_moe_parallel_plans_shard_experts": "the EP plan leaves these experts replicated: ['layers.0.self_attn"
}


@pytest.mark.parametrize("variant", ["plain", "shared", "deepseek", "olmoe", "moa"])
def test_transformers_model_tests(workspace, control, variant):
    ours = run_suite(workspace, variant)
    expected = REFUSED | (REPLICATED if variant == "moa" else {})
    failed = {name: found for name, found in ours.failed.items() if expected.get(name, "never said") not in found}
    assert not failed, listing(failed)
    assert ours.failed.keys() == expected.keys()
    skipped = {name: message for name, message in ours.skipped.items() if name not in control.skipped}
    assert not skipped, listing(skipped)
    assert ours.passed >= control.passed - expected.keys()


@pytest.mark.parametrize("variant", DISTRIBUTED)
def test_transformers_distributed_tests(workspace, variant):
    """Tensor and expert parallel, FSDP and HSDP, each against one process; 2 to 8 gloo ranks on the CPU."""
    ours = run_suite(workspace, variant)
    # it takes whatever is called `experts` for split by expert; tests/core/test_attention_split.py compares the gradients
    misjudged = {"test_ep_backward"} if variant == "moa_parallel" else set()
    failed = {name: message for name, message in ours.failed.items() if name not in misjudged}
    assert not failed, listing(failed)
    assert ours.skipped.keys() <= {"test_tp_generation_quantized"}, listing(ours.skipped)  # that one needs torchao
    assert ours.passed
