"""This test compares plans with runs on this machine's CPU, as the table of docs/planning.md does."""

import planning_table
import pytest

from modeling_moe.planning import METHODS


def test_the_cases_cover_what_the_table_promises():
    cases = list(planning_table.CASES.values())
    assert len(cases) > 10
    assert {case.family for case in cases} == set(planning_table.CONFIGS)
    assert {case.mode for case in cases} == {*METHODS, "prefill", "decode"} - {"qlora"}
    assert {case.recompute for case in cases} == {"none", "experts", "layers"}


@pytest.mark.slow
@pytest.mark.parametrize("name", planning_table.CASES)
def test_memory_within_a_tenth_and_time_within_a_half(name):
    row = planning_table.compare(planning_table.CASES[name])
    assert abs(row.memory_residual) < 0.1
    assert row.time_ratio < 1.5
