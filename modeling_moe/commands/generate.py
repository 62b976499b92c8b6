# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This command lets a saved causal LM continue texts.

    moe generate --model_name_or_path outputs/demo/model --prompt "The import statement"
    moe generate --model_name_or_path ./moe --prompt "Once upon" "The old mill" --do_sample --top_p 0.9
    moe generate --model_name_or_path ./dense --gguf_file model.gguf --prompt "Once upon a time"
    moe generate --model_name_or_path ./moe --prompt "Once upon a time" --budget 4GiB --stats
    moe generate --model_name_or_path ./upcycled --prompt "Once upon a time" --draft auto

The likeliest token is written each time, which always gives the same text; --do_sample draws tokens at random. What no flag
sets is taken from the checkpoint's generation_config.json. A MoE checkpoint runs by this package, not by the code that is
saved beside the weights. Standard output gets the texts, standard error the speed: the time to the first token, in which the
prompt is read, and the tokens per second after it. `moe chat` answers in a chat.

--budget keeps experts on disk or in host memory and reads them when a token needs them; the text is the same. --draft lets a
smaller model propose tokens, of which the model keeps those that it would have written itself.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from transformers import set_seed

from ..generation import (
    SamplingArguments,
    Writer,
    WriterArguments,
    load_writer,
    refuse_surrogates,
    write,
)
from ..utils.command_line import parse
from ..utils.errors import UserError


# max_new_tokens where the user gives none
NEW_TOKENS = 32
# flags that this command had, which are now those of `moe chat`
CHAT_FLAGS = ("--chat", "--no_chat", "--system")


@dataclass
class GenerationArguments:
    """Which texts to continue."""

    prompt: list[str] = field(default_factory=list, metadata={"help": "texts to continue, one by one"})

    def __post_init__(self):
        if not self.prompt:
            raise UserError("--prompt is missing: give texts to continue; moe chat answers in a chat")
        refuse_surrogates(*self.prompt)


def generate(args: GenerationArguments, writer_args: WriterArguments, sampling: SamplingArguments) -> list[str]:
    """Loads a model, continues each prompt independently of the others, and writes the texts on standard output.

    Returns:
        The new texts, one for each prompt.

    Raises:
        UserError: for an argument that cannot work.
    """
    writer = load_writer(writer_args)
    if writer.tokenizer.chat_template is not None:
        print("the tokenizer has a chat template: moe chat applies it", file=sys.stderr)
    set_seed(sampling.seed)
    texts = continue_texts(args.prompt, writer, sampling)
    if writer_args.stats:
        # here, since few texts are written by a model that does not fit into memory
        from ..offload import offload_statistics

        print(offload_statistics(writer.model).table(), file=sys.stderr)
    return texts


def continue_texts(prompts: Sequence[str], writer: Writer, sampling: SamplingArguments) -> list[str]:
    """Writes each prompt with a continuation and an empty line on standard output, and the speed on standard error.

    Returns:
        The new texts.
    """
    config = sampling.config(writer.model, writer.tokenizer, NEW_TOKENS, drafted=writer.draft is not None)
    texts = []
    for prompt in prompts:
        inputs = writer.tokenizer(prompt, return_tensors="pt")
        written = write(writer, inputs, config, shorten=sampling.max_new_tokens is None)
        print(flush=True)
        print(written.speed, file=sys.stderr)
        texts.append(written.text)
    return texts


def main(argv: Sequence[str] | None = None) -> None:
    """Writes the model's texts as they are made."""
    flags = {text.partition("=")[0] for text in (sys.argv[1:] if argv is None else argv)}
    if moved := [flag for flag in CHAT_FLAGS if flag in flags]:
        raise UserError(f"{moved[0]} belongs to moe chat: call moe chat with the other flags and without --chat")
    args, writer_args, sampling = parse([GenerationArguments, WriterArguments, SamplingArguments], __doc__, argv)
    generate(args, writer_args, sampling)
