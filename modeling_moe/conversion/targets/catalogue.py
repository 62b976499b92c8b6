# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module exports MoE checkpoints to transformers' own MoE families, under the classic names that every server loads.

A feature that the family cannot express is refused by name. Exact exports include upcycled Llama and Mistral models as
`mixtral`, upcycled Granite models as `granitemoeshared`, upcycled Qwen2 models as `qwen2_moe`, and upcycled Qwen3 models as
`qwen3_moe`.
"""

import logging
from typing import NamedTuple

from transformers import PreTrainedConfig

from ...configuration_moe import MoEConfig
from ...utils.errors import UserError
from .base import Target
from .gpt_oss import GPT_OSS
from .jetmoe import JETMOE
from .servers import SERVERS, Server, faults, servers
from .sigmoid import DEEPSEEK_V3, GLM4_MOE, MINIMAX_M2
from .softmax import GRANITEMOESHARED, MIXTRAL, OLMOE, QWEN2_MOE, QWEN3_MOE


# in the order in which `auto` prefers targets that equally many servers run
TARGETS: dict[str, Target] = {
    target.model_type: target
    for target in (
        MIXTRAL,
        GRANITEMOESHARED,
        QWEN3_MOE,
        QWEN2_MOE,
        DEEPSEEK_V3,
        GLM4_MOE,
        MINIMAX_M2,
        GPT_OSS,
        OLMOE,
        JETMOE,
    )
}
AUTO = "auto"
REMEDY = "keep the model in this package's format, which `moe serve` runs"


def reasons_of_targets(config: MoEConfig) -> dict[str, list[str]]:
    """Returns for each target the features of a model that it cannot express, see [`Target.reasons`]."""
    # the configurations of all targets are tried, and what one would warn of does not concern this model
    warns = logging.getLogger(MoEConfig.__module__)
    disabled, warns.disabled = warns.disabled, True
    try:
        return {name: target.reasons(config) for name, target in TARGETS.items()}
    finally:
        warns.disabled = disabled


def export_plan(config: MoEConfig, target: str) -> PreTrainedConfig:
    """Returns the configuration under which transformers' own model computes the same logits.

    Args:
        config: configuration of the MoE model.
        target: a key of `TARGETS`, whose `tensors` function maps the weights.

    Raises:
        UserError: if the target is unknown or cannot hold the model. The message names each field that prevents it, and
            the targets that can hold the model or else the nearest one.
    """
    if target not in TARGETS:
        raise UserError(f"target {target!r} is unknown: it must be moe, {AUTO} or one of {', '.join(TARGETS)}")
    reasons = reasons_of_targets(config)
    if not reasons[target]:
        return TARGETS[target].config(config)
    able = [name for name in TARGETS if not reasons[name]]
    nearest = min(TARGETS, key=lambda name: (len(reasons[name]), name != target))
    if able:
        remedy = f"{' or '.join(able)} can"
    elif nearest == target:
        remedy = "no other target comes nearer"
    else:
        remedy = f"nor can another target; the nearest, {nearest}, fails for {', '.join(reasons[nearest])}"
    raise UserError(f"target {target} cannot hold this model for {', '.join(reasons[target])}; {remedy}")


def exact_targets(config: MoEConfig) -> dict[str, list[Server]]:
    """Returns the targets that hold a model, in the order of `TARGETS`, and the servers known to run each exactly."""
    reasons = reasons_of_targets(config)
    return {name: servers(target.config(config)) for name, target in TARGETS.items() if not reasons[name]}


class Choice(NamedTuple):
    """The target that `auto` chooses.

    Attributes:
        target: key of `TARGETS`.
        reason: a sentence that says which other targets hold the model, and which servers run those.
    """

    target: str
    reason: str


def choose_target(config: MoEConfig, server: str | None = None) -> Choice:
    """Chooses the target that holds a model and that most servers run; of several, the first in the order of `TARGETS`.

    Args:
        config: configuration of the MoE model.
        server: key of `SERVERS`; only targets that this server is known to compute exactly are chosen then.

    Raises:
        UserError: if no target holds the model, or the server computes none of them exactly. The message names the nearest
            target and the fields that prevent it, or what the server does with each target.
    """
    able = exact_targets(config)
    if not able:
        reasons = reasons_of_targets(config)
        nearest = min(reasons, key=lambda name: len(reasons[name]))
        told = f"the nearest target, {nearest}, fails for {', '.join(reasons[nearest])}"
        raise UserError(f"no target holds this model, so keep target moe, which this package serves ({told})")
    named = None if server is None else server_named(server)
    if named is not None and not any(named in found for found in able.values()):
        told = "; ".join(f"{name}: it {_faults_of(config, name, named)}" for name in able)
        raise UserError(f"{named.name} computes no target of this model exactly ({told}); {REMEDY}")
    target = max(able, key=lambda name: (named is None or named in able[name], len(able[name])))
    told = [f"{name} ({', '.join(server.name for server in found)})" for name, found in able.items() if name != target]
    others = f"; {' and '.join(told)} can hold it too" if told else ", and no other target holds it"
    return Choice(target, f"{target} holds this model exactly{others}.")


def server_named(name: str) -> Server:
    """Returns the server of a key of `SERVERS`.

    Raises:
        UserError: if the key is unknown.
    """
    if name not in SERVERS:
        raise UserError(f"server {name!r} is unknown: it must be one of {', '.join(SERVERS)}")
    return SERVERS[name]


def _faults_of(config: MoEConfig, target: str, server: Server) -> str:
    return "; it ".join(faults(TARGETS[target].config(config), server))


def refuse_server(config: MoEConfig, target: str, server: str) -> None:
    """Refuses a target that a server is not known to compute exactly.

    Args:
        config: configuration of the MoE model, which the target holds.
        target: key of `TARGETS`.
        server: key of `SERVERS`.

    Raises:
        UserError: names the server, what it does with which field, and the targets of this model that it does run.
    """
    named = server_named(server)
    if not (found := _faults_of(config, target, named)):
        return
    able = [name for name, exact in exact_targets(config).items() if named in exact]
    remedy = f"it computes target {' or '.join(able)} exactly" if able else REMEDY
    raise UserError(f"{named.name} does not compute target {target} of this model exactly: it {found}; {remedy}")
