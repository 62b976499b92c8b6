# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This command lets a saved causal LM continue texts, or answer in a chat.

    moe generate --model_name_or_path outputs/demo/model --prompt "The import statement"
    moe generate --model_name_or_path ./moe --chat --prompt "Who are you?" "And what can you do?"
    moe generate --model_name_or_path ./moe --chat --system "Be brief." --do_sample --top_p 0.9
    moe generate --model_name_or_path ./dense --gguf_file model.gguf --prompt "Once upon a time"

The likeliest token is written each time, which always gives the same text; --do_sample draws tokens at random. A chat without
--prompt reads the user's turns from the terminal, until Ctrl-D. What no flag sets is taken from the checkpoint's
generation_config.json. A MoE checkpoint runs by this package, not by the code that is saved beside the weights.
"""

import copy
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from accelerate import PartialState
from transformers import (
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TextStreamer,
    set_seed,
)

from ..utils.chat import render_chat
from ..utils.command_line import parse
from ..utils.errors import UserError
from ..utils.loading import DtypeName, load_model, load_tokenizer, parse_dtype, refuse_longer, refuse_misfit


# max_new_tokens of a text, and of a turn of a chat, where the user gives none
NEW_TOKENS, NEW_TOKENS_OF_A_TURN = 32, 256


def _is_unicode(text: str) -> bool:
    # Python keeps bytes of the command line that are not UTF-8 as surrogates, which no tokenizer takes
    return not any("\ud800" <= char <= "\udfff" for char in text)


@dataclass
class GenerationArguments:
    """Which model to load, which texts to continue, and how."""

    model_name_or_path: str = field(metadata={"help": "folder or Hub name of a causal LM or a LoRA adapter"})
    prompt: list[str] | None = field(
        default=None,
        metadata={
            "help": "texts to continue, one by one; with chat: the user's turns of one conversation, which are read from "
            "standard input if not given"
        },
    )
    chat: bool | None = field(
        default=None,
        metadata={"help": "apply the tokenizer's chat template, and answer the prompts one after the other"},
    )
    system: str | None = field(default=None, metadata={"help": "system message of the chat"})
    max_new_tokens: int | None = field(
        default=None,
        metadata={
            "help": f"number of tokens to write; if not given, {NEW_TOKENS} or as many as the model has positions for, and "
            f"{NEW_TOKENS_OF_A_TURN} in a turn of a chat"
        },
    )
    do_sample: bool = field(
        default=False, metadata={"help": "draw tokens at random; otherwise the likeliest token is written"}
    )
    temperature: float | None = field(
        default=None, metadata={"help": "sampling: divides the logits; below 1 the likely tokens get likelier"}
    )
    top_p: float | None = field(
        default=None, metadata={"help": "sampling: draw from the likeliest tokens whose probabilities sum to this"}
    )
    top_k: int | None = field(default=None, metadata={"help": "sampling: draw from this number of likeliest tokens"})
    seed: int = field(default=0, metadata={"help": "sampling: seed of the random numbers"})
    gguf_file: str | None = field(default=None, metadata={"help": "name of the GGUF file in the model's folder"})
    dtype: DtypeName = field(default="auto", metadata={"help": "dtype of the model; auto: the checkpoint's dtype"})
    device: str | None = field(
        default=None, metadata={"help": "device of torch such as cpu or cuda:1; the accelerator if there is one"}
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "run Python code that the checkpoint brings"})

    def __post_init__(self):
        if not self.prompt and not self.chat:
            raise UserError("--prompt is missing: give texts to continue, or --chat")
        if unread := [text for text in [*(self.prompt or []), self.system or ""] if not _is_unicode(text)]:
            raise UserError(f"the text {unread[0]!r:.100} is not UTF-8: correct it, or the terminal's encoding")
        if self.system is not None and not self.chat:
            raise UserError("system needs a chat: set chat true")
        parse_dtype(self.dtype)
        self._check_numbers()

    def _check_numbers(self):
        limits = {
            "max_new_tokens": (lambda value: value >= 1, "at least 1"),
            "temperature": (
                lambda value: 0 < value < float("inf"),
                "a positive number; leave it out for the likeliest text",
            ),
            "top_p": (lambda value: 0 < value <= 1, "above 0 and at most 1"),
            "top_k": (lambda value: value >= 1, "at least 1"),
            "seed": (lambda value: 0 <= value < 2**32, "from 0 to 2**32 - 1"),
        }
        for name, (holds, meaning) in limits.items():
            value = getattr(self, name)
            if value is not None and not holds(value):
                raise UserError(f"{name} is {value}: it must be {meaning}")
        given = [name for name in ("temperature", "top_p", "top_k") if getattr(self, name) is not None]
        if given and not self.do_sample:
            raise UserError(f"{given[0]} needs sampling: set do_sample true")

    def config(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
        """Returns the checkpoint's generation config, changed by the arguments that the user gave."""
        config = copy.deepcopy(model.generation_config) or GenerationConfig()
        config.max_length = None
        config.max_new_tokens = self.max_new_tokens or (NEW_TOKENS_OF_A_TURN if self.chat else NEW_TOKENS)
        config.do_sample, config.num_beams = self.do_sample, 1  # the streamer shows one text, not several beams
        for name in ("temperature", "top_p", "top_k"):
            # without sampling transformers warns about each that is set
            value = getattr(self, name) if getattr(self, name) is not None else getattr(config, name)
            setattr(config, name, value if self.do_sample else None)
        if not self.do_sample:
            config.min_p = config.typical_p = None
        ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        ends = dict.fromkeys([*ends, tokenizer.eos_token_id])
        config.eos_token_id = [end for end in ends if end is not None] or None
        if config.pad_token_id is None and config.eos_token_id:
            config.pad_token_id = config.eos_token_id[0]
        return config


