# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module tells how fast a text was written."""

from dataclasses import dataclass


@dataclass(frozen=True)
class WritingSpeed:
    """The time that one continuation took.

    A step is one call of the model. It writes one token, or with a draft model the accepted tokens and one more.

    Attributes:
        prompt_tokens: number of tokens of the prompt.
        new_tokens: number of tokens written.
        first_tokens: number of tokens that the first step wrote.
        first_seconds: seconds from the beginning to the first step's tokens, in which the prompt is read.
        seconds: seconds from the beginning to the last token.
        steps: number of steps.
        drafted: number of tokens that the draft model proposed; None without a draft model.
    """

    prompt_tokens: int
    new_tokens: int
    first_tokens: int
    first_seconds: float
    seconds: float
    steps: int
    drafted: int | None = None

    @property
    def decode_rate(self) -> float | None:
        """Tokens per second after the first step; None if there was one step alone."""
        rest, seconds = self.new_tokens - self.first_tokens, self.seconds - self.first_seconds
        return rest / seconds if rest > 0 and seconds > 0 else None

    @property
    def accepted(self) -> int | None:
        """Number of drafted tokens in the text; None without a draft model."""
        return None if self.drafted is None else self.new_tokens - self.steps

    def __str__(self) -> str:
        """Returns one line for the terminal."""
        if self.steps == 0:
            return f"no new token after a prompt of {self.prompt_tokens} tokens"
        line = (
            f"{self.new_tokens} new tokens in {self.seconds:.2f} s: the first after {self.first_seconds:.2f} s "
            f"(prompt of {self.prompt_tokens} tokens)"
        )
        if self.decode_rate is not None:
            line += f", then {self.decode_rate:.2f} tokens/s"
        if self.accepted is not None and self.drafted:
            line += (
                f"; draft: {self.accepted / self.steps:.2f} tokens accepted per step of {self.drafted / self.steps:.2f} "
                f"drafted, {self.steps} steps"
            )
        return line
