# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module lets a model write texts while a `Trainer` trains it, without changing the training by a bit."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback

from ..utils.errors import UserError
from ..utils.loading import refuse_longer


@contextmanager
def aside(model: nn.Module, device: torch.device, seed: int) -> Iterator[None]:
    """Runs the block in evaluation mode without gradients, with random numbers of its own; both are put back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices, device_type="cuda" if device.type == "cpu" else device.type), torch.no_grad():
        _seed(device, seed)
        model.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training


def _seed(device: torch.device, seed: int) -> None:
    """Seeds the CPU and one device; `torch.manual_seed` would seed all devices, of which one is put back."""
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        with torch.accelerator.device_index(device.index):
            torch.get_device_module(device).manual_seed(seed)


class SampleCallback(TrainerCallback):
    """Logs what the model makes of some prompts, every few steps: to `trainer_state.json` and the trackers of `report_to`.

    The log entry of a sampled step has the keys `sample/0`, `sample/1` and so on, with prompt and continuation. TensorBoard and
    Weights & Biases show texts; a tracker that takes numbers only drops them. The texts come from the weights that are trained.
    Random numbers, the modes of all modules and the gradients are those of a training without samples, so that the trained
    weights are equal bit for bit.

    Args:
        prompts: texts to continue.
        every: optimizer steps between two samplings.
        max_new_tokens: number of tokens to write for each prompt.
        temperature: divides the logits; 0 writes the likeliest token.
        seed: seed of every sampling, so that samplings differ by the weights alone.

    Raises:
        UserError: if a number is out of range, a prompt is empty, or prompt and new tokens exceed the model's positions.

    Example:
        >>> SampleCallback(["The old mill"], every=500).add_to(trainer)
        >>> trainer.train()
    """

    def __init__(
        self, prompts: Sequence[str], every: int, *, max_new_tokens: int = 64, temperature: float = 1.0, seed: int = 0
    ):
        for name, value in {"sample_steps": every, "sample_tokens": max_new_tokens}.items():
            if value < 1:
                raise UserError(f"{name} is {value}: it must be at least 1")
        if not prompts or not all(prompts):
            raise UserError("sample_prompts needs texts that are not empty: give at least one")
        if not 0 <= temperature < float("inf"):
            raise UserError(f"sample_temperature is {temperature}: it must be a number from 0")
        self.prompts, self.every, self.seed = list(prompts), every, seed
        self._options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0}
        if temperature > 0:
            self._options["temperature"] = temperature
        self._log: Callable[[dict[str, Any]], None] | None = None

    def add_to(self, trainer: Trainer) -> None:
        """Adds the callback to a Trainer, through whose log the texts reach the trackers."""
        self._log = trainer.log
        trainer.add_callback(self)

    def on_train_begin(self, args, state, control, **kwargs):
        """Checks that the prompts can be written on."""
        if self._log is None:
            raise ValueError(
                "SampleCallback reaches no log: call SampleCallback(...).add_to(trainer) instead of callbacks="
            )
        tokenizer = kwargs.get("processing_class")
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise UserError("sample_prompts needs a tokenizer: give the Trainer one as processing_class")
        for prompt in self.prompts:
            new, length = self._options["max_new_tokens"], len(tokenizer(prompt)["input_ids"])
            refuse_longer(
                kwargs["model"], length + new, f"sample_prompts: {length} tokens, and sample_tokens is {new}"
            )

    def on_step_end(self, args, state, control, **kwargs):
        """Writes the texts, on all processes alike, since a split model computes on all of them."""
        if state.global_step % self.every == 0 and self._log is not None:
            texts = self.sample(kwargs["model"], kwargs["processing_class"], args.device)
            due = control.should_log
            self._log({f"sample/{number}": text for number, text in enumerate(texts)})
            control.should_log = due  # the loss of the step, which `Trainer` now takes for logged

    def sample(self, model: Any, tokenizer: PreTrainedTokenizerBase, device: torch.device) -> list[str]:
        """Returns each prompt with its continuation."""
        texts = []
        with aside(model, device, self.seed):
            for prompt in self.prompts:
                inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(device)
                written = model.generate(**inputs, **self._options, pad_token_id=tokenizer.pad_token_id)
                texts += tokenizer.batch_decode(written, skip_special_tokens=True)
        return texts
