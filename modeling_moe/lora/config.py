# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module makes PEFT configurations for MoE models from a few choices."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from peft import LoraConfig
from rich.console import Console
from torch import nn
from transformers import PreTrainedModel, conversion_mapping

from ..attention_experts import attends
from ..monitoring import experts_per_token
from ..utils.errors import UserError
from .enabling import enable
from .holding import shown_whole
from .layers import MATRICES, Experts, is_experts, wrap
from .sharding import full_shape


RANKS = ("expert", "token")
ROUTERS = ("gate", "router")
SHARED = ("shared_experts", "shared_expert")


@dataclass
class MoELoraConfig(LoraConfig):
    """PEFT's [`~peft.LoraConfig`] whose `lora_dropout` reaches experts too.

    Creating one calls [`~modeling_moe.lora.enable`]. PEFT refuses dropout beside `target_parameters`, also when it
    loads an adapter, so the saved file holds `lora_dropout` 0. Set the dropout again to go on training a loaded
    adapter.

    Raises:
        UserError: if `lora_dropout` is not in [0, 1).
    """

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.lora_dropout < 1:
            raise UserError(f"lora_dropout is {self.lora_dropout}: choose a number from 0 to below 1")
        enable()
        # PEFT's annotation asks for a class, and PEFT only calls it
        self._register_custom_module({nn.Module: wrap})  # pyrefly: ignore[bad-assignment]

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields to save, which PEFT alone can load."""
        return super().to_dict() | ({"lora_dropout": 0.0} if self.target_parameters else {})


def moe_lora_config(
    model: PreTrainedModel,
    r: int = 16,
    experts: bool = True,
    router: bool = True,
    attention: bool | Sequence[str] = True,
    shared: bool = False,
    rank_per: str = "expert",
    lora_alpha: float | None = None,
    lora_dropout: float = 0.0,
    use_rslora: bool = False,
    quiet: bool = False,
) -> MoELoraConfig:
    """Makes a configuration for [`~peft.get_peft_model`], and prints how many parameters the configuration trains.

    Calls [`~modeling_moe.lora.enable`].

    Args:
        model: any causal LM. Experts, routers and attention are found by the names that transformers gives them.
        r: rank of each update.
        experts: update the matrices of the routed experts, with one update for each expert.
        router: train all weights of the routers, which are small.
        attention: update the linear layers of the attention; or the names of linear layers anywhere in the model.
        shared: update the linear layers of the shared experts.
        rank_per: `"expert"` gives each expert's update the rank `r`. `"token"` divides `r` among the experts of a
            token: each update has the rank `r // num_experts_per_tok`, and the scaling stays the same. It needs equal
            numbers of experts per token in attention and in networks.
        lora_alpha: updates are scaled by `lora_alpha / r`. The default is twice `r`.
        lora_dropout: dropout on the input of each update; on experts only where this package computes them.
        use_rslora: scale updates by `lora_alpha / sqrt(r)` instead (arXiv:2312.03732).
        quiet: print nothing.

    Raises:
        UserError: if the choices leave nothing to train, or the model does not allow them.

    Example:
        >>> from peft import get_peft_model
        >>> from modeling_moe import MoEConfig, MoEForCausalLM
        >>> from modeling_moe.lora import moe_lora_config
        >>> model = MoEForCausalLM(MoEConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=4))
        >>> model = get_peft_model(model, moe_lora_config(model, r=8, rank_per="token"))
    """
    if r < 1:
        raise UserError(f"r is {r}: it must be at least 1")
    with shown_whole(model):
        config = _lora_config(
            model, r, experts, router, attention, shared, rank_per, lora_alpha, lora_dropout, use_rslora
        )
        trained = trainable_parameters(model, config)
        if not trained:
            raise UserError(
                "nothing to train: the model has none of the experts, router, attention and shared asked for"
            )
        if not quiet:
            _print_trained(model, trained)
        return config


def _lora_config(
    model: PreTrainedModel,
    r: int,
    experts: bool,
    router: bool,
    attention: bool | Sequence[str],
    shared: bool,
    rank_per: str,
    lora_alpha: float | None,
    lora_dropout: float,
    use_rslora: bool,
) -> MoELoraConfig:
    """Makes the configuration of [`moe_lora_config`] for a model that shows its matrices whole."""
    parameters = _expert_parameters(model) if experts else []
    modules = _attention_layers(model, attention) + (_shared_layers(model) if shared else [])
    _check_split(model, modules)
    rank = _expert_rank(model, r, rank_per) if parameters else r
    alpha = 2 * r if lora_alpha is None else lora_alpha
    config = MoELoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        # PEFT's annotation is int, and PEFT only divides it
        lora_alpha=alpha * (rank / r) ** (0.5 if use_rslora else 1),  # pyrefly: ignore[bad-argument-type]
        lora_dropout=lora_dropout,
        use_rslora=use_rslora,
        target_modules=modules,
        target_parameters=parameters or None,
        modules_to_save=(_routers(model) if router else []) or None,
    )
    if rank != r:
        # PEFT warns of a pattern for parameters, so the linear layers are the exception
        config.rank_pattern, config.alpha_pattern = dict.fromkeys(modules, r), dict.fromkeys(modules, alpha)
    return config


def trainable_parameters(model: nn.Module, config: LoraConfig) -> dict[str, int]:
    """Returns how many parameters `config` trains in the experts, linear layers and routers of `model`.

    The model is not changed. Parts of which nothing is trained are left out. Shares that this package prints are shares of
    the model's parameters without the adapter; PEFT's `print_trainable_parameters` divides by model and adapter together.
    """
    counts = {"experts": 0, "linear layers": 0, "routers": 0}
    targets = tuple(config.target_parameters or ())
    for name, parameter in model.named_parameters():
        if _matches(name, targets):
            experts, rows, columns = full_shape(parameter)
            counts["experts"] += _rank(config, name) * experts * (rows + columns)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and _matches(name, tuple(config.target_modules or ())):
            counts["linear layers"] += _rank(config, name) * (module.in_features + module.out_features)
        if _matches(name, tuple(config.modules_to_save or ())):
            counts["routers"] += sum(full_shape(parameter).numel() for parameter in module.parameters())
    return {name: count for name, count in counts.items() if count}


def _print_trained(model: nn.Module, trained: dict[str, int]) -> None:
    if dist.is_initialized() and dist.get_rank() > 0:
        return
    count, total = sum(trained.values()), sum(full_shape(parameter).numel() for parameter in model.parameters())
    parts = ", ".join(f"{name} {number:,}" for name, number in trained.items())
    Console(stderr=True).print(f"LoRA trains {count:,} parameters, {count / total:.2%} of the model's: {parts}")


def _rank(config: LoraConfig, name: str) -> int:
    patterns = config.rank_pattern or {}
    return next((rank for key, rank in patterns.items() if name.endswith(f".{key}")), config.r)


def _matches(name: str, targets: tuple[str, ...]) -> bool:
    return name.endswith(tuple(f".{target}" for target in targets))


def _experts_of(model: nn.Module) -> list[tuple[str, str, Experts]]:
    """Returns, for each module of experts, the names of the block and of the module, and the module."""
    named = [(name.split("."), module) for name, module in model.named_modules() if is_experts(module)]
    return [(path[-2], path[-1], module) for path, module in named]


def _expert_parameters(model: nn.Module) -> list[str]:
    return sorted(
        {
            f"{block}.{name}.{matrix}"
            for block, name, module in _experts_of(model)
            for matrix in MATRICES
            if isinstance(getattr(module, matrix, None), nn.Parameter)
        }
    )


def _routers(model: nn.Module) -> list[str]:
    """Returns the names, block and router, of the routers beside experts, and of all routers of this package.

    A router of this package may stand where no experts with matrices are, and its buffers may move in training.
    """
    blocks = {block for block, *_ in _experts_of(model)}
    targets = {f"{block}.{router}" for block in blocks for router in ROUTERS}
    paths = [(name.split("."), module) for name, module in model.named_modules()]
    return sorted(
        {".".join(path[-2:]) for path, module in paths if _is_own_router(module) or ".".join(path[-2:]) in targets}
    )


def _is_own_router(module: nn.Module) -> bool:
    """Returns True for a router of this package, also of the code that a checkpoint contains."""
    return callable(getattr(module, "auxiliary_loss", None))


def _linear_layers(model: nn.Module, parents: Sequence[str]) -> list[str]:
    """Returns the names of the linear layers inside modules that are called one of `parents`."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not set(parents).isdisjoint(name.split("."))
    ]


