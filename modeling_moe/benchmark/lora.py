# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""LoRA on experts here against PEFT's own, full fine-tuning and attention-only LoRA, on one model in one run."""

import copy
import statistics
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

from ..lora.layers import peft_alone
from .check import Disagreement
from .measure import Clock, Contestant, interleave, median_ratio, saved_bytes
from .presets import Preset


RANK, VOCABULARY, SEQUENCE = 8, 512, 64
ATTENTION, EXPERTS = ["q_proj", "v_proj"], ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
PRESET = Preset(256, 256, 64, 8)
TOKENS = (1, 64, 512)
OURS, STOCK = "ours", "PEFT"
TOLERANCE = 1e-4
# of the largest gradient; with one token, those of the attention's queries are nothing but rounding errors
ROUNDING = 1e-3
LORA_ROUNDS = 15
# contestant -> targets in the attention, in the experts (None: all weights are trained), experts' implementation
CONTESTANTS = {
    OURS: (ATTENTION, EXPERTS, "moe"),
    STOCK: (ATTENTION, EXPERTS, "grouped_mm"),
    "full": (None, None, "moe"),
    "full, grouped_mm": (None, None, "grouped_mm"),
    "attention": (ATTENTION, None, "moe"),
    "attention, grouped_mm": (ATTENTION, None, "grouped_mm"),
}


def _models(device: torch.device, preset: Preset) -> dict[str, nn.Module]:
    """The same weights for each contestant, in two layers."""
    config = MixtralConfig(
        vocab_size=VOCABULARY, hidden_size=preset.hidden, intermediate_size=preset.intermediate, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, num_local_experts=preset.experts,
        num_experts_per_tok=preset.per_token,
    )  # fmt: skip
    torch.manual_seed(0)
    base = MixtralForCausalLM(config)
    models = {}
    for name, (attention, experts, implementation) in CONTESTANTS.items():
        model = copy.deepcopy(base)
        model.set_experts_implementation(implementation)
        if attention is not None:
            lora = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=attention, target_parameters=experts)
            torch.manual_seed(1)
            model = get_peft_model(model, lora)
            for key, parameter in model.named_parameters():
                if "lora_B" in key:
                    nn.init.normal_(parameter, std=0.02)
        models[name] = model.to(device)
    return models


class _Pass:
    """One contestant on some tokens."""

    def __init__(self, name: str, model: nn.Module, ids: torch.Tensor):
        self.name, self.model, self.ids = name, model, ids
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def _path(self):
        return peft_alone() if self.name == STOCK else nullcontext()

    def loss(self) -> torch.Tensor:
        with self._path():
            return self.model(self.ids).logits.float().logsumexp(-1).mean()

    def forward(self) -> torch.Tensor:
        with torch.no_grad(), self._path():
            return self.model(self.ids).logits

    def forward_backward(self) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(self.loss(), self.parameters)

    def saved(self) -> int:
        """Bytes kept for backward beside the parameters."""
        return saved_bytes(self.loss, self.model.parameters())


def _check(passes: dict[str, _Pass]) -> None:
    ours, stock = passes[OURS], passes[STOCK]
    gradients = list(zip(ours.forward_backward(), stock.forward_backward(), strict=True))
    rounding = ROUNDING * max(theirs.abs().max() for _, theirs in gradients)
    for mine, theirs in [(ours.forward(), stock.forward()), *gradients]:
        error = (mine - theirs).abs().max() / theirs.abs().max().clamp(min=rounding)
        if not error < TOLERANCE:
            raise Disagreement(f"LoRA here and PEFT's differ by {error:.1e} of the largest element")


def compare_lora(
    device: str = "cpu", rounds: int = LORA_ROUNDS, preset: Preset = PRESET, tokens: Sequence[int] = TOKENS
) -> list[dict[str, float | str]]:
    """Measures, all contestants in turn.

    Args:
        device: cpu or cuda.
        rounds: turns of each contestant.
        preset: shape of the experts, which are Mixtral's whatever its family.
        tokens: numbers of tokens, below 64 or multiples of it.

    Returns:
        A row for each number of tokens and pass: contestants' milliseconds and saved bytes, and ours over theirs, the
        median of the rounds' ratios.

    Raises:
        Disagreement: if outputs or gradients here are not PEFT's.
    """
    place, rows = torch.device(device), []
    models, clock = _models(place, preset), Clock(place)
    for count in tokens:
        shape = (max(1, count // SEQUENCE), min(count, SEQUENCE))
        ids = torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(count)).to(place)
        passes = {name: _Pass(name, model, ids) for name, model in models.items()}
        _check(passes)
        for mode in ("forward", "forward_backward"):
            contestants = [Contestant(name, getattr(each, mode)) for name, each in passes.items()]
            times, _ = interleave(contestants, clock, rounds, 0, cold=False)
            row: dict[str, float | str] = {"tokens": count, "pass": mode}
            row |= {f"{name} ms": statistics.median(measured) for name, measured in times.items()}
            row |= {f"ours/{name}": median_ratio(times[OURS], times[name]) for name in times if name != OURS}
            if mode == "forward_backward":
                row |= {f"{name} saved": passes[name].saved() for name in (OURS, STOCK)}
            rows.append(row)
    return rows


def print_lora(rows: list[dict[str, float | str]], preset: Preset = PRESET) -> None:
    """A table of [`compare_lora`]'s ratios, of the same preset."""
    others = [name for name in CONTESTANTS if name != OURS]
    sizes = f"E={preset.experts} K={preset.per_token} H={preset.hidden} I={preset.intermediate}"
    title = f"LoRA on experts, {sizes} r={RANK} float32: ours over"
    table = Table("T", "pass", "ours ms", *others, "saved MiB, ours / PEFT", title=title)
    for row in rows:
        saved = "-"
        if f"{OURS} saved" in row:
            ours, stock = row[f"{OURS} saved"], row[f"{STOCK} saved"]
            saved = f"{ours / 2**20:.2f} / {stock / 2**20:.1f} = {ours / stock:.3f}"
        ratios = [f"{row[f'ours/{name}']:.3f}" for name in others]
        table.add_row(str(row["tokens"]), str(row["pass"]), f"{row['ours ms']:.2f}", *ratios, saved)
    Console(width=160).print(table)
