"""These tests read dictionaries in the format of hunspell."""

import pytest
from experiments import language_words
from experiments.language_words import LANGUAGES, language_bytes, refuse_missing_languages

from modeling_moe.utils.errors import UserError


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(language_words, "FOLDER", tmp_path)
    language_bytes.cache_clear()
    yield tmp_path
    language_bytes.cache_clear()


def test_words_are_read_in_their_encoding_without_rules_names_and_repetitions(folder):
    lines = ["7", "\u017cubr/AB", "dom po:noun", "dom", "Anna", "e-mail", "x", "kot\tid:3", "pies", "las"]
    (folder / "pl_PL.aff").write_bytes(b"# Polish\nSET ISO8859-2\n")
    (folder / "pl_PL.dic").write_bytes("\n".join(lines).encode("iso8859-2"))
    training, held_out = (bytes(part).decode() for part in language_bytes("Polish"))
    assert sorted((training + held_out).split()) == sorted(["\u017cubr", "dom", "kot", "las", "pies"])
    assert len(training.split()) == 4
    assert training.endswith(" ")


def test_missing_dictionaries_are_named_by_their_packages(folder):
    for file, _ in list(LANGUAGES.values())[2:]:
        (folder / f"{file}.dic").touch()
    with pytest.raises(UserError, match=r"apt-get install hunspell-af hunspell-an$"):
        refuse_missing_languages()
    for file, _ in LANGUAGES.values():
        (folder / f"{file}.dic").touch()
    refuse_missing_languages()
