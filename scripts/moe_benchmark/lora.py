# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module measures LoRA on experts against PEFT's own code, full fine-tuning and LoRA on attention."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts, MixtralTopKRouter

from modeling_moe.dispatch import backend_of
from modeling_moe.lora import enable, peft_alone

from .arguments import BenchmarkArguments
from .case_runner import CaseRunner
from .cases import Case
from .check import FOREIGN_TOLERANCE, TOLERANCES, refuse_disagreement
from .contestants import OURS, PEFT, is_foreign
from .measure import Contestant
from .presets import PRESETS, Preset
from .results import Result
from .runner import tiles_of


VOCABULARY = 512
# GPUs get the size of a real model, so that products and not launches take the time
RANK = {"cpu": 8, "cuda": 16}
SEQUENCE = {"cpu": 64, "cuda": 1024}
ROUNDS = {"cpu": 15, "cuda": None}
ATTENTION, EXPERTS = ["q_proj", "v_proj"], ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
# smallest scale of an error, relative to the largest gradient: with one token the query gradients are rounding errors
ROUNDING = 1e-3
# contestant -> targets in the attention, in the experts (None: all weights are trained), experts' implementation
CONTESTANTS = {
    OURS: (ATTENTION, EXPERTS, "moe"),
    PEFT: (ATTENTION, EXPERTS, "grouped_mm"),
    "full": (None, None, "moe"),
    "full, grouped_mm": (None, None, "grouped_mm"),
    "attention": (ATTENTION, None, "moe"),
    "attention, grouped_mm": (ATTENTION, None, "grouped_mm"),
}


