# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module trains routers, in a `Trainer`, so that a gradient step on a few tokens of a text adapts them to the text.

Each row is a task of first-order MAML (Finn et al., arXiv:1703.03400): the routers are adapted to the first tokens of the row, the
trainer computes the gradient for the other tokens at the adapted weights, and steps from the weights before.
"""

from typing import Any

import datasets
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from ..data import one_table
from ..utils.errors import UserError
from .adaptation import adapt_router
from .arguments import MetaArguments, ModelArguments


class MetaTrainingMixin(Trainer):
    """Adapts the routers to a part of each micro-batch before the gradient of the rest; put it before another `Trainer` class.

    Accumulation, the ranks of DDP, router losses and clipping are those of an ordinary step, since the trainer makes the
    gradient. Every rank adapts to its own rows.

    Attributes:
        meta: the settings; None to train as `Trainer` does.
    """

    meta: MetaArguments | None = None

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch=None) -> torch.Tensor:
        """Computes the gradient of one micro-batch at the adapted weights, and puts the weights back."""
        if self.meta is None:
            return super().training_step(model, inputs, num_items_in_batch)
        support = self.meta.meta_support_tokens
        assert support is not None  # `MetaArguments` without it are not used
        inputs = self._prepare_inputs(inputs)
        query = {name: value[:, support:] for name, value in inputs.items()}
        with adapt_router(
            self.accelerator.unwrap_model(model),
            inputs["input_ids"][:, :support],
            learning_rate=self.meta.meta_learning_rate,
            steps=self.meta.meta_steps,
        ):
            return super().training_step(model, query, num_items_in_batch)


def check_meta(
    meta: MetaArguments, model_args: ModelArguments, args: TrainingArguments, max_length: int
) -> MetaArguments | None:
    """Returns the settings of meta-training, None without it.

    Raises:
        UserError: if another argument does not allow it.
    """
    if meta.meta_support_tokens is None:
        return None
    if model_args.method != "router":
        raise UserError(f"meta_support_tokens trains routers: set method router in the place of {model_args.method}")
    if meta.meta_support_tokens > max_length - 2:
        raise UserError(
            f"meta_support_tokens is {meta.meta_support_tokens}: it must leave 2 tokens of max_length {max_length}"
        )
    if args.per_device_train_batch_size != 1:
        raise UserError(
            "meta_support_tokens adapts to one row at a time: set per_device_train_batch_size 1, and "
            "gradient_accumulation_steps to the number of rows of a step"
        )
    if args.fsdp or args.deepspeed or model_args.distributed_config() is not None or args.torch_compile:
        raise UserError(
            "meta_support_tokens changes the routers between passes, which FSDP, DeepSpeed, a split model and torch_compile do "
            "not allow: train with one process or DDP"
        )
    return meta


def without_support_labels(blocks: datasets.Dataset, support: int) -> datasets.Dataset:
    """Returns the blocks with labels for the tokens after the first `support` ones, so that a trainer counts these alone."""

    def mask(row: dict[str, list[int]]) -> dict[str, list[int]]:
        return {"labels": [-100] * (support + 1) + row["labels"][support + 1 :]}

    return one_table(blocks.map(mask, desc="labels of the support"))
