# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This command lets a saved causal LM answer in a chat.

    moe chat --model_name_or_path outputs/demo/model
    moe chat --model_name_or_path ./moe --system "Be brief." --do_sample --top_p 0.9
    moe chat --model_name_or_path ./moe --prompt "Who are you?" "And what can you do?"
    moe chat --model_name_or_path ./moe --budget 4GiB --draft auto

Without --prompt the user's turns are read from the terminal. Ctrl-C ends an answer, which stays in the conversation as far as
it was written; Ctrl-D ends the chat. Each answer is given all turns before it, by the tokenizer's chat template. The other
flags are those of `moe generate`; the speed of each answer goes to standard error.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from transformers import set_seed

from ..generation import (
    SamplingArguments,
    Writer,
    WriterArguments,
    load_writer,
    refuse_surrogates,
    write,
)
from ..utils.chat import render_chat
from ..utils.command_line import parse
from ..utils.errors import UserError
from ..utils.loading import load_tokenizer


# max_new_tokens of an answer where the user gives none
NEW_TOKENS = 256


@dataclass
class ChatArguments:
    """What the user and the system say."""

    prompt: list[str] | None = field(
        default=None,
        metadata={"help": "the user's turns, answered one after the other; read from standard input if not given"},
    )
    system: str | None = field(default=None, metadata={"help": "system message of the chat"})

    def __post_init__(self):
        refuse_surrogates(*(self.prompt or []), self.system)


class _Turn(NamedTuple):
    """What the user says, and whether Ctrl-C ends the answer alone, because the user can go on at the terminal."""

    text: str
    stoppable: bool


def _turns(prompts: list[str] | None) -> Iterator[_Turn]:
    """Yields the user's turns: the prompts, or the lines of standard input until it ends."""
    if prompts:
        for prompt in prompts:
            print(f"user: {prompt}")
            yield _Turn(prompt, stoppable=False)
        return
    at_terminal = sys.stdin.isatty()
    while True:
        try:
            line = input("user: " if at_terminal else "")
        except EOFError:
            return
        refuse_surrogates(line)
        if line.strip():
            yield _Turn(line, stoppable=at_terminal)


def converse(args: ChatArguments, writer: Writer, sampling: SamplingArguments) -> list[dict]:
    """Answers each turn of the user, given all turns before.

    Returns:
        The whole conversation as dicts of `role` and `content`.
    """
    config = sampling.config(writer.model, writer.tokenizer, NEW_TOKENS, drafted=writer.draft is not None)
    messages = [{"role": "system", "content": args.system}] if args.system is not None else []
    for turn in _turns(args.prompt):
        messages.append({"role": "user", "content": turn.text})
        text = render_chat(writer.tokenizer, messages, prompt=True)
        inputs = writer.tokenizer(text, add_special_tokens=False, return_tensors="pt")
        print("assistant: ", end="", flush=True)
        written = write(
            writer,
            inputs,
            config,
            shorten=sampling.max_new_tokens is None,
            skip_prompt=True,
            stoppable=turn.stoppable,
        )
        stop = ", stopped by Ctrl-C" if written.stopped else ""
        print(f"{written.speed}{stop}", file=sys.stderr, flush=True)
        messages.append({"role": "assistant", "content": written.text.strip()})
    return messages


def chat(args: ChatArguments, writer_args: WriterArguments, sampling: SamplingArguments) -> list[dict]:
    """Loads a model and answers the user's turns on standard output.

    Returns:
        The whole conversation as dicts of `role` and `content`.

    Raises:
        UserError: for an argument that cannot work.
    """
    trust = writer_args.trust_remote_code
    tokenizer = load_tokenizer(writer_args.model_name_or_path, writer_args.gguf_file, trust_remote_code=trust)
    if tokenizer.chat_template is None:
        raise UserError("a chat needs a chat template, and the tokenizer has none: call moe generate")
    writer = load_writer(writer_args, tokenizer)
    set_seed(sampling.seed)
    messages = converse(args, writer, sampling)
    if writer_args.stats:
        # here, since few texts are written by a model that does not fit into memory
        from ..offload import offload_statistics

        print(offload_statistics(writer.model).table(), file=sys.stderr)
    return messages


def main(argv: Sequence[str] | None = None) -> None:
    """Answers until the prompts or standard input end."""
    args, writer_args, sampling = parse([ChatArguments, WriterArguments, SamplingArguments], __doc__, argv)
    chat(args, writer_args, sampling)