def _attention_layers(model: nn.Module, attention: bool | Sequence[str]) -> list[str]:
    if attention is True:
        return sorted({name.rsplit(".", 1)[1] for name in _linear_layers(model, ("self_attn",))})
    return _named(model, attention) if attention else []


def _named(model: nn.Module, targets: Sequence[str]) -> list[str]:
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not any(_matches(name, tuple(targets)) for name in linear):
        raise UserError(f"attention: {' '.join(targets)} match no linear layer, name those that the model has")
    return list(targets)


def _shared_layers(model: nn.Module) -> list[str]:
    names = _linear_layers(model, SHARED)
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if names and model_type in conversion_mapping._MODEL_TO_CONVERSION_PATTERN:
        raise UserError(f"shared: PEFT takes {names[0]} of a {model_type} model for routed experts, set shared=False")
    return sorted({".".join(name.rsplit(".", 2)[1:]) for name in names})


def _check_split(model: PreTrainedModel, modules: list[str]) -> None:
    distributed = getattr(model.config, "distributed_config", None)
    if not modules or distributed is None:
        return
    sizes = {name: getattr(distributed, name, 1) for name in ("fsdp_size", "tp_size", "dp_replicate_size")}
    if sum(size > 1 for size in sizes.values()) > 1:
        # PEFT 0.21 gives such factors the width of one process's part, or does not average their gradients over batches
        raise UserError(
            f"attention, shared: PEFT cannot adapt linear layers split in two ways, leave one of {', '.join(sizes)} above "
            "1, or leave these layers out"
        )


def _expert_rank(model: PreTrainedModel, r: int, rank_per: str) -> int:
    if rank_per not in RANKS:
        raise UserError(f"rank_per is {rank_per!r}: choose {' or '.join(RANKS)}")
    if rank_per == "expert":
        return r
    numbers = {_choices(model, experts) for *_, experts in _experts_of(model)}
    if len(numbers) > 1:
        raise UserError(
            "rank_per='token' needs one number of experts per token, and attention has another than the feed-forward networks: "
            "choose rank_per='expert'"
        )
    (top_k,) = numbers
    if top_k is None:
        raise UserError(
            "rank_per='token' needs the number of experts per token, which config.json does not name: choose rank_per='expert'"
        )
    if r < top_k:
        raise UserError(f"r is {r}, less than the {top_k} experts of a token: raise it, or choose rank_per='expert'")
    return r // top_k


def _choices(model: PreTrainedModel, experts: Any) -> int | None:
    """Returns the number of experts, of those that one parameter holds, that a token is sent to; None if it is unknown."""
    top_k = experts_per_token(model.config, experts)
    if top_k is None or not attends(experts):
        return top_k
    # SwitchHead chooses the two matrices of an expert one by one
    return top_k * experts.num_experts // experts.config.num_experts
