"""scripts/mutate.py makes one-line faults, and says which of them no test notices."""

import ast

import mutate
import pytest

from modeling_moe.utils.errors import UserError


SOURCE = '''def clipped(x: "int | None" = None, limit: int = 3) -> int:
    """A docstring with 3 numbers."""
    if x is None or x > limit:
        raise ValueError("too large")
    return -x + limit * 2
'''
TEST = """from package.part import clipped
import pytest

def test_clipped():
    assert clipped(1) == 5
    with pytest.raises(ValueError):
        clipped(4)
"""


def test_each_fault_changes_one_expression_and_parses():
    faults = mutate.find_faults(SOURCE)
    for fault in faults:
        data = SOURCE.encode()
        changed = (data[: fault.begin] + fault.new.encode() + data[fault.end :]).decode()
        assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(SOURCE))
        assert ast.get_docstring(ast.parse(changed).body[0]) == "A docstring with 3 numbers."
    texts = [str(fault) for fault in faults]
    assert "line 3: x > limit  ->  (x >= limit)" in texts
    assert 'line 4: raise ValueError("too large")  ->  pass' in texts
    assert not any("int | None" in text for text in texts)


def test_the_faults_that_the_tests_miss_survive(tmp_path, monkeypatch):
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "part.py").write_text(SOURCE)
    (tmp_path / "test_part.py").write_text(TEST)
    monkeypatch.setattr(mutate, "ROOT", tmp_path)
    arguments = mutate.MutationArguments("package/part.py", ["test_part.py"], most=100, lines=[3, 3])
    alive = [str(fault) for fault in mutate.survivors(arguments, tmp_path)]
    # no test gives the limit itself, or None
    assert "line 3: x > limit  ->  (x >= limit)" in alive
    assert "line 3: x is None or x > limit  ->  (x is None and x > limit)" not in alive
    assert SOURCE.count("\n") == 5


def test_tests_that_fail_without_a_fault_are_named(tmp_path, monkeypatch):
    (tmp_path / "part.py").write_text(SOURCE)
    (tmp_path / "test_part.py").write_text("def test_wrong():\n    assert False\n")
    monkeypatch.setattr(mutate, "ROOT", tmp_path)
    with pytest.raises(UserError, match="fails without a fault"):
        mutate.survivors(mutate.MutationArguments("part.py", ["test_part.py"]), tmp_path)


def test_the_mirror_of_a_file_is_found():
    assert mutate.mirror("modeling_moe/router_capacity.py") == ["tests/core/test_router_capacity.py"]
    assert mutate.mirror("modeling_moe/data/packing.py") == ["tests/data"]
    with pytest.raises(UserError, match="name them with --tests"):
        mutate.mirror("configuration/nothing.py")
