# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module hides the names in which transformers' releases differ, so that one copy of the code runs on all of them.

transformers 5.24 renamed `past_key_values` to `cache`, in models, masks, outputs and `generate`, and gives the paged cache of
continuous batching to the model, where earlier releases give it to the attention function. Here the name is `cache`; our
forwards take both names, and [`cache_keyword`] hands a cache to transformers by the name that the release has.

A forward that swallowed a keyword it does not know would turn the next rename into wrong text; [`refuse_unknown`] turns it
into a TypeError.
"""

import difflib
import inspect
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from transformers.generation.continuous_batching import PagedAttentionCache
from transformers.modeling_outputs import MoeModelOutputWithPast
from transformers.utils import TransformersKwargs, logging


logger = logging.get_logger(__name__)

# a checkpoint carries code of the version that saved it
__version__ = "0.4.0"

# the newest name comes first
CACHE_NAMES = ("cache", "past_key_values")

# callers give these to a forward beside its own arguments; docs/compatibility.md names who reads each
KEYWORDS = frozenset(TransformersKwargs.__annotations__) | {
    *("shift_labels", "ignore_index"),  # transformers' loss functions read them
    *("kernel_options", "deterministic"),  # flex and flash attention read them
    # continuous batching gives these; its attention, cache and sampler read them
    *("read_index", "write_index", "block_table", "max_seqlen_q", "max_seqlen_k"),
    *("logits_indices", "logits_processor_args"),
    *("debug_io", "debug_io_dir", "prune_layers"),  # transformers traces a model by them
    "tokenizer",  # `generate` reads it for stop strings, and passes it on
    "skip_logits",  # `Trainer` tells Liger by it that the loss is enough
    "logits_to_keep",  # TRL's distillation gives it to the decoder without a head too
    "margin",  # TRL's reward trainer gives its whole batch to the model
    *("attention_instances", "forward_batch"),  # the attention of vLLM and SGLang reads them
    # TRL's tree attention reads these
    *("tree_kv_index", "tree_cu_seqlens_q", "tree_cu_seqlens_k", "tree_max_seqlen_q", "tree_max_seqlen_k"),
}
REMEDIES = {
    "token_type_ids": "set tokenizer.model_input_names = ['input_ids', 'attention_mask']",
    "cache_position": "leave it out, or give position_ids",
}


def cache_name(output: type) -> str:
    """This finds the name that a class of transformers' outputs has for a cache.

    Raises:
        ImportError: if a release has renamed it again.
    """
    known = {field.name for field in fields(output)}
    for name in CACHE_NAMES:
        if name in known:
            return name
    raise ImportError(
        f"this transformers names the cache neither {' nor '.join(CACHE_NAMES)}, so this code would decode without one: "
        "update modeling_moe (and save the checkpoint again, if this code came with it), or install an older transformers."
    )


CACHE_NAME = cache_name(MoeModelOutputWithPast)


def cache_keyword(cache: Any) -> dict[str, Any]:
    """This makes the keyword argument that hands a cache to a function, layer or output of transformers."""
    return {CACHE_NAME: cache}


def one_cache(module: Any, cache: Any, past_key_values: Any) -> Any:
    """Returns the cache that a method was given by either of two names, or None without a cache.

    The name `past_key_values` gives a warning where transformers' own models give one.

    Args:
        module: whose method was called.
        cache: argument of the name `cache`.
        past_key_values: argument of the name `past_key_values`.

    Raises:
        TypeError: if both are given.
    """
    if past_key_values is None:
        return cache
    if cache is not None:
        raise TypeError(f"{type(module).__name__} got a cache as cache and as past_key_values: give one.")
    if CACHE_NAME == "cache" and not torch.compiler.is_compiling():
        warnings.warn(
            f"`past_key_values` is deprecated in this transformers. {type(module).__name__} takes `cache` too.",
            FutureWarning,
            stacklevel=3,
        )
    return past_key_values


def gives_cache(output: type) -> type:
    """The decorated class of outputs has the cache as an attribute by both names, whatever the release calls the field."""
    for name in CACHE_NAMES:
        if name != CACHE_NAME:
            setattr(output, name, property(lambda self: getattr(self, CACHE_NAME)))
    return output


class GenerationInputs(dict):
    """This dictionary of arguments for a forward has one cache, which is read, set and taken out by both names.

    PEFT 0.21's prompt learning reads and replaces `past_key_values` in what `prepare_inputs_for_generation` returns.
    """

    @staticmethod
    def _key(name: str) -> str:
        return CACHE_NAME if name in CACHE_NAMES else name

    def __getitem__(self, name: str) -> Any:
        return super().__getitem__(self._key(name))

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(self._key(name), value)

    def __contains__(self, name: object) -> bool:
        return super().__contains__(self._key(str(name)))

    def get(self, name: str, default: Any = None) -> Any:
        """This returns an item, or the default."""
        return super().get(self._key(name), default)

    def pop(self, name: str, *default: Any) -> Any:
        """This takes an item out and returns it."""
        return super().pop(self._key(name), *default)


def is_paged(cache: Any) -> bool:
    """Returns whether a cache is the one of continuous batching, where one row holds the tokens of many sequences."""
    return isinstance(cache, PagedAttentionCache)


def update_cache(
    cache: Any, key: torch.Tensor, value: torch.Tensor, layer_idx: int, kwargs: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """This adds keys and values of new tokens to a cache.

    Args:
        cache: a `Cache`, or the `PagedAttentionCache` of continuous batching.
        key: (B, heads, S, D).
        value: (B, heads, S, D').
        layer_idx: index of the layer.
        kwargs: what the attention function will get beside them; changed in place for a paged cache.

    Returns:
        The keys and values (B, heads, S', D) and (B, heads, S', D') to attend to, S' tokens of them.
    """
    if CACHE_NAME == "cache":
        return cache.update(key, value, layer_idx, kwargs=kwargs)
    if is_paged(cache):
        kwargs["cache"] = cache  # the attention function of these releases updates it
        return key, value
    return cache.update(key, value, layer_idx)


def saved_by_earlier_version(values: dict[str, Any]) -> bool:
    """Returns whether the contents of a config.json were written by a version of this package before 0.4.0.

    transformers writes its own version into each config.json; since 0.4.0 the configuration writes `code_version` too.
    """
    if values.get("transformers_version") is None:
        return False
    version = str(values.get("code_version") or "0")
    numbers = [int(part) for part in version.split(".")[:2] if part.isdecimal()]
    return numbers < [0, 4]


def warn_of_old_code(config: Any) -> None:
    """This warns of a checkpoint whose code decodes wrongly on transformers 5.24 where this package is not imported."""
    folder, versioned = Path(config.name_or_path), getattr(config, "code_version", None) is not None
    if (folder / "modeling_moe.py").is_file():
        # version 0.1.0 leaves `code_version` in a configuration that it saves with its own code
        versioned = (folder / "compatibility.py").is_file()
    if getattr(config, "auto_map", None) and not versioned:
        logger.warning_once(
            f"{config.name_or_path} was saved by modeling_moe 0.1.0, whose code writes wrong text on transformers 5.24 and "
            "later wherever the package is not imported: save it again (save_pretrained or push_to_hub)."
        )


def refuse_unknown(model: Any, kwargs: dict[str, Any]) -> None:
    """This refuses a keyword argument of a forward that nothing reads, as a Python signature would.

    Args:
        model: whose forward was called.
        kwargs: the keyword arguments that the forward's signature does not name.

    Raises:
        TypeError: names the keyword, and one that is meant perhaps.
    """
    # vLLM adds to what a model records after it is made
    known = KEYWORDS | {f"output_{name}" for name in model._can_record_outputs}
    for keyword in kwargs:
        if keyword not in known:
            close = difflib.get_close_matches(keyword, known | set(inspect.signature(model.forward).parameters), n=1)
            remedy = f"did you mean {close[0]}?" if close else "leave it out."
            raise TypeError(
                f"{type(model).__name__}.forward() got an unexpected keyword argument {keyword!r}, which nothing would "
                f"read: {REMEDIES[keyword] + '.' if keyword in REMEDIES else remedy}"
            )
