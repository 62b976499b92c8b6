"""The comparison of scripts/test_serving.sh fails where a server's answer is missing, no number, or refused."""

import math

import pytest
from serving_check import table
from serving_check.answers import Answers, compare, ends_inside_character
from serving_check.cases import EXPORTS, OWN_CODE, REFUSED, SILENT
from serving_check.page import write_section


IDS, LOGPROBS = [5, 6, 7], [-1.0, -2.0, -3.0]
EXPECTED = Answers([IDS], [LOGPROBS], inside=[[False, True, False]])


def test_equal_answers_are_exact():
    assert compare(EXPECTED, Answers([IDS], [LOGPROBS])).exact


def test_a_server_may_leave_out_tokens_that_end_inside_a_character():
    found = compare(EXPECTED, Answers([[5, 7]], [[-1.0, -3.0]]))
    assert found.exact
    assert (found.same, found.tokens) == (2, 2)


@pytest.mark.parametrize(
    ("ids", "logprobs"),
    [
        ([5, 6], [-1.0, -2.0]),  # the last token is whole text
        ([5], [-1.0]),
        ([], []),
        ([5, 6, 8], LOGPROBS),
        ([5, 6, 7, 8], [*LOGPROBS, -1.0]),
        (IDS, [-1.0, -2.0]),
        (IDS, [-1.0, math.nan, -3.0]),
        (IDS, [-1.0, None, -3.0]),
        (IDS, [-1.0, -2.1, -3.0]),
    ],
)
def test_missing_wrong_and_undefined_answers_are_not_exact(ids, logprobs):
    assert not compare(EXPECTED, Answers([ids], [logprobs])).exact


def test_a_comparison_of_few_tokens_is_refused():
    expected = Answers([IDS], [LOGPROBS], inside=[[True, True, False]])
    with pytest.raises(ValueError, match="only 1 tokens are left"):
        compare(expected, Answers([[7]], [[-3.0]]))


@pytest.mark.parametrize("text", ["é", "€", "🙂"])
def test_the_end_inside_a_character_is_seen(text):
    data = b"a" + text.encode()
    cut = [ends_inside_character(data[:end]) for end in range(1, len(data) + 1)]
    assert cut == [False] + [True] * (len(data) - 2) + [False]


def asked(tmp_path, case, column, answers, refusal, monkeypatch):
    """Returns whether the table takes a server's answers for a fault of this package."""
    monkeypatch.setattr(table, "refusal", lambda *_: refusal)
    EXPECTED.save(tmp_path / "transformers.json")
    if answers is not None:
        answers.save(tmp_path / f"{column}.json")
    return table.cell(case, tmp_path, column)[1]


EXACT, WRONG, BROKEN = Answers([IDS], [LOGPROBS]), Answers([[1, 2, 3]], [LOGPROBS]), Answers([], [], "ImportError: x")
BY_US = Answers([], [], "ValueError: vLLM would change the text, because x: y")


@pytest.mark.parametrize(
    ("case", "column", "answers", "refusal", "fault"),
    [
        (EXPORTS[0], "llama", EXACT, None, False),
        (EXPORTS[0], "llama", WRONG, None, True),
        (EXPORTS[0], "llama", WRONG, "reason", False),
        (EXPORTS[0], "llama", BROKEN, None, True),
        (EXPORTS[0], "llama", BROKEN, "reason", False),
        (EXPORTS[0], "llama", None, None, True),
        (SILENT[0], "llama", WRONG, None, True),
        (OWN_CODE[0], "llama", None, None, False),
        (OWN_CODE[0], "own", BROKEN, None, True),
        (OWN_CODE[0], "own", BY_US, None, True),
        (REFUSED[0], "own", BY_US, None, False),
        (REFUSED[0], "own", EXACT, None, True),
    ],
)
def test_the_table_fails_for_faults_of_the_package(tmp_path, monkeypatch, case, column, answers, refusal, fault):
    assert asked(tmp_path, case, column, answers, refusal, monkeypatch) is fault


@pytest.mark.parametrize(("case", "fault"), [(EXPORTS[0], True), (SILENT[0], False)])
def test_a_model_that_must_be_exported_may_not_be_refused(tmp_path, case, fault):
    (tmp_path / "refused.txt").write_text("target x cannot hold it; y")
    assert table.cell(case, tmp_path, "vllm")[1] is fault


def test_a_section_of_a_page_is_replaced(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- t: begin -->\nold\n<!-- t: end -->\nb\n")
    write_section(page, "t", ["x 1"], ["| new |"])
    assert page.read_text() == "a\n<!-- t: begin -->\n\nMeasured with x 1.\n\n| new |\n\n<!-- t: end -->\nb\n"
