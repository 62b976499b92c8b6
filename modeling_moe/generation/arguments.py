# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""These arguments of `moe generate` and `moe chat` say which model writes, and how it chooses each token."""

import copy
from dataclasses import dataclass, field
from typing import Literal

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..utils.errors import UserError
from ..utils.loading import DtypeName, parse_dtype
from ..utils.sizes import parse_size


# fields of a generation config by which transformers drafts tokens without a draft model
OTHER_DRAFTS = ("prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")


def refuse_surrogates(*texts: str | None) -> None:
    """Refuses texts of the command line that are not UTF-8, which Python keeps as surrogates and no tokenizer takes.

    Raises:
        UserError: quotes the first text that is not UTF-8.
    """
    for text in texts:
        if text and any("\ud800" <= char <= "\udfff" for char in text):
            raise UserError(f"the text {text!r:.100} is not UTF-8: correct it, or the terminal's encoding")


@dataclass
class WriterArguments:
    """Which model writes, where its experts lie, and which model drafts for it."""

    model_name_or_path: str = field(metadata={"help": "folder or Hub name of a causal LM or a LoRA adapter"})
    gguf_file: str | None = field(default=None, metadata={"help": "name of the GGUF file in the model's folder"})
    dtype: DtypeName = field(default="auto", metadata={"help": "dtype of the model; auto: the checkpoint's dtype"})
    device: str | None = field(
        default=None, metadata={"help": "device of torch such as cpu or cuda:1; the accelerator if there is one"}
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "run Python code that the checkpoint brings"})
    budget: str | None = field(
        default=None,
        metadata={
            "help": "memory of the device for routed experts, such as 4GiB; the other experts are read when a token needs "
            "them. If not given, all experts are loaded"
        },
    )
    expert_policy: Literal["lru", "lfu", "lfru", "least_stale"] | None = field(
        default=None,
        metadata={"help": "with budget: rule by which an expert gives its memory to another; lfru if not given"},
    )
    expert_tier: Literal["disk", "pinned"] | None = field(
        default=None,
        metadata={
            "help": "with budget: where experts wait, in the checkpoint's files (disk, if not given) or in host memory"
        },
    )
    expert_prefetch: int | None = field(
        default=None,
        metadata={
            "help": "with budget: load the experts of the next layer while a layer computes, with this many beyond those that the "
            "next router predicts; if not given, none are loaded ahead"
        },
    )
    stats: bool = field(
        default=False,
        metadata={"help": "with budget: print hits, misses, bytes and waiting time of each layer's experts"},
    )
    draft: str | None = field(
        default=None,
        metadata={
            "help": "folder or Hub name of a smaller model with the same tokenizer that drafts tokens, which the model checks "
            "several at once; auto: the dense model that the MoE was upcycled from"
        },
    )
    draft_tokens: int | None = field(
        default=None,
        metadata={
            "help": "with draft: number of tokens that are drafted at once; if not given, up to 20, and none after a token that "
            "the draft model gives a probability below 0.4"
        },
    )

    def __post_init__(self):
        parse_dtype(self.dtype)
        if self.budget is None:
            own = ("expert_policy", "expert_tier", "expert_prefetch", "stats")
            given = [name for name in own if getattr(self, name) is not None and getattr(self, name) is not False]
            if given:
                raise UserError(f"{given[0]} needs a memory for experts: set budget, such as 4GiB")
        if self.budget is not None and (self.gguf_file or self.model_name_or_path.endswith(".gguf")):
            raise UserError(
                "budget reads experts from safetensors files, not from GGUF: leave budget out, or convert the model first"
            )
        if self.budget is not None:
            try:
                parse_size(self.budget, "budget")
            except ValueError as error:
                raise UserError(str(error)) from error
        if self.draft_tokens is not None and self.draft is None:
            raise UserError("draft_tokens needs a draft model: set draft")
        if self.draft_tokens is not None and self.draft_tokens < 1:
            raise UserError(f"draft_tokens is {self.draft_tokens}: it must be at least 1")


@dataclass
class SamplingArguments:
    """How many tokens to write, and how each is chosen."""

    max_new_tokens: int | None = field(
        default=None,
        metadata={
            "help": "number of tokens to write; if not given, 32 for a text and 256 for an answer, or as many as the model has "
            "positions for"
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

    def __post_init__(self):
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

    def config(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, new_tokens: int, drafted: bool = False
    ) -> GenerationConfig:
        """Returns the checkpoint's generation config, changed by the arguments that the user gave.

        Args:
            model: causal LM.
            tokenizer: the model's tokenizer, whose end of text ends the text too.
            new_tokens: number of tokens to write if the user gave none.
            drafted: whether a draft model proposes tokens, which replaces other ways of the checkpoint to do so.
        """
        config = copy.deepcopy(model.generation_config) or GenerationConfig()
        config.max_length = None
        config.max_new_tokens = self.max_new_tokens or new_tokens
        config.do_sample, config.num_beams = self.do_sample, 1  # the streamer shows one text, not several beams
        for name in ("temperature", "top_p", "top_k"):
            # without sampling transformers warns about each that is set
            value = getattr(self, name) if getattr(self, name) is not None else getattr(config, name)
            setattr(config, name, value if self.do_sample else None)
        if not self.do_sample:
            config.min_p = config.typical_p = None
        for name in OTHER_DRAFTS if drafted else ():
            setattr(config, name, None)
        ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        ends = dict.fromkeys([*ends, tokenizer.eos_token_id])
        config.eos_token_id = [end for end in ends if end is not None] or None
        if config.pad_token_id is None and config.eos_token_id:
            config.pad_token_id = config.eos_token_id[0]
        return config
