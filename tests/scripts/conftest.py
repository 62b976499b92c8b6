"""scripts/benchmark.py, run in this process."""

import runpy
import sys
from pathlib import Path

import pytest


SCRIPT = Path(__file__).parents[2] / "scripts" / "benchmark.py"


@pytest.fixture
def benchmark(monkeypatch, capsys):
    """Runs the script; returns its exit code, what it printed and what it complained about."""

    def run_script(*flags):
        monkeypatch.setattr(sys, "argv", ["benchmark.py", *map(str, flags)])
        monkeypatch.setenv("COLUMNS", "250")
        capsys.readouterr()
        try:
            runpy.run_path(str(SCRIPT), run_name="__main__")
            code = 0
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return run_script
