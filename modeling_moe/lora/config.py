# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""PEFT's configuration for a mixture of experts: the usual choices by name."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from peft import LoraConfig
from rich.console import Console
from torch import nn
from torch.nn.utils.parametrize import is_parametrized
from transformers import conversion_mapping

from ..utils.errors import UserError
from .layers import MATRICES, is_experts, wrap
from .sharding import full_shape


RANKS = ("expert", "token")
ROUTERS = ("gate", "router")
SHARED = ("shared_experts", "shared_expert")


@dataclass
class MoELoraConfig(LoraConfig):
    """PEFT's [`~peft.LoraConfig`] whose `lora_dropout` reaches experts too.

    PEFT refuses dropout beside `target_parameters`, in loading an adapter as well, so it is 0 in the saved file: say it
    again to train a loaded adapter further.
    """

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.lora_dropout < 1:
            raise UserError(f"lora_dropout is {self.lora_dropout}: choose a number from 0 to below 1")
        self._register_custom_module({nn.Module: wrap})

    def to_dict(self) -> dict[str, Any]:
        """As PEFT writes it, so that PEFT alone can load it."""
        return super().to_dict() | ({"lora_dropout": 0.0} if self.target_parameters else {})


def moe_lora_config(
    model: nn.Module,
    r: int = 16,
    experts: bool = True,
    router: bool = True,
    attention: bool | Sequence[str] = True,
    shared: bool = False,
    rank_per: str = "expert",
    lora_alpha: float | None = None,
    lora_dropout: float = 0.0,
    use_rslora: bool = False,
) -> MoELoraConfig:
    """The configuration for [`~peft.get_peft_model`]; prints how many parameters it trains.

    Args:
        model: any causal LM; what it has of the following is found by transformers' names.
        r: rank of each update.
        experts: update the routed experts' matrices, with one update for each expert.
        router: train the routers, in full: they are small.
        attention: update the attention's linear layers; or the names of linear layers, wherever they are.
        shared: update the shared experts' linear layers.
        rank_per: `"expert"`: each expert's update has rank `r`. `"token"`: those of a token's experts have it together,
            `r // num_experts_per_tok` each, with the same scaling.
        lora_alpha: updates are scaled by `lora_alpha / r`; twice `r` if not given.
        lora_dropout: on the input of each update, the experts' included where this package serves them.
        use_rslora: scale by `lora_alpha / sqrt(r)` instead (arXiv:2312.03732).

    Raises:
        UserError: if that is nothing to train, or cannot be had.

    Example:
        >>> from peft import get_peft_model
        >>> from modeling_moe import MoEConfig, MoEForCausalLM
        >>> from modeling_moe.lora import moe_lora_config
        >>> config = MoEConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=32)
        >>> model = MoEForCausalLM(config)
        >>> model = get_peft_model(model, moe_lora_config(model, r=8, rank_per="token"))
    """
    if r < 1:
        raise UserError(f"r is {r}: it must be at least 1")
    alpha = 2 * r if lora_alpha is None else lora_alpha
    parameters = _expert_parameters(model) if experts else []
    modules = [] if attention is True or not attention else _named(model, attention)
    if attention is True:
        modules = sorted({name.rsplit(".", 1)[1] for name in _linear_layers(model, ("self_attn",))})
    modules = modules + (_shared_layers(model) if shared else [])
    _check_split(model, modules)
    rank = _expert_rank(model, r, rank_per) if parameters else r
    others = modules if rank != r else []
    config = MoELoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=alpha * (rank / r) ** (0.5 if use_rslora else 1),
        # PEFT warns of a pattern for parameters: the linear layers are the exception
        rank_pattern=dict.fromkeys(others, r),
        alpha_pattern=dict.fromkeys(others, alpha),
        lora_dropout=lora_dropout,
        use_rslora=use_rslora,
        target_modules=modules,
        target_parameters=parameters or None,
        modules_to_save=(_routers(model) if router else []) or None,
    )
    _print_trained(model, config)
    return config


def trainable_parameters(model: nn.Module, config: LoraConfig) -> dict[str, int]:
    """How many parameters `config` trains in `model`, which is not changed: in experts, linear layers and routers."""
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


def _print_trained(model: nn.Module, config: LoraConfig) -> None:
    trained = trainable_parameters(model, config)
    if not trained:
        raise UserError("nothing to train: the model has none of the experts, router, attention and shared asked for")
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


def _experts_of(model: nn.Module) -> list[tuple[str, str, nn.Module]]:
    """The name of the block around them, and their own, with the experts."""
    named = [(name, module) for name, module in model.named_modules() if is_experts(module)]
    return [(*name.rsplit(".", 2)[1:], module) for name, module in named]


def _expert_parameters(model: nn.Module) -> list[str]:
    if any(is_parametrized(module) for *_, module in _experts_of(model)):
        raise UserError(
            "experts are in 4 bits already: call quantize_experts after get_peft_model, or set experts=False"
        )
    return sorted(
        {
            f"{block}.{name}.{matrix}"
            for block, name, module in _experts_of(model)
            for matrix in MATRICES
            if isinstance(getattr(module, matrix, None), nn.Parameter)
        }
    )


def _routers(model: nn.Module) -> list[str]:
    blocks = {block for block, *_ in _experts_of(model)}
    names = [name for name, _ in model.named_modules()]
    targets = (f"{block}.{router}" for block in sorted(blocks) for router in ROUTERS)
    return [target for target in targets if any(name.endswith(f".{target}") for name in names)]


def _linear_layers(model: nn.Module, parents: Sequence[str]) -> list[str]:
    """Names of the linear layers inside modules of the names `parents`."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not set(parents).isdisjoint(name.split("."))
    ]


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


def _check_split(model: Any, modules: list[str]) -> None:
    distributed = getattr(model.config, "distributed_config", None)
    if not modules or distributed is None:
        return
    sizes = {name: getattr(distributed, name, 1) for name in ("fsdp_size", "tp_size", "dp_replicate_size")}
    if sum(size > 1 for size in sizes.values()) > 1:
        # PEFT (0.21) gives them the widths of a process's part, or trains them without averaging over batches
        raise UserError(
            f"attention, shared: PEFT cannot adapt linear layers split in two ways, leave one of {', '.join(sizes)} above "
            "1, or leave these layers out"
        )


def _expert_rank(model: Any, r: int, rank_per: str) -> int:
    if rank_per not in RANKS:
        raise UserError(f"rank_per is {rank_per!r}: choose {' or '.join(RANKS)}")
    if rank_per == "expert":
        return r
    top_k = model.config.num_experts_per_tok
    if r < top_k:
        raise UserError(f"r is {r}, less than the {top_k} experts of a token: raise it, or choose rank_per='expert'")
    return r // top_k