def load_writer(args: GenerationArguments) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a model in evaluation mode on the chosen device, and the tokenizer.

    A model with a LoRA adapter makes this function call [`~modeling_moe.lora.enable`].

    Raises:
        UserError: if model or tokenizer cannot be loaded, they do not fit each other, or the device cannot be used.
    """
    tokenizer = load_tokenizer(args.model_name_or_path, args.gguf_file, trust_remote_code=args.trust_remote_code)
    if args.chat and tokenizer.chat_template is None:
        raise UserError("chat true needs a chat template, and the tokenizer has none: leave chat out")
    try:
        device = torch.device(args.device) if args.device else PartialState().device
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {args.device} cannot be used: {str(error).splitlines()[0]}") from error
    model = load_model(args.model_name_or_path, args.gguf_file, args.dtype, trust_remote_code=args.trust_remote_code)
    if getattr(model, "peft_config", None):
        # here, since PEFT takes seconds to import
        from ..lora import enable

        enable()
    refuse_misfit(tokenizer, model)
    model.to(device)  # pyrefly: ignore[bad-argument-type]: a decorator of transformers hides the signature
    return model.eval(), tokenizer


@torch.inference_mode()
def write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    inputs: Mapping[str, torch.Tensor],
    config: GenerationConfig,
    shorten: bool = False,
    skip_prompt: bool = False,
) -> str:
    """Writes a continuation on standard output, token by token.

    Args:
        model: causal LM.
        tokenizer: the model's tokenizer.
        inputs: `input_ids` and `attention_mask` of one text, (1, S) int64.
        config: generation config.
        shorten: write fewer tokens than `config.max_new_tokens` if the model has no positions for all of them.
        skip_prompt: write the new text alone, without the prompt.

    Returns:
        The new text, without special tokens.

    Raises:
        UserError: if the text has no token, text and new tokens are more than the model has positions, or the
            checkpoint's generation config needs a package that is not installed.
    """
    length = inputs["input_ids"].shape[1]
    if length == 0:
        raise UserError("the prompt has no token: give a text")
    new = config.max_new_tokens or 0
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if shorten and positions:
        new = max(1, min(new, positions - length))
        config = copy.copy(config)
        config.max_new_tokens = new
    refuse_longer(model, length + new, f"the prompt has {length} tokens and max_new_tokens is {new}")
    streamer = TextStreamer(tokenizer, skip_prompt=skip_prompt, skip_special_tokens=True)
    inputs = {name: inputs[name].to(model.device) for name in ("input_ids", "attention_mask")}
    if not isinstance(model, GenerationMixin):
        raise UserError(f"{type(model).__name__} cannot write text: give a causal LM")
    try:
        # a checkpoint may name stop strings, which need the tokenizer
        ids = model.generate(**inputs, generation_config=config, streamer=streamer, tokenizer=tokenizer)
    except ImportError as error:
        raise UserError(f"generation_config.json needs a package that is not installed: {error}") from error
    return tokenizer.batch_decode(ids[:, length:], skip_special_tokens=True)[0]


def _turns(prompts: list[str] | None) -> Iterator[str]:
    """Yields the user's turns: the prompts, or the lines of standard input until it ends."""
    if prompts is not None:
        for prompt in prompts:
            print(f"user: {prompt}")
            yield prompt
        return
    while True:
        try:
            line = input("user: " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if not _is_unicode(line):
            raise UserError("standard input is not UTF-8: convert it")
        if line.strip():
            yield line


def converse(args: GenerationArguments, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[dict]:
    """Answers each turn of the user, given all turns before.

    Returns:
        The whole conversation as dicts of `role` and `content`.
    """
    config, shorten = args.config(model, tokenizer), args.max_new_tokens is None
    messages = [{"role": "system", "content": args.system}] if args.system is not None else []
    for turn in _turns(args.prompt):
        messages.append({"role": "user", "content": turn})
        text = render_chat(tokenizer, messages, prompt=True)
        inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")
        print("assistant: ", end="", flush=True)
        answer = write(model, tokenizer, inputs, config, shorten, skip_prompt=True)
        messages.append({"role": "assistant", "content": answer.strip()})
    return messages


def continue_texts(args: GenerationArguments, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Continues each prompt independently of the others.

    Returns:
        The new texts.
    """
    config, shorten = args.config(model, tokenizer), args.max_new_tokens is None
    texts = []
    for prompt in args.prompt or []:
        print("> ", end="", flush=True)
        texts.append(write(model, tokenizer, tokenizer(prompt, return_tensors="pt"), config, shorten))
        print()
    return texts


def generate(args: GenerationArguments) -> list[str]:
    """Loads a model and writes its texts on standard output.

    Returns:
        The new texts, one for each prompt.

    Raises:
        UserError: for an argument that cannot work.
    """
    model, tokenizer = load_writer(args)
    experts = getattr(model.config, "_experts_implementation", None)
    print(f"{type(model).__module__}.{type(model).__name__}, experts by {experts}")
    if tokenizer.chat_template is not None and args.chat is None:
        print("the tokenizer has a chat template: --chat applies it", file=sys.stderr)
    set_seed(args.seed)
    if args.chat:
        return [turn["content"] for turn in converse(args, model, tokenizer) if turn["role"] == "assistant"]
    return continue_texts(args, model, tokenizer)


def main(argv: Sequence[str] | None = None) -> None:
    """Writes the model's texts as they are made."""
    (args,) = parse([GenerationArguments], __doc__, argv)
    generate(args)
