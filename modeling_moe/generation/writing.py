# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module writes the continuation of one text on standard output, token by token."""

import copy
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from transformers import GenerationConfig, GenerationMixin, PreTrainedTokenizerBase, TextStreamer

from ..utils.errors import UserError
from ..utils.loading import refuse_longer
from .draft import counted_calls, reason_not_exact, refuse_draft_window
from .loading import Writer
from .measures import WritingSpeed


class _TimedStreamer(TextStreamer):
    """This streamer keeps the new tokens, and the time and number of tokens of the first step.

    transformers calls `put` with the prompt, and then with the tokens of each step: one, or with a draft model those that
    the model accepted and one more.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, skip_prompt: bool):
        super().__init__(tokenizer, skip_prompt=skip_prompt, skip_special_tokens=True)
        self.tokens: list[int] = []
        self.steps = 0
        self.open = False
        self.began = self.first_at = self.last_at = time.perf_counter()
        self.first_tokens = 0

    def put(self, value: torch.Tensor) -> None:
        """Shows the prompt, or the tokens of one step; (N,) or (1, N) int64."""
        if not self.open:
            self.open = True
            super().put(value)
            self.next_tokens_are_prompt = False
            return
        now = time.perf_counter()
        self.tokens += value.flatten().tolist()
        self.steps += 1
        if self.steps == 1:
            self.first_at, self.first_tokens = now, len(self.tokens)
        self.last_at = now
        super().put(value)

    def end(self) -> None:
        """Shows what was held back, and ends the line; does nothing if nothing was shown or the line has ended."""
        if self.open:
            super().end()
        self.open = False


class Written(NamedTuple):
    """The result of one continuation.

    Attributes:
        text: the new text, without special tokens.
        speed: how fast the text was written.
        stopped: whether Ctrl-C ended the text.
    """

    text: str
    speed: WritingSpeed
    stopped: bool = False


def _checked(writer: Writer, length: int, config: GenerationConfig, shorten: bool) -> GenerationConfig:
    """Returns the generation config with fewer new tokens if `shorten` asks for it; refuses what cannot be written."""
    if length == 0:
        raise UserError("the prompt has no token: give a text")
    new = config.max_new_tokens or 0
    models = [writer.model] if writer.draft is None else [writer.model, writer.draft.model]
    positions = [getattr(model.config.get_text_config(), "max_position_embeddings", None) for model in models]
    if shorten and (given := [number for number in positions if number]):
        new = max(1, min(new, min(given) - length))
        config = copy.copy(config)
        config.max_new_tokens = new
    refuse_longer(writer.model, length + new, f"the prompt has {length} tokens and max_new_tokens is {new}")
    if writer.draft is not None:
        what = f"draft {writer.draft.name}: the prompt has {length} tokens and max_new_tokens is {new}"
        refuse_longer(writer.draft.model, length + new, what)
        refuse_draft_window(writer.draft, length + new)
        if reason := reason_not_exact(writer.model, config, length):
            raise UserError(f"draft {writer.draft.name} could change the text, because {reason}: leave draft out")
    return config


@contextmanager
def _without_own_advice() -> Iterator[None]:
    """Keeps off the terminal what transformers' assisted generation warns of in its own calls of `generate`."""
    advice = ("Passing `generation_config` together with", "A custom logits processor of type")
    source = logging.getLogger("transformers.generation.utils")

    def shown(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(advice)

    source.addFilter(shown)
    try:
        yield
    finally:
        source.removeFilter(shown)


def _generate(writer: Writer, inputs: Mapping[str, torch.Tensor], config: GenerationConfig, streamer: Any) -> None:
    """Calls transformers' `generate`, and turns its complaints about settings into one sentence."""
    model, draft = writer.model, writer.draft
    if not isinstance(model, GenerationMixin):
        raise UserError(f"{type(model).__name__} cannot write text: give a causal LM")
    options = {} if draft is None else {"assistant_model": draft.model}
    try:
        # a checkpoint may name stop strings, which need the tokenizer
        with _without_own_advice():
            model.generate(
                **inputs, generation_config=config, streamer=streamer, tokenizer=writer.tokenizer, **options
            )
    except ImportError as error:
        raise UserError(f"generation_config.json needs a package that is not installed: {error}") from error
    except ValueError as error:
        # transformers refuses a model whose cache cannot forget rejected tokens before it has written any
        if draft is None or isinstance(error, UserError) or streamer.tokens:
            raise
        raise UserError(f"draft {draft.name} cannot be used with {type(model).__name__}: {error}") from error


@torch.inference_mode()
def write(
    writer: Writer,
    inputs: Mapping[str, torch.Tensor],
    config: GenerationConfig,
    *,
    shorten: bool = False,
    skip_prompt: bool = False,
    stoppable: bool = False,
) -> Written:
    """Writes a continuation on standard output, token by token.

    The line is ended whatever happens, so that an error in the middle stands on a line of its own.

    Args:
        writer: model, tokenizer and perhaps a draft model.
        inputs: `input_ids` and `attention_mask` of one text, (1, S) int64.
        config: generation config with `max_new_tokens`.
        shorten: write fewer tokens than `config.max_new_tokens` if the model has no positions for all of them.
        skip_prompt: write the new text alone, without the prompt.
        stoppable: end the text at Ctrl-C and return it, instead of raising KeyboardInterrupt.

    Raises:
        UserError: if the text has no token, text and new tokens are more than a model has positions, the checkpoint's
            generation config needs a package that is not installed, or the draft model could change the text.
    """
    length = inputs["input_ids"].shape[1]
    config = _checked(writer, length, config, shorten)
    inputs = {name: inputs[name].to(writer.model.device) for name in ("input_ids", "attention_mask")}
    streamer, stopped = _TimedStreamer(writer.tokenizer, skip_prompt), False
    with counted_calls(None if writer.draft is None else writer.draft.model) as drafted:
        try:
            _generate(writer, inputs, config, streamer)
        except KeyboardInterrupt:
            if not stoppable:
                raise
            stopped = True
        finally:
            streamer.end()
    speed = WritingSpeed(
        prompt_tokens=length,
        new_tokens=len(streamer.tokens),
        first_tokens=streamer.first_tokens,
        first_seconds=streamer.first_at - streamer.began,
        seconds=streamer.last_at - streamer.began,
        steps=streamer.steps,
        drafted=None if writer.draft is None else drafted[0],
    )
    return Written(writer.tokenizer.batch_decode([streamer.tokens], skip_special_tokens=True)[0], speed, stopped)
