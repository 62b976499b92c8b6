# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module holds the arguments of long runs: learning rates by role, Muon, averaged routers, samples, stop on collapse."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from torch import nn
from torch.optim import Optimizer
from transformers import Trainer, TrainerCallback, TrainingArguments

from ..utils.errors import UserError
from .collapse_stop import CollapseError, CollapseStop
from .load_rates import scale_by_load
from .muon import MoEMuon, moe_muon
from .roles import ROLES, SHARES, parameter_groups
from .sampling import SampleCallback


LOAD = "load"


def _pairs(name: str, values: list[str], words: Sequence[str] = ()) -> dict[str, Any]:
    """Reads `role=value` pairs, whose values are numbers or one of some words."""
    pairs: dict[str, Any] = {}
    for text in values:
        role, _, value = text.partition("=")
        if role not in ROLES or role in pairs:
            raise UserError(f"{name} {text!r}: write ROLE=VALUE once for each role, of {', '.join(ROLES)}")
        try:
            pairs[role] = value if value in words else float(value)
        except ValueError as error:
            nor = f" and none of {', '.join(words)}" if words else ""
            raise UserError(f"{name} {text!r}: {value!r} is no number{nor}: write {role}=0.1, for example") from error
    return pairs


@dataclass
class LongRunArguments:
    """How a long run treats the parts of an MoE, and how it is watched."""

    role_rates: list[str] = field(
        default_factory=list,
        metadata={
            "help": "factors on learning_rate, such as router=0.1 expert=sqrt_share; roles are "
            f"{', '.join(ROLES)}; for expert also sqrt_share (sqrt(K/E)), share (K/E) or load (each expert by its tokens)"
        },
    )
    role_decays: list[str] = field(
        default_factory=list, metadata={"help": "weight decay of roles in place of weight_decay, such as router=0"}
    )
    muon: bool = field(
        default=False, metadata={"help": "train each matrix of each expert by Muon, and the rest by AdamW"}
    )
    router_average: float | None = field(
        default=None,
        metadata={
            "help": "decay of a moving average of the routers, such as 0.999, which evaluations use and the result holds"
        },
    )
    sample_steps: int | None = field(
        default=None, metadata={"help": "optimizer steps between two logs of texts that the model writes"}
    )
    sample_prompts: list[str] = field(default_factory=list, metadata={"help": "texts to continue every sample_steps"})
    sample_tokens: int = field(default=64, metadata={"help": "tokens to write for each of sample_prompts"})
    sample_temperature: float = field(
        default=1.0, metadata={"help": "divides the logits of samples; 0 writes the likeliest token"}
    )
    sample_seed: int = field(default=0, metadata={"help": "seed of every sampling"})
    collapse_steps: int | None = field(
        default=None,
        metadata={
            "help": "optimizer steps between two readings of the load, which end the run if the routing collapses"
        },
    )
    collapse_patience: int = field(default=3, metadata={"help": "collapsed readings in a row that end the run"})
    collapse_entropy: float = field(
        default=0.25,
        metadata={
            "help": "a layer is collapsed if the spread of its load, 1 in balance and 0 in full collapse, is below this"
        },
    )
    collapse_violation: float | None = field(
        default=None, metadata={"help": "a layer is collapsed, too, if its MaxVio is above this"}
    )

    def __post_init__(self):
        self.rates()
        if (self.sample_steps is None) != (not self.sample_prompts):
            raise UserError("sample_steps and sample_prompts need each other: give both or none")
        self._refuse_unused()
        if self.router_average is not None and not 0 <= self.router_average < 1:
            raise UserError(f"router_average is {self.router_average}: it must be at least 0 and below 1")
        self.callbacks()
        self.samples()

    def _refuse_unused(self) -> None:
        """Refuses what describes samples or readings of the load that the run does not make."""
        for name, prefix in {"sample_steps": "sample_", "collapse_steps": "collapse_"}.items():
            if getattr(self, name) is not None:
                continue
            for entry in fields(self):
                # a list has no default of its own
                if entry.name.startswith(prefix) and getattr(self, entry.name) not in (entry.default, []):
                    raise UserError(f"{entry.name} has no effect without {name}: give both or none")

    def rates(self) -> tuple[dict[str, float | str], dict[str, float]]:
        """Returns the factors on the learning rate, and the weight decays, by role.

        Raises:
            UserError: if a text is not `role=value`.
        """
        rates = _pairs("role_rates", self.role_rates, (*SHARES, LOAD))
        for role, rate in rates.items():
            if isinstance(rate, str) and role != "expert":
                raise UserError(f"role_rates {role}={rate}: {rate} is for experts, give a number")
        return rates, _pairs("role_decays", self.role_decays)

    def callbacks(self) -> list[TrainerCallback]:
        """Returns the callbacks to give to a `Trainer`."""
        if self.collapse_steps is None:
            return []
        limits = (self.collapse_entropy, self.collapse_violation)
        return [CollapseStop(self.collapse_steps, self.collapse_patience, *limits)]

    def samples(self) -> SampleCallback | None:
        """Returns the callback that logs samples, to add to a `Trainer`; None without samples."""
        if self.sample_steps is None:
            return None
        return SampleCallback(
            self.sample_prompts,
            self.sample_steps,
            max_new_tokens=self.sample_tokens,
            temperature=self.sample_temperature,
            seed=self.sample_seed,
        )

    def used(self) -> dict[str, Any]:
        """Returns the arguments that differ from their defaults."""
        defaults = vars(LongRunArguments())
        return {
            entry.name: value for entry in fields(self) if (value := getattr(self, entry.name)) != defaults[entry.name]
        }


