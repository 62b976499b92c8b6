# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module is part `tests`: it runs the tests marked `gpu`, and records each failure as soon as it is known."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from .environment import WANTED
from .results import Results
from .sizes import Size


ROOT = Path(__file__).parents[3]


class _Recorder:
    """A pytest plugin that records failures and counts tests."""

    def __init__(self, results: Results):
        self.results, self.counts = results, Counter[str]()
        self.reasons: Counter[str] = Counter()

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.counts[report.outcome] += 1
        if report.failed:
            self.results.put(test=report.nodeid, error=_last_line(str(report.longrepr)))
        elif report.skipped:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
            self.reasons[str(reason).removeprefix("Skipped: ")] += 1

    def pytest_collectreport(self, report: Any) -> None:
        if not report.failed:
            return
        missing = re.search(r"No module named '(\w+)'", str(report.longrepr))
        if missing and missing[1] in WANTED:
            self.results.put(check=f"tests of {report.nodeid}", skipped=f"{missing[1]} is not installed")
        else:
            self.counts["failed"] += 1
            self.results.put(test=report.nodeid, error=_last_line(str(report.longrepr)))


def _last_line(text: str) -> str:
    """Returns the line of a traceback that states the error: the last one that pytest marks, else the last line."""
    lines = [line for line in text.splitlines() if line.strip()]
    errors = [line.removeprefix("E").strip() for line in lines if line.startswith("E ")]
    return (errors or lines or ["no message"])[0 if errors else -1][:400]


def run(results: Results, size: Size) -> None:
    """Runs pytest with the arguments of `size.tests`; if no test passed, that is a failure."""
    recorder = _Recorder(results)
    options = ["-p", "no:cacheprovider", "--tb=short", "--continue-on-collection-errors"]
    arguments = [f"--rootdir={ROOT}", *options, *size.tests]
    code = pytest.main([str(ROOT / each) if each.startswith("tests") else each for each in arguments], [recorder])
    counts, reasons = dict(recorder.counts), dict(recorder.reasons.most_common(10))
    ended = code in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)
    passed = ended and recorder.counts["passed"] > 0 and not recorder.counts["failed"]
    results.check("all tests marked gpu pass", passed, code=int(code), counts=counts, reasons_to_skip=reasons)
