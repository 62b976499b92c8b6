"""This module holds a server's answers to the prompts of all checks, and compares them with transformers'."""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path


# SmolLM2's ids of three texts, of three lengths
PROMPTS = [[504, 3575, 282, 4649, 314], [1604, 338, 253, 655, 28, 665, 436, 253, 2066, 7163], [1195, 5180]]
NEW_TOKENS = 24
# the largest difference of a token's log-probability between two exact programs in fp32
TOLERANCE = 3e-4


@dataclass(frozen=True)
class Answers:
    """What a program answered to each of `PROMPTS`, or why it did not.

    Attributes:
        ids: greedy token ids, `NEW_TOKENS` for each prompt; llama.cpp's server leaves out tokens that end inside a character.
        logprobs: natural logarithm of the probability of each of these tokens.
        error: what the program said instead of an answer; None for an answer.
        inside: of transformers' answers, whether the text up to each token ends inside a character.
    """

    ids: list[list[int]]
    logprobs: list[list[float]]
    error: str | None = None
    inside: list[list[bool]] | None = None

    def save(self, path: Path) -> None:
        """Writes the answers as JSON."""
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> "Answers":
        """Reads what `save` has written."""
        return cls(**json.loads(path.read_text(encoding="utf-8")))


@dataclass(frozen=True)
class Comparison:
    """How far a server's answers are from transformers'.

    Attributes:
        same: number of leading tokens that are the same, over all prompts.
        tokens: number of tokens that the server must answer.
        difference: largest difference of a log-probability among the tokens before the first other token; infinity if the
            server's log-probability is no number, or missing.
    """

    same: int
    tokens: int
    difference: float

    @property
    def exact(self) -> bool:
        """Whether all tokens are the same and all log-probabilities within `TOLERANCE`."""
        return self.same == self.tokens and self.difference <= TOLERANCE


def ends_inside_character(text: bytes) -> bool:
    """Returns whether UTF-8 text ends before the last byte of a character, so that llama.cpp's server waits with its token."""
    end = text[-4:]
    for place, byte in enumerate(end):
        length = 2 if 0xC0 <= byte < 0xE0 else 3 if 0xE0 <= byte < 0xF0 else 4 if 0xF0 <= byte < 0xF8 else 0
        if len(end) - place < length:
            return True
    return False


def compare(expected: Answers, found: Answers) -> Comparison:
    """Compares a server's answers with transformers'.

    A server may leave out the tokens in `expected.inside`, and only all of them. Every other token that is missing or more
    counts as another token.

    Raises:
        ValueError: if fewer than half of the tokens are left to compare, which would prove nothing.
    """
    same, tokens, difference = 0, 0, 0.0
    for prompt, (ids, logprobs) in enumerate(zip(expected.ids, expected.logprobs, strict=True)):
        answered, told = found.ids[prompt], found.logprobs[prompt]
        wanted = list(zip(ids, logprobs, strict=True))
        if len(answered) < len(ids) and expected.inside:
            wanted = [pair for pair, inside in zip(wanted, expected.inside[prompt], strict=True) if not inside]
        tokens += max(len(wanted), len(answered))
        for place, (token, logprob) in enumerate(wanted):
            if place >= len(answered) or answered[place] != token:
                break
            value = told[place] if place < len(told) else None
            off = math.inf if value is None else abs(value - logprob)
            difference = max(difference, math.inf if math.isnan(off) else off)
            same += 1
    if tokens < sum(map(len, expected.ids)) / 2:
        raise ValueError(f"only {tokens} tokens are left to compare: choose another seed for this model.")
    return Comparison(same, tokens, difference)