def long_run_optimizer(model: nn.Module, args: TrainingArguments, run: LongRunArguments) -> MoEMuon | None:
    """Returns the Muon that a run asks for, or None.

    Raises:
        UserError: if another optimizer is asked for too, or the model's weights are not whole matrices.
    """
    if not run.muon:
        return None
    name = getattr(args.optim, "value", args.optim)
    if str(name) not in ("adamw_torch", "adamw_torch_fused"):
        raise UserError(f"muon true replaces optim {name}: omit one of them")
    rates, decays = _without_load(run)
    return moe_muon(
        model,
        args.learning_rate,
        args.weight_decay,
        rates=rates,
        weight_decays=decays,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
    )


def _without_load(run: LongRunArguments) -> tuple[dict[str, float | str], dict[str, float]]:
    rates, decays = run.rates()
    return {role: rate for role, rate in rates.items() if rate != LOAD}, decays


def set_roles(model: nn.Module, optimizer: Optimizer, args: TrainingArguments, run: LongRunArguments) -> None:
    """Gives a new optimizer of a `Trainer` the learning rates and weight decays by role that a run asks for.

    Raises:
        UserError: if a role is not trained, or the optimizer has groups of another kind.
    """
    rates, decays = _without_load(run)
    if (rates or decays) and not isinstance(optimizer, MoEMuon):
        groups = parameter_groups(model, args.learning_rate, args.weight_decay, rates=rates, weight_decays=decays)
        _regroup(optimizer, groups, str(getattr(args.optim, "value", args.optim)))
    if run.rates()[0].get("expert") == LOAD:
        scale_by_load(model, optimizer)


def _regroup(optimizer: Optimizer, groups: list[dict[str, Any]], name: str) -> None:
    own = ("params", "lr", "weight_decay")
    others: list[Mapping[str, Any]] = [
        {key: value for key, value in group.items() if key not in own} for group in optimizer.param_groups
    ]
    if any(other != others[0] for other in others):
        raise UserError(f"role_rates and role_decays cannot be used with optim {name}, which has groups of its own")
    optimizer.param_groups[:] = [{**others[0], **group} for group in groups]


def refuse_collapsed(trainer: Trainer) -> None:
    """Raises [`CollapseError`] if a [`CollapseStop`] has ended the training."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, CollapseStop) and callback.reason is not None:
            raise CollapseError(callback.reason)
