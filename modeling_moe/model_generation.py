# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module adapts transformers' text generation to a Mixture of Experts."""

from typing import Any

import torch
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin

from .compatibility import CACHE_NAMES, GenerationInputs, cache_keyword, one_cache


class MoEGenerationMixin(GenerationMixin):
    """transformers' generation, with a task per token, a LongRoPE that outgrows its short factors, and both cache names."""

    # the model's attributes that this mixin reads
    config: Any
    training: bool

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        *,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> GenerationInputs:
        """Prepares the inputs of one step as transformers does.

        A text that outgrows the short factors of a LongRoPE is read again with the long factors. A new token has the task
        of the prompt's last token.
        """
        cache = one_cache(self, cache, past_key_values)
        rope = self.config.rope_parameters or {}
        if (
            cache is not None
            and rope.get("rope_type") == "longrope"
            and 0 < cache.get_seq_length() <= rope["original_max_position_embeddings"] < input_ids.shape[1]
        ):
            cache, kwargs["next_sequence_length"] = None, None
        # by name: transformers looks into the signature for whether a prompt may be embeddings
        inputs = GenerationInputs(
            super().prepare_inputs_for_generation(
                input_ids, inputs_embeds=inputs_embeds, **cache_keyword(cache), **kwargs
            )
        )
        if (tasks := inputs.get("task_ids")) is not None and tasks.dim() == 2:  # (B, S) of the prompt
            seen = 0 if cache is None else int(cache.get_seq_length())
            given = inputs["inputs_embeds"] if inputs.get("input_ids") is None else inputs["input_ids"]
            columns = torch.arange(seen, seen + given.shape[1], device=tasks.device)
            inputs["task_ids"] = tasks[:, columns.clamp(max=tasks.shape[1] - 1)]
        return inputs

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generates as transformers does; a cache may be given by either name, whichever the release knows.

        Raises:
            TypeError: if a cache is given by both names.
        """
        named = {name: kwargs.pop(name) for name in CACHE_NAMES if kwargs.get(name) is not None}
        if len(named) > 1:
            raise TypeError(f"generate() got a cache as {' and as '.join(named)}: give one.")
        for cache in named.values():
            kwargs |= cache_keyword(cache)
        return super().generate(*args, **kwargs)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Starts continuous batching as transformers does, which `generate_batch` and its server call.

        Raises:
            ValueError: if continuous batching would change the text.
        """
        self.config.refuse_continuous_batching(self.training)
        return super().init_continuous_batching(*args, **kwargs)
