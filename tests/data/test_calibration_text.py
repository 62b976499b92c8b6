"""These tests check the texts that models are measured on: domains from files, and the first tokens of a domain."""

import datasets
import pytest

from modeling_moe.data.calibration_text import load_domains, token_ids
from modeling_moe.utils.errors import UserError
from tests.builders import train_tokenizer


def test_domains_are_read_from_files(tmp_path):
    (tmp_path / "a.txt").write_text("some text")
    loaded = load_domains([f"a={tmp_path / 'a.txt'}"])
    assert loaded["a"]["text"] == ["some text"]
    with pytest.raises(UserError, match=r"calibration_data: .*missing.txt does not exist"):
        load_domains([f"a={tmp_path / 'missing.txt'}"])
    with pytest.raises(UserError, match=r"calibration_data: .* is malformed: write domain=source"):
        load_domains(["a.txt"])


def test_the_first_tokens_have_an_end_after_each_document():
    tokenizer = train_tokenizer()
    texts = ["first words", "other words"]
    whole = [id for text in texts for id in [*tokenizer(text).input_ids, tokenizer.eos_token_id]]
    documents = datasets.Dataset.from_dict({"text": texts})
    for count in (1, len(whole) - 1, len(whole)):
        assert token_ids(documents, tokenizer, count, "a").tolist() == whole[:count]
    with pytest.raises(UserError, match=rf"^tokens is 999, but domain 'a' of data has {len(whole)} tokens: lower it"):
        token_ids(documents, tokenizer, 999, "a", "tokens", "data")
