# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""A saved causal LM continues texts, or answers in a conversation."""

import copy
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import PartialState
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer, set_seed

from .chat import render_chat
from .errors import UserError
from .loading import load_model, load_tokenizer, parse_dtype, refuse_longer, refuse_misfit


NEW_TOKENS, NEW_TOKENS_OF_A_TURN = 32, 256


def _is_unicode(text: str) -> bool:
    # Python keeps bytes of the command line that are no UTF-8 as surrogates, which no tokenizer takes
    return not any("\ud800" <= char <= "\udfff" for char in text)


@dataclass
class GenerationArguments:
    """What to load, what to continue, and how."""

    model_name_or_path: str = field(metadata={"help": "folder or Hub name of a causal LM or a LoRA adapter"})
    prompt: list[str] | None = field(
        default=None,
        metadata={
            "help": "texts to continue, each on its own; with chat the user's turns of one conversation, which are read "
            "from standard input if not given"
        },
    )
    chat: bool | None = field(
        default=None, metadata={"help": "apply the tokenizer's chat template, and answer each prompt in turn"}
    )
    system: str | None = field(default=None, metadata={"help": "system message of the chat"})
    max_new_tokens: int | None = field(
        default=None,
        metadata={
            "help": f"tokens to write; {NEW_TOKENS}, or {NEW_TOKENS_OF_A_TURN} a turn of a chat, or as many as fit"
        },
    )
    do_sample: bool = field(default=False, metadata={"help": "draw tokens at random, by default the likeliest"})
    temperature: float | None = field(default=None, metadata={"help": "sampling: below 1 is more certain"})
    top_p: float | None = field(default=None, metadata={"help": "sampling: the likeliest tokens of that probability"})
    top_k: int | None = field(default=None, metadata={"help": "sampling: that many likeliest tokens"})
    seed: int = field(default=0, metadata={"help": "sampling: the same text for the same seed"})
    gguf_file: str | None = field(default=None, metadata={"help": "name of the GGUF file in the model's folder"})
    dtype: str = field(default="auto", metadata={"help": "auto (the checkpoint's), float32, bfloat16 or float16"})
    device: str | None = field(default=None, metadata={"help": "such as cpu or cuda:1; the fastest if not given"})
    trust_remote_code: bool = field(default=False, metadata={"help": "run Python code that the checkpoint brings"})

    def __post_init__(self):
        if not self.prompt and not self.chat:
            raise UserError("--prompt is missing: give texts to continue, or --chat true")
        if unread := [text for text in [*(self.prompt or []), self.system or ""] if not _is_unicode(text)]:
            raise UserError(f"the text {unread[0]!r:.100} is not UTF-8: correct it, or the terminal's encoding")
        if self.system is not None and not self.chat:
            raise UserError("system goes with a chat: set chat true")
        parse_dtype(self.dtype)
        self._check_numbers()

    def _check_numbers(self):
        limits = {
            "max_new_tokens": (lambda value: value >= 1, "at least 1"),
            "temperature": (
                lambda value: 0 < value < float("inf"),
                "a positive number; for the likeliest text leave it away",
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
            raise UserError(f"{given[0]} goes with sampling: set do_sample true")

    def config(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
        """The checkpoint's own generation config, with what the user said in place of what that says."""
        config = copy.deepcopy(model.generation_config) or GenerationConfig()
        config.max_length = None
        config.max_new_tokens = self.max_new_tokens or (NEW_TOKENS_OF_A_TURN if self.chat else NEW_TOKENS)
        config.do_sample, config.num_beams = self.do_sample, 1  # several beams cannot be shown as they come
        for name in ("temperature", "top_p", "top_k"):
            # a greedy search would warn of each
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
    """Loads the model, on its device and in evaluation mode, and its tokenizer.

    Raises:
        UserError: if either cannot be loaded, they do not fit, or there is no such device.
    """
    tokenizer = load_tokenizer(args.model_name_or_path, args.gguf_file, trust_remote_code=args.trust_remote_code)
    if args.chat and tokenizer.chat_template is None:
        raise UserError("chat true needs a chat template, and the tokenizer has none: leave chat away")
    try:
        device = torch.device(args.device) if args.device else PartialState().device
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {args.device} cannot be used: {str(error).splitlines()[0]}") from error
    model = load_model(args.model_name_or_path, args.gguf_file, args.dtype, trust_remote_code=args.trust_remote_code)
    refuse_misfit(tokenizer, model)
    return model.to(device).eval(), tokenizer


@torch.inference_mode()
def write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    inputs: Any,
    config: GenerationConfig,
    shorten: bool = False,
    **streaming: Any,
) -> str:
    """Writes on, token by token as they come, on standard output.

    Args:
        model: causal LM.
        tokenizer: its tokenizer.
        inputs: `input_ids` and `attention_mask` of one text, (1, S) int64.
        config: how to write.
        shorten: write fewer tokens than `config` says where the model has no positions for all of them.
        streaming: for [`~transformers.TextStreamer`].

    Returns:
        The new text, without special tokens.

    Raises:
        UserError: if the text has no token, or with what is to be written more than the model has positions, or the
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
    streamer = TextStreamer(tokenizer, skip_special_tokens=True, **streaming)
    inputs = {name: inputs[name].to(model.device) for name in ("input_ids", "attention_mask")}
    try:
        # stop strings, which a checkpoint may name, need the tokenizer
        ids = model.generate(**inputs, generation_config=config, streamer=streamer, tokenizer=tokenizer)
    except ImportError as error:
        raise UserError(f"generation_config.json asks for what is not installed: {error}") from error
    return tokenizer.decode(ids[0, length:], skip_special_tokens=True)


def _turns(prompts: list[str] | None) -> Iterator[str]:
    """What the user says: the prompts, or lines of standard input until it ends."""
    if prompts is not None:
        for prompt in prompts:
            print(f"user: {prompt}")  # noqa: T201
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
    """Answers each of the user's turns, with all that was said before it.

    Returns:
        The whole conversation, dicts of `role` and `content`.
    """
    config, shorten = args.config(model, tokenizer), args.max_new_tokens is None
    messages = [{"role": "system", "content": args.system}] if args.system is not None else []
    for turn in _turns(args.prompt):
        messages.append({"role": "user", "content": turn})
        text = render_chat(tokenizer, messages, prompt=True)
        inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")
        print("assistant: ", end="", flush=True)  # noqa: T201
        messages.append(
            {
                "role": "assistant",
                "content": write(model, tokenizer, inputs, config, shorten, skip_prompt=True).strip(),
            }
        )
    return messages


def continue_texts(args: GenerationArguments, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Continues each prompt on its own.

    Returns:
        The new texts.
    """
    config, shorten = args.config(model, tokenizer), args.max_new_tokens is None
    texts = []
    for prompt in args.prompt or []:
        print("> ", end="", flush=True)  # noqa: T201
        texts.append(write(model, tokenizer, tokenizer(prompt, return_tensors="pt"), config, shorten))
        print()  # noqa: T201
    return texts


def generate(args: GenerationArguments) -> list[str]:
    """Loads a model and lets it write on standard output.

    Returns:
        What it wrote, one text a prompt.

    Raises:
        UserError: for an argument that cannot work.
    """
    model, tokenizer = load_writer(args)
    experts = getattr(model.config, "_experts_implementation", None)
    print(f"{type(model).__module__}.{type(model).__name__}, experts by {experts}")  # noqa: T201
    if tokenizer.chat_template is not None and args.chat is None:
        print("the tokenizer has a chat template: --chat true applies it", file=sys.stderr)  # noqa: T201
    set_seed(args.seed)
    if args.chat:
        return [turn["content"] for turn in converse(args, model, tokenizer) if turn["role"] == "assistant"]
    return continue_texts(args, model, tokenizer)
