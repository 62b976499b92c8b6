"""The fixtures run scripts/benchmark.py in this process and register experts functions for one test."""

import functools
import runpy
import sys
from pathlib import Path

import pytest
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS


SCRIPT = Path(__file__).parents[2] / "scripts" / "benchmark.py"


@pytest.fixture
def benchmark(monkeypatch, capsys):
    """Runs the script without a terminal; returns exit code, standard output and standard error."""

    def run_script(*flags):
        monkeypatch.setattr(sys, "argv", ["benchmark.py", *map(str, flags)])
        monkeypatch.delenv("COLUMNS", raising=False)
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        return stop.value.code, *capsys.readouterr()

    return run_script


@pytest.fixture
def implementation(monkeypatch):
    """Registers an experts function under a name for one test."""
    return functools.partial(monkeypatch.setitem, ALL_EXPERTS_FUNCTIONS._local_mapping)
