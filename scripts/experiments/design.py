# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module reads the design of the upcycling experiments: everything that is fixed before the first run."""

from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoConfig

from modeling_moe.configuration_moe import MoEConfig
from modeling_moe.conversion import moe_config
from modeling_moe.upcycling import UpcyclingOptions, sparse_config
from modeling_moe.utils.errors import UserError

from .byte_text import ByteText, byte_text
from .flops import flops_per_token


@dataclass(frozen=True)
class Training:
    """Says how the dense model and the arms are trained.

    Attributes:
        length: number of bytes of a sequence.
        batch_size: number of sequences of a step.
        dense_steps: number of steps of the dense model before it is continued.
        dense_rate: largest learning rate of the dense model.
        steps: number of steps of the dense arm.
        warmup: share of the steps in which the learning rate rises.
        last_rate: learning rate at the end, as a share of the largest; it falls along a cosine.
        rate_rows: number of held-out sequences on which learning rates are chosen.
        test_rows: number of held-out sequences on which arms are compared.
        seed: seed of the dense model.
    """

    length: int
    batch_size: int
    dense_steps: int
    dense_rate: float
    steps: int
    warmup: float
    last_rate: float
    rate_rows: int
    test_rows: int
    seed: int


@dataclass(frozen=True)
class Search:
    """Says how the learning rate of each arm is found.

    Attributes:
        rates: learning rates of the first grid.
        factor: ratio of neighbouring rates, also of those by which the grid is extended.
        most: largest number of rates of an arm.
        seeds: seeds of the search.
    """

    rates: list[float]
    factor: float
    most: int
    seeds: list[int]


@dataclass(frozen=True)
class Rules:
    """Holds the rules of the comparison.

    Attributes:
        arms: the arms; the first one continues the dense model.
        pairs: pairs of arms on which claims are made, corrected for their number by Holm's method.
        pilot_seeds: seeds of the pilot runs, some of which may be seeds of the search.
        smallest_difference: smallest difference of interest, in nats per byte.
        power: probability that a test finds this difference.
        alpha: probability of at least one wrong claim, where no arms differ.
        least_seeds: smallest number of seeds.
        most_seeds: largest number of seeds; if more are needed, the power is lower, and the report says so.
    """

    arms: list[str]
    pairs: list[tuple[str, str]]
    pilot_seeds: list[int]
    smallest_difference: float
    power: float
    alpha: float
    least_seeds: int
    most_seeds: int


@dataclass(frozen=True)
class Growth:
    """Says what is trained.

    Attributes:
        dense: arm that continues the dense model.
        arms: upcycled arms, with fewer experts first; all have equally many experts per token.
        seeds: number of seeds.
        cost_steps: number of timed steps of each arm.
    """

    dense: str
    arms: list[str]
    seeds: int
    cost_steps: int


# section of the file -> class that holds the section
PARTS = {"training": Training, "search": Search, "comparison": Rules, "growth": Growth}


@dataclass(frozen=True)
class Design:
    """Holds everything that is fixed before the first run.

    Attributes:
        model: fields of the dense model's `LlamaConfig`.
        training: how dense model and arms are trained.
        arms: options of upcycling by arm; None continues the dense model.
        search: how learning rates are found.
        comparison: rules of the comparison of arms.
        growth: arms of the experiment on the number of experts.
    """

    model: dict[str, Any]
    training: Training
    arms: dict[str, dict[str, Any] | None]
    search: Search
    comparison: Rules
    growth: Growth

    @classmethod
    def read(cls, path: str | Path) -> "Design":
        """Reads a design from a YAML file.

        Raises:
            UserError: if the file does not hold a design.
        """
        try:
            content = yaml.safe_load(Path(path).read_text("utf-8"))
            parts: dict[str, Any] = {name: kind(**content.pop(name)) for name, kind in PARTS.items()}
            design = cls(**content, **parts)
        except (OSError, yaml.YAMLError, AttributeError, KeyError, TypeError) as error:
            raise UserError(f"design {path} does not hold a design of this experiment: {error}") from error
        for arm in {*design.comparison.arms, *design.growth.arms}:
            if arm not in design.arms:
                raise UserError(f"design {path}: arm {arm!r} has no options: add it to arms")
        return design

    @property
    def of_runs(self) -> dict[str, Any]:
        """What all runs depend on, in JSON's types; each run depends on the options of its arm, too."""
        return {"model": self.model, "training": asdict(self.training)}

    @cached_property
    def text(self) -> ByteText:
        """The text; it is read once in each process."""
        return byte_text(self.training.length, self.training.rate_rows, self.training.test_rows)

    @cached_property
    def dense_config(self) -> MoEConfig:
        """Configuration of the dense model."""
        return moe_config(AutoConfig.for_model("llama", **self.model))

    def config(self, arm: str) -> MoEConfig:
        """Returns the configuration of an arm's model."""
        fields = self.arms[arm]
        if fields is None:
            return self.dense_config
        return sparse_config(self.dense_config, UpcyclingOptions(**fields), torch.float32)

    def flops(self, arm: str) -> float:
        """Returns the FLOPs of a token of an arm, forward and backward."""
        return flops_per_token(self.config(arm), self.training.length)

    def steps(self, arm: str) -> int:
        """Returns the number of steps of an arm that cost the FLOPs of the dense arm."""
        dense = flops_per_token(self.dense_config, self.training.length)
        return max(1, round(self.training.steps * dense / self.flops(arm)))
