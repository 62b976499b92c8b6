# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module measures what it costs to log the routing of a model in training."""

import copy
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, MixtralConfig

from modeling_moe import MoEConfig
from modeling_moe.monitoring.callback import RoutingSession

from .arguments import BenchmarkArguments
from .case_runner import CaseRunner
from .cases import Case
from .check import refuse_disagreement
from .contestants import LOGGED, OURS
from .measure import Clock, Contestant
from .presets import PRESETS, Preset
from .results import Result


VOCABULARY = 512
SEQUENCE = 128
# optimizer steps of a run, of which the last one is read, as with logging_steps: 2 in the recipe of scripts/demo.sh
STEPS = 2


def _model(preset: Preset, theirs: bool, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """Returns a model of two sparse layers: this package's, or transformers' Mixtral with this package's experts function."""
    heads = max(4, preset.hidden // 64)
    shape: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": preset.hidden, "intermediate_size": preset.intermediate,
        "num_hidden_layers": 2, "num_attention_heads": heads, "num_key_value_heads": heads,
        "num_experts_per_tok": preset.per_token,
    }  # fmt: skip
    torch.manual_seed(0)
    if theirs:
        config: Any = MixtralConfig(**shape, num_local_experts=preset.experts)
    else:
        config = MoEConfig(**shape, num_experts=preset.experts, moe_intermediate_size=preset.intermediate)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.set_experts_implementation(OURS)
    return model.train()


class _Training:
    """A model that is trained for a few steps, with its routing logged or not."""

    def __init__(self, model: nn.Module, ids: torch.Tensor, logged: bool):
        self.model, self.ids, self.step = model, ids, 0
        self.session = RoutingSession(model, 0) if logged else None

    def run(self) -> torch.Tensor:
        """Does `STEPS` steps as a `Trainer` does, without the optimizer's own work, and reads the figures after them."""
        loss = torch.zeros(())
        for _ in range(STEPS):
            self.model.zero_grad()
            loss = self.model(self.ids, labels=self.ids).loss
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.step += 1
            if self.session is not None:
                self.session.gradients.measure()
        if self.session is not None:
            self.session.read(self.step)
            self.session.take_scalars()
        return loss.detach()


class ProcessorClock(Clock):
    """Times calls on a CPU by the processor time of this process: other programs disturb it less than they disturb time."""

    def time(self, run: Callable[[], Any]) -> float:
        """Returns the processor time of one call in milliseconds, of all threads."""
        start = time.process_time()
        run()
        return 1e3 * (time.process_time() - start)


class WatchingRunner(CaseRunner):
    """Measures cases of the level `"watching"`: training steps with the routing logged, and without.

    Losses with and without must be equal. On a CPU the times are processor times, since the difference is small.
    """

    def __init__(self, args: BenchmarkArguments):
        super().__init__(args)
        if self.device.type == "cpu":
            self.clock = ProcessorClock(self.device)
        self.trainings: dict[str, _Training] = {}

    def contestants(self, case: Case, result: Result) -> list[Contestant]:
        """Returns this package's model and Mixtral, each with its routing logged and not."""
        self.trainings = {}
        self.free()
        generator = torch.Generator().manual_seed(case.tokens)
        length = SEQUENCE if case.tokens % SEQUENCE == 0 else case.tokens
        ids = torch.randint(VOCABULARY, (case.tokens // length, length), generator=generator).to(self.device)
        for logged, alone in LOGGED.items():
            model = _model(PRESETS[case.preset], logged != OURS, case.torch_dtype, self.device)
            self.trainings[alone] = _Training(model, ids, logged=False)
            self.trainings[logged] = _Training(copy.deepcopy(model), ids, logged=True)
            if not self.guard(logged, result, partial(self._check, logged, alone, case)):
                del self.trainings[logged]
        return [Contestant(name, training.run) for name, training in self.trainings.items()]

    def remembered(self, name: str) -> tuple[Callable[[], Any], list[torch.Tensor]] | None:
        """Returns None: logging saves nothing for backward."""
        return None

    def _check(self, logged: str, alone: str, case: Case) -> None:
        losses = [self.trainings[name].run() for name in (logged, alone)]
        error = (losses[0] - losses[1]).abs().item()
        refuse_disagreement({"loss": error}, 0.0, f"{logged} in {case}", "the model that is not logged")
