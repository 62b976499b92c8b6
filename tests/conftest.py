"""Shared by all tests: the device, tiny models, one seed, and buffers that show when they are read too early."""

import os
import runpy
import sys
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from tests.interpreter import interpreter_fault


# a test that starts another process finds the packages in scripts/ there too
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(Path(__file__).parents[1] / "scripts"), *filter(None, [os.environ.get("PYTHONPATH")])]
)

if torch.cuda.is_available():
    # cuBLAS reads it before the first product; without it deterministic algorithms warn of each
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
elif interpreter_fault() is None:
    # Triton reads it when it defines a function, so before anything imports Triton
    os.environ.setdefault("TRITON_INTERPRET", "1")

from modeling_moe.dispatch.backends import BACKENDS
from tests.builders import sample_text, tiny_model, train_tokenizer


def triton_serves(device: str) -> bool:
    """Returns whether the Triton back end runs on `device`, compiled or interpreted."""
    device, dtype = torch.device(device), torch.float32
    return "triton" in BACKENDS and BACKENDS["triton"].reason_unavailable(device, dtype) is None


# where the tests run that are marked `gpu`
DEVICE = "cuda" if torch.cuda.is_available() and triton_serves("cuda") else "cpu"


def _without_triton() -> str | None:
    if "triton" not in BACKENDS:
        return "Triton is not installed"
    if DEVICE == "cpu" and interpreter_fault() is not None:
        return interpreter_fault()
    return None if triton_serves(DEVICE) else "Triton serves no GPU here, and TRITON_INTERPRET=1 is not set"


# why no test can run the Triton back end, or None
WITHOUT_TRITON = _without_triton()
NEEDS_TRITON = pytest.mark.skipif(WITHOUT_TRITON is not None, reason=str(WITHOUT_TRITON))
NEEDS_GPU = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU that Triton serves")


def pytest_terminal_summary(terminalreporter) -> None:
    """Says in one line why the Triton back end was not tested."""
    if WITHOUT_TRITON is not None:
        terminalreporter.write_line(f"The Triton back end was not tested: {WITHOUT_TRITON}")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items) -> None:
    """Marks the tests that use the GPU, before `-m gpu` selects them."""
    for item in items:
        if "device" in item.fixturenames and not _tests_native(item):
            item.add_marker("gpu")


def _tests_native(item) -> bool:
    return hasattr(item, "callspec") and item.callspec.params.get("backend") == "moe_native"


@pytest.fixture
def device(request) -> str:
    """Returns `DEVICE`, or "cpu" where the test's parameter `backend` is "moe_native", which serves no GPU."""
    return "cpu" if _tests_native(request.node) else DEVICE


@pytest.fixture(autouse=True)
def seed():
    """Every test starts from seed 0, whatever ran before."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fills what `torch.empty` returns with NaN."""
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Returns a tokenizer of 300 tokens."""
    return train_tokenizer()


@pytest.fixture
def text_file(tmp_path) -> Path:
    """Returns a text file of 800 lines and 28 kB."""
    path = tmp_path / "sample.txt"
    path.write_text(sample_text(), encoding="utf-8")
    return path


@pytest.fixture
def checkpoint(tmp_path, tokenizer) -> Path:
    """Returns the folder of a tiny MoE with a tokenizer."""
    path = tmp_path / "checkpoint"
    tiny_model().save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def run_script(monkeypatch, capsys):
    """Runs a script of scripts/ in this process; returns the exit code, standard output and standard error."""

    def run(name, *flags):
        monkeypatch.setattr(sys, "argv", [name, *map(str, flags)])
        monkeypatch.setenv("COLUMNS", "240")
        capsys.readouterr()
        try:
            runpy.run_path(str(Path(__file__).parents[1] / "scripts" / name), run_name="__main__")
            code = 0
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return run