def _models(preset: Preset, rank: int, dtype: torch.dtype, device: torch.device) -> dict[str, nn.Module]:
    """Returns a model of two layers for each contestant, all with equal weights."""
    enable()
    heads = max(4, preset.hidden // 64)
    config = MixtralConfig(
        vocab_size=VOCABULARY, hidden_size=preset.hidden, intermediate_size=preset.intermediate, num_hidden_layers=2,
        num_attention_heads=heads, num_key_value_heads=heads, num_local_experts=preset.experts,
        num_experts_per_tok=preset.per_token,
    )  # fmt: skip
    torch.manual_seed(0)
    with device:
        base = AutoModelForCausalLM.from_config(config, dtype=dtype)
    models = {}
    for name, (attention, experts, implementation) in CONTESTANTS.items():
        model = copy.deepcopy(base)
        model.set_experts_implementation(implementation)
        if attention is not None:
            lora = LoraConfig(r=rank, lora_alpha=rank, target_modules=attention, target_parameters=experts)
            torch.manual_seed(1)
            model = get_peft_model(model, lora)
            for key, parameter in model.named_parameters():
                if "lora_B" in key:
                    nn.init.normal_(parameter, std=0.02)
        models[name] = model
    return models


class _Pass:
    """One contestant with its token ids."""

    def __init__(self, name: str, model: nn.Module, ids: torch.Tensor):
        self.name, self.model, self.ids = name, model, ids
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def _path(self):
        return peft_alone() if self.name == PEFT else nullcontext()

    def loss(self) -> torch.Tensor:
        with self._path():
            # a sum, because the gradients of a mean would underflow in float16
            return self.model(self.ids).logits.float().logsumexp(-1).sum()

    def forward(self) -> torch.Tensor:
        with torch.no_grad(), self._path():
            return self.model(self.ids).logits

    def forward_backward(self) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(self.loss(), self.parameters)

    def outcome(self, mode: str) -> dict[str, torch.Tensor]:
        """Returns the results of a pass by name."""
        if mode == "forward":
            return {"output": self.forward()}
        names = [name for name, parameter in self.model.named_parameters() if parameter.requires_grad]
        return dict(zip(names, self.forward_backward(), strict=True))


@contextmanager
def _routes(model: nn.Module, index: list[torch.Tensor] | None = None) -> Iterator[list[torch.Tensor]]:
    """Yields a list that receives the experts (T, K) that each router of `model` chooses.

    With `index`, such a list, the routers choose those experts: otherwise a rounding error that changes a token's
    experts would hide all other errors.
    """
    seen: list[torch.Tensor] = []

    def choose(router, args, output):
        logits, scores, chosen = output
        if index is not None:
            chosen = index[len(seen)]
            scores = logits.float().softmax(-1).gather(-1, chosen)
            scores = scores / scores.sum(-1, keepdim=True)
        seen.append(chosen)
        return logits, scores, chosen

    handles = [each.register_forward_hook(choose) for each in model.modules() if isinstance(each, MixtralTopKRouter)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _backends(model: nn.Module) -> Iterator[set[str]]:
    """Yields a set that receives the back ends that compute the experts of `model` with their updates."""
    names: set[str] = set()

    def ask(experts, args):
        # at this point PEFT's layer has passed the low-rank factors to the experts
        names.add(backend_of(experts, *args[:2]))

    handles = [each.register_forward_pre_hook(ask) for each in model.modules() if isinstance(each, MixtralExperts)]
    try:
        yield names
    finally:
        for handle in handles:
            handle.remove()


def _differences(actual: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> dict[str, float]:
    """Returns, for the output and each gradient, the largest difference relative to the reference's largest element."""
    rounding = ROUNDING * max(tensor.abs().max() for tensor in reference.values())
    errors = {}
    for name, theirs in reference.items():
        error = (actual[name].to(theirs.dtype) - theirs).abs().max() / theirs.abs().max().clamp(min=rounding)
        errors[name] = error.item()
    return errors


class LoraRunner(CaseRunner):
    """Measures cases of the level `"lora"`.

    Results of this package must equal those of PEFT's own code in float32, with equal weights and equal expert
    choices. The experts are Mixtral's, whatever the preset's family.
    """

    def __init__(self, args: BenchmarkArguments):
        super().__init__(args)
        self.rank, self.rounds = RANK[self.device.type], args.rounds or ROUNDS[self.device.type]
        self.loaded: tuple[str, str] | None = None
        self.models: dict[str, nn.Module] = {}
        self.passes: dict[str, _Pass] = {}

    def contestants(self, case: Case, result: Result) -> list[Contestant]:
        """Returns all of `CONTESTANTS` except those that differ from PEFT's own code in float32."""
        self._load(case)
        reference, index = self._reference(case)
        for name in (OURS, PEFT):
            check = partial(self._check, name, case, result, reference, index)
            if not self.guard(name, result, check):
                del self.passes[name]
        return [Contestant(name, getattr(each, case.mode)) for name, each in self.passes.items()]

    def remembered(self, name: str) -> tuple[Callable[[], Any], list[torch.Tensor]]:
        """Returns the loss function of a contestant, and its parameters."""
        each = self.passes[name]
        return each.loss, list(each.model.parameters())

    def _load(self, case: Case) -> None:
        key = (case.preset, case.dtype)
        self.passes = {}
        if key != self.loaded:
            self.models, self.loaded = {}, None
            self.free()
            self.models = _models(PRESETS[case.preset], self.rank, case.torch_dtype, self.device)
            self.loaded = key
        longest = SEQUENCE[self.device.type]
        length = longest if case.tokens % longest == 0 else case.tokens
        generator = torch.Generator().manual_seed(case.tokens)
        ids = torch.randint(VOCABULARY, (case.tokens // length, length), generator=generator).to(self.device)
        self.passes = {name: _Pass(name, model, ids) for name, model in self.models.items()}

    def _reference(self, case: Case) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
        """Returns the results of PEFT's own code in float32, and the experts that its routers choose."""
        model = self.models[PEFT]
        if case.torch_dtype != torch.float32:
            model = copy.deepcopy(model).float()
        with _routes(model) as index:
            outcome = _Pass(PEFT, model, self.passes[PEFT].ids).outcome(case.mode)
        return outcome, index

    def _check(self, name: str, case: Case, result: Result, reference, index: Sequence[torch.Tensor]) -> None:
        with _routes(self.models[name], list(index)), _backends(self.models[name]) as backends:
            errors = _differences(self.passes[name].outcome(case.mode), reference)
        if name == OURS:
            result.backends[name] = ", ".join(sorted(backends))
            result.tiles = tiles_of(result.backends[name], self.device)
        tolerance = TOLERANCES[case.torch_dtype] * (FOREIGN_TOLERANCE if is_foreign(name) else 1)
        refuse_disagreement(errors, tolerance, f"LoRA by {name} in {case}", "PEFT's own code in float32")
        result.errors[name] = {"largest": max(errors.values())}
