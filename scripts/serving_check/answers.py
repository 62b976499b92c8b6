"""This module holds a server's answers to the prompts of all checks, and compares them with transformers'."""

import json
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
    """

    ids: list[list[int]]
    logprobs: list[list[float]]
    error: str | None = None

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
        tokens: number of tokens that transformers answered.
        difference: largest difference of a log-probability among the tokens before the first other token.
    """

    same: int
    tokens: int
    difference: float

    @property
    def exact(self) -> bool:
        """Whether all tokens are the same and all log-probabilities within `TOLERANCE`."""
        return self.same == self.tokens and self.difference <= TOLERANCE


def compare(expected: Answers, found: Answers) -> Comparison:
    """Compares a server's answers with transformers'; tokens that the server left out count as the same.

    Raises:
        ValueError: if the server told fewer than half of the log-probabilities, which would prove nothing.
    """
    same, told, difference = 0, 0, 0.0
    for ids, logprobs, server_ids, server_logprobs in zip(
        expected.ids, expected.logprobs, found.ids, found.logprobs, strict=True
    ):
        place, untold = 0, len(ids) - len(server_ids)
        for token, logprob in zip(ids, logprobs, strict=True):
            if place < len(server_ids) and server_ids[place] == token:
                told, difference = told + 1, max(difference, abs(server_logprobs[place] - logprob))
                place += 1
            elif untold > 0:
                untold -= 1
            else:
                break
            same += 1
    if told < same / 2:
        raise ValueError(f"the server told {told} log-probabilities of {same} tokens: check how they are read.")
    return Comparison(same, sum(map(len, expected.ids)), difference)
