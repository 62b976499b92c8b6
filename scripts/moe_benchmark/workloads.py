# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module makes the measured modules with their inputs: experts alone, a sparse block, a small model.

# T tokens, H hidden, I expert width, E experts, K experts per token
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache, GptOssConfig, MixtralConfig, Qwen3MoeConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from modeling_moe.compatibility import cache_keyword
from modeling_moe.configuration_moe import MoEConfig
from modeling_moe.modeling_moe import MoEBlock

from .cases import Case
from .presets import PRESETS, Preset
from .routing import route


MODEL_LAYERS = 2
VOCABULARY = 1024
SEQUENCE = 256
PROMPT = 32
SEED = 0


def experts_in(module: nn.Module) -> list[nn.Module]:
    """Returns the modules that transformers' experts interface serves."""
    return [child for child in module.modules() if hasattr(child, "is_transposed") and hasattr(child, "down_proj")]


@torch.no_grad()
def _materialize(module: nn.Module, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """Gives a module on the meta device random weights of a size that keeps activations near 1."""
    module.to(dtype).to_empty(device=device)
    for parameter in module.parameters():
        parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return module


# family of a preset -> function from the sizes to transformers' experts
EXPERTS: dict[str, Callable[[dict[str, Any]], nn.Module]] = {
    "gated": lambda sizes: MixtralExperts(MixtralConfig(**sizes)),
    "gpt_oss": lambda sizes: GptOssExperts(GptOssConfig(**sizes)),
}


class ExpertsWorkload:
    """transformers' own experts module, which all implementations share; routing weights have the dtype of the
    tokens.
    """

    ours: nn.Module
    theirs: nn.Module

    def __init__(self, preset: Preset, dtype: torch.dtype, device: torch.device):
        self.preset, self.dtype, self.device = preset, dtype, device
        sizes: dict[str, Any] = {
            "hidden_size": preset.hidden,
            "intermediate_size": preset.intermediate,
            "num_local_experts": preset.experts,
            "num_experts_per_tok": preset.per_token,
        }
        with torch.device("meta"):
            experts = EXPERTS[preset.family](sizes)
        self.ours = self.theirs = _materialize(experts, dtype, device)

    def prepare(self, case: Case) -> None:
        """Makes the inputs of `case`."""
        index, weight = route(case.routing, case.tokens, self.preset, SEED)
        self.index = index.to(self.device)
        self.weight = weight.to(self.device, self.dtype).requires_grad_()
        generator = torch.Generator(self.device).manual_seed(SEED)
        shape = {"size": (case.tokens, self.preset.hidden), "dtype": self.dtype, "device": self.device}
        self.x = torch.randn(**shape, generator=generator).requires_grad_()
        self.grad = torch.randn(**shape, generator=generator)

    def inputs(self) -> list[torch.Tensor]:
        """Returns the differentiated tensors that are not parameters."""
        return [self.x, self.weight]

    def reset(self, module: nn.Module) -> None:
        """Restores the state before a forward pass."""

    def forward(self, module: nn.Module) -> torch.Tensor:
        """Returns the output (T, H)."""
        return module(self.x, self.index, self.weight)


class BlockWorkload(ExpertsWorkload):
    """This package's [`~modeling_moe.MoEBlock`] and transformers' Qwen3MoeSparseMoeBlock with shared weights."""

    def __init__(self, preset: Preset, dtype: torch.dtype, device: torch.device):
        self.preset, self.dtype, self.device = preset, dtype, device
        ours, theirs = _configs(preset)
        with torch.device("meta"):
            self.ours, self.theirs = MoEBlock(ours), Qwen3MoeSparseMoeBlock(theirs)
        _materialize(self.ours, dtype, device)
        self.theirs.load_state_dict(self.ours.state_dict(), assign=True)

    def prepare(self, case: Case) -> None:
        """Makes the inputs of `case`."""
        generator = torch.Generator(self.device).manual_seed(SEED)
        shape = {"size": (1, case.tokens, self.preset.hidden), "dtype": self.dtype, "device": self.device}
        self.x = torch.randn(**shape, generator=generator).requires_grad_()
        self.grad = torch.randn(**shape, generator=generator)

    def inputs(self) -> list[torch.Tensor]:
        """Returns the differentiated tensors that are not parameters."""
        return [self.x]

    def forward(self, module: nn.Module) -> torch.Tensor:
        """Returns the output (1, T, H)."""
        output = module(self.x)
        # this package's block also returns the statistics of its router
        return output[0] if isinstance(output, tuple) else output


class ModelWorkload:
    """This package's model and Qwen3MoeForCausalLM: two layers, equal weights, no router losses."""

    grad = None

    def __init__(self, preset: Preset, dtype: torch.dtype, device: torch.device):
        self.device = device
        ours, theirs = _configs(preset)
        with torch.device(device):
            self.ours, self.theirs = (
                AutoModelForCausalLM.from_config(config, dtype=dtype) for config in (ours, theirs)
            )
        self.theirs.load_state_dict(self.ours.state_dict(), assign=True)

    def prepare(self, case: Case) -> None:
        """Makes the token ids of `case`, and for decoding each model's cache of a prompt."""
        self.mode = case.mode
        length = SEQUENCE if case.tokens % SEQUENCE == 0 else case.tokens
        shape = (case.tokens, 1) if case.mode == "decode" else (case.tokens // length, length)
        generator = torch.Generator(self.device).manual_seed(SEED)
        self.ids = torch.randint(VOCABULARY, shape, generator=generator, device=self.device)
        self.caches: dict[nn.Module, DynamicCache] = {}
        if case.mode == "decode":
            prompt = torch.randint(VOCABULARY, (case.tokens, PROMPT), generator=generator, device=self.device)
            for model in (self.ours, self.theirs):
                self.caches[model] = DynamicCache(config=model.config)
                with torch.no_grad():
                    model(prompt, use_cache=True, **cache_keyword(self.caches[model]))

    def inputs(self) -> list[torch.Tensor]:
        """Returns an empty list: only parameters are differentiated."""
        return []

    def reset(self, module: nn.Module) -> None:
        """Restores the state before a forward pass."""
        module.train(self.mode == "forward_backward")
        surplus = self.caches[module].get_seq_length() - PROMPT if self.mode == "decode" else 0
        if surplus > 0:
            self.caches[module].crop(-surplus)

    def forward(self, module: nn.Module) -> torch.Tensor:
        """Returns the loss in training, else the logits (B, S, V)."""
        if self.mode == "forward_backward":
            return module(self.ids, labels=self.ids).loss
        cache = cache_keyword(self.caches.get(module))
        return module(self.ids, use_cache=self.mode == "decode", **cache).logits


def _configs(preset: Preset) -> tuple[MoEConfig, Qwen3MoeConfig]:
    """Returns equivalent configurations of this package's model and of Qwen3-MoE."""
    heads = max(1, preset.hidden // 64)
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": preset.hidden,
        "intermediate_size": preset.intermediate,
        "moe_intermediate_size": preset.intermediate,
        "num_hidden_layers": MODEL_LAYERS,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": preset.hidden // heads,
        "num_experts": preset.experts,
        "num_experts_per_tok": preset.per_token,
        "norm_topk_prob": True,
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-6,
    }
    ours = MoEConfig(**sizes, qk_norm="head", router_aux_loss_coef=0.0, router_z_loss_coef=0.0)
    return ours, Qwen3MoeConfig(**sizes)


WORKLOADS = {"experts": ExpertsWorkload, "block": BlockWorkload, "model": ModelWorkload}
Workload = ExpertsWorkload | BlockWorkload | ModelWorkload


def make_workload(case: Case, device: torch.device) -> Workload:
    """Makes the modules that `case` needs, without inputs."""
    return WORKLOADS[case.level](PRESETS[case.preset], case.torch_dtype, device)
