"""The notebook runs, and prints what it says that it prints."""

import re

import pytest

from tests.docs import notebook


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    """Rich would break lines at the width of the terminal."""
    monkeypatch.setenv("COLUMNS", "200")


def without_numbers(text: str) -> str:
    """Returns `text` with a mark in place of each number, since machines round differently."""
    return re.sub(r"-?\d[\d.,]*(e[+-]\d+)?", "#", text)


def test_the_cells_print_what_the_notebook_shows():
    content = notebook.read()
    shown, printed = notebook.stored_outputs(content), notebook.run_cells(content)
    assert len(shown) > 5
    assert [without_numbers(text) for text in printed] == [without_numbers(text) for text in shown]
    assert any(text for text in shown)
