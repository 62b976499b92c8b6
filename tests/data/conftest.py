"""The tests here use the tokenizer and the tiny checkpoint of the training tests."""

from tests.training.conftest import checkpoint, text_file, tokenizer


__all__ = ["checkpoint", "text_file", "tokenizer"]
