# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""Transformers' releases differ in a few names; one copy of this code, that of a checkpoint too, runs on all of them.

transformers 5.24 renamed `past_key_values` to `cache`, in models, masks, outputs and `generate`, and gives the paged cache of
continuous batching to the model, where earlier releases give it to the attention function. Here the name is `cache`; our
forwards take both names, and [`cache_keyword`] hands a cache to transformers by the name that the release has.

A forward that swallowed a keyword it does not know would turn the next rename into wrong text; [`refuse_unknown`] turns it
into a TypeError.
"""

import inspect
from collections.abc import Callable
from dataclasses import fields
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from transformers.generation.continuous_batching import PagedAttentionCache
from transformers.modeling_outputs import MoeModelOutputWithPast
from transformers.utils import TransformersKwargs, logging


logger = logging.get_logger(__name__)

# version of the package, and of the code that a checkpoint carries
__version__ = "0.2.0"

# the names that releases of transformers have for a cache, the newest first
CACHE_NAMES = ("cache", "past_key_values")

# what callers give a model beside its own arguments and transformers' TransformersKwargs, by who reads it
KEYWORDS = frozenset(TransformersKwargs.__annotations__) | {
    *("shift_labels", "ignore_index"),  # transformers' loss functions
    *("kernel_options", "deterministic"),  # its flex and flash attention
    # its continuous batching: attention, the paged cache and the sampler (before 5.19 with max_seqlen)
    *("read_index", "write_index", "block_table", "max_seqlen_q", "max_seqlen_k"),
    *("logits_indices", "logits_processor_args"),
    *("debug_io", "debug_io_dir", "prune_layers"),  # its tracing of a model
    "skip_logits",  # Liger, which `Trainer` tells that it needs the loss alone
    "logits_to_keep",  # TRL's distillation, which gives it to the decoder without a head too
    "margin",  # TRL's reward trainer, which gives the whole batch to the model
    *("attention_instances", "forward_batch"),  # vLLM's and SGLang's attention
    *("tree_kv_index", "tree_cu_seqlens_q", "tree_cu_seqlens_k", "tree_max_seqlen_q", "tree_max_seqlen_k"),  # TRL's
}

REMEDIES = {
    "token_type_ids": "set tokenizer.model_input_names = ['input_ids', 'attention_mask']",
    "cache_position": "give position_ids, or leave it out: the cache knows its length",
}


def cache_name(output: type) -> str:
    """The name that a class of transformers' outputs has for a cache.

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
    """The keyword argument that hands a cache to a function, layer or output of transformers."""
    return {CACHE_NAME: cache}


def takes_cache(forward: Callable) -> Callable:
    """Lets a method whose parameter is `cache` be called with `past_key_values` as well.

    The method raises TypeError if it is given a cache by each name. Its signature shows both names.
    """

    @wraps(forward)
    def wrapper(self, *args, past_key_values=None, **kwargs):
        if past_key_values is not None:
            if kwargs.get("cache") is not None:
                raise TypeError(
                    f"{type(self).__name__}.{forward.__name__}() got a cache as cache and as past_key_values: give one."
                )
            kwargs["cache"] = past_key_values
        return forward(self, *args, **kwargs)

    signature = inspect.signature(forward)
    old_name = inspect.Parameter("past_key_values", inspect.Parameter.KEYWORD_ONLY, default=None)
    *named, rest = signature.parameters.values()
    wrapper.__dict__["__signature__"] = signature.replace(parameters=[*named, old_name, rest])
    return wrapper


def gives_cache(output: type) -> type:
    """Lets the cache in a class of outputs be read by both names, whatever the release calls the field."""
    for name in CACHE_NAMES:
        if name != CACHE_NAME:
            setattr(output, name, property(lambda self: getattr(self, CACHE_NAME)))
    return output


class GenerationInputs(dict):
    """Keyword arguments for a forward, in which both names of the cache are one key, the release's.

    PEFT's prompt learning, in releases before transformers 5.24, reads and replaces `past_key_values`.
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
        """The value of a key by each of its names."""
        return super().get(self._key(name), default)

    def pop(self, name: str, *default: Any) -> Any:
        """The value of a key by each of its names, which is taken out."""
        return super().pop(self._key(name), *default)


def is_paged(cache: Any) -> bool:
    """Whether a cache is that of continuous batching, in which the tokens of many sequences lie in one row."""
    return isinstance(cache, PagedAttentionCache)


def update_cache(
    cache: Any, key: torch.Tensor, value: torch.Tensor, layer_idx: int, kwargs: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Adds keys and values of new tokens to a cache.

    Args:
        cache: transformers' own, or the paged one.
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


def warn_of_old_code(config: Any) -> None:
    """Warns, once, of a checkpoint whose code decodes wrongly on transformers 5.24 where this package is not imported."""
    folder, versioned = Path(config.name_or_path), getattr(config, "code_version", None) is not None
    if (folder / "modeling_moe.py").is_file():
        # version 0.1.0 leaves `code_version` in a configuration that it saves with its own code
        versioned = (folder / "compatibility.py").is_file()
    if getattr(config, "auto_map", None) and not versioned:
        logger.warning_once(
            f"{config.name_or_path} carries code from before modeling_moe 0.2.0, which writes wrong text on transformers "
            "5.24 and later wherever the package is not imported: save it again (save_pretrained or push_to_hub)."
        )


def refuse_unknown(model: Any, kwargs: dict[str, Any]) -> None:
    """Raises TypeError for a keyword argument of a model's forward that nothing reads, as a Python signature would.

    Args:
        model: whose forward was called.
        kwargs: the keyword arguments that the forward's signature does not name.
    """
    # vLLM adds to what a model records after it is made
    recorded = {f"output_{name}" for name in model._can_record_outputs}
    for keyword in kwargs:
        if keyword not in KEYWORDS and keyword not in recorded:
            raise TypeError(
                f"{type(model).__name__}.forward() got an unexpected keyword argument {keyword!r}, which nothing would "
                f"read: {REMEDIES.get(keyword, 'leave it out')}."
            )
