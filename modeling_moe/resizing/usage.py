# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module measures how much a text uses each expert of any Mixture of Experts, by running the model on the text.

# T tokens, H hidden, E experts, K choices per token
"""

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from ..modeling_moe import MoEBlock
from ..monitoring import LayerPass, SparseLayer, observe
from ..router import Router
from ..utils.errors import UserError
from ..utils.json_files import read_json, write_json
from .skeleton import indexed_layers


@dataclass(frozen=True)
class LayerUsage:
    """Holds how much a text uses each expert of a sparse layer; all tensors are float64 on the CPU.

    Attributes:
        load: (E,), share of the tokens that are sent to the expert.
        mass: (E,), routing weight of the expert, averaged over all tokens; 0 for tokens that are not sent to it.
        reap: (E,), routing weight times norm of the expert's output, averaged over the tokens sent to the expert: the
            saliency of REAP (arXiv:2510.13999, equation 9); 0 for an expert without tokens. A negative weight, which a
            learnt scale can give, counts by its absolute value.
    """

    load: torch.Tensor
    mass: torch.Tensor
    reap: torch.Tensor


@dataclass(frozen=True)
class Usage:
    """Holds how much a text uses the experts of a model.

    Attributes:
        layers: the usage of each sparse layer, by the index of the decoder layer.
        tokens: number of tokens measured.
        experts_per_token: largest number K of choices per token in any layer; 0 if unknown.
    """

    layers: dict[int, LayerUsage]
    tokens: int
    experts_per_token: int = 0

    def of(self, layer: int) -> LayerUsage:
        """Returns the usage of a sparse layer.

        Raises:
            UserError: if the layer was not measured.
        """
        if layer not in self.layers:
            raise UserError(f"the usage lacks layer {layer}: measure it with the same model")
        return self.layers[layer]

    def save(self, file: str | Path) -> None:
        """Writes the usage as JSON; the file appears whole or not at all, and replaces an existing one."""
        layers = {
            str(layer): {name: getattr(usage, name).tolist() for name in SCORES}
            for layer, usage in self.layers.items()
        }
        values = {"tokens": self.tokens, "experts_per_token": self.experts_per_token, "layers": layers}
        write_json(Path(file), values)

    @classmethod
    def read(cls, file: str | Path) -> "Usage":
        """Reads the usage that [`Usage.save`] wrote.

        Raises:
            UserError: if the file is missing, damaged, or holds something else.
        """
        if not Path(file).is_file():
            raise UserError(
                f"usage_json {file} does not exist: measure the usage on a text first, with data and save_usage"
            )
        values = read_json(Path(file))
        try:
            layers = {
                int(layer): LayerUsage(**{name: _finite(usage[name]) for name in SCORES})
                for layer, usage in values["layers"].items()
            }
            return cls(layers, int(values["tokens"]), int(values["experts_per_token"]))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"usage_json {file} holds no usage of experts: measure it again with save_usage"
            ) from error


def _finite(values: list[float]) -> torch.Tensor:
    """Returns numbers as a float64 tensor (E,).

    Raises:
        ValueError: if the values are no list of finite numbers.
    """
    tensor = torch.tensor(values, dtype=torch.float64)
    if tensor.dim() != 1 or not tensor.isfinite().all():
        raise ValueError("the values are no list of finite numbers")
    return tensor


class _Sums:
    """Sums three values of each expert over the unmasked tokens of a layer.

    Attributes:
        total: (3, E + 1) float64: number of tokens, routing weight, and routing weight times norm of the output. The
            last column collects empty and masked assignments.
        choices: largest number K of choices per token.
    """

    def __init__(self, layer: SparseLayer):
        self.total = torch.zeros(3, layer.num_experts + 1, dtype=torch.float64)
        self.choices = 0

    def add(self, seen: LayerPass) -> None:
        """Adds one pass.

        The experts run once more on each assignment alone, with the weight 1, to obtain the norm of each output. That holds
        for any experts: with biases, transposed weights, or a norm on the output.
        """
        self.total = self.total.to(seen.hidden_states.device)
        self.choices = max(self.choices, seen.index.shape[-1])
        empty = seen.layer.num_experts
        for choice, factor in zip(seen.arrived.split(1, dim=-1), seen.weight.double().unbind(-1), strict=True):
            ones = torch.ones_like(choice, dtype=seen.weight.dtype)
            out = seen.layer.experts.forward(seen.hidden_states, choice, ones)  # (T, H)
            norm = torch.linalg.vector_norm(out, dim=-1, dtype=torch.float64)
            chosen = choice[:, 0]
            if seen.token_mask is not None:
                chosen = chosen.where(seen.token_mask, empty)
            values = torch.stack([torch.ones_like(factor), factor, factor.abs() * norm])
            self.total.index_add_(1, chosen.clamp(max=empty), values)


def measured_layers(model: PreTrainedModel) -> list[SparseLayer]:
    """Returns the sparse layers of a model, of which the usage can be measured.

    Raises:
        UserError: if the model is dense, its experts cannot be reached or are split over processes, its router mixes tokens
            or experts (`soft_moe`, `lory`), or two of its layers have the same index.
    """
    layers = indexed_layers(model)
    if any(isinstance(module, MoEBlock) and module.mix is not Router.mix for module in model.modules()):
        raise UserError(
            f"router_type={model.config.router_type!r} does not send tokens to experts: measure a model whose router does"
        )
    if any(layer.num_experts != layer.experts.num_experts for layer in layers):
        raise UserError("the experts are split over processes: measure the usage in one process")
    return layers


@torch.no_grad()
def measure_usage(model: PreTrainedModel, batches: Iterable[dict[str, torch.Tensor]]) -> Usage:
    """Runs a model on a text and measures how much it uses each expert; the experts run twice.

    Args:
        model: any causal LM of transformers whose experts follow its experts interface, on the device to run on. The
            experts must not be split over processes. Its training mode is restored.
        batches: keyword arguments of `model`: `input_ids` (B, S), `attention_mask` (B, S), 0 at tokens to leave out,
            and the tensors that the router needs.

    Returns:
        The usage of every sparse layer, with the routing of evaluation, after capacity.

    Raises:
        UserError: if the usage of this model cannot be measured, see [`measured_layers`], or there is no token.
    """
    measured = measured_layers(model)
    sums = {layer.name: _Sums(layer) for layer in measured}
    accepted = inspect.signature(model.forward).parameters
    options = {name: value for name, value in {"use_cache": False, "logits_to_keep": 1}.items() if name in accepted}
    was_training, tokens = model.training, 0
    model.eval()
    try:
        with observe(model, lambda seen: sums[seen.layer.name].add(seen) if seen.layer.name in sums else None):
            for batch in batches:
                mask = batch.get("attention_mask")
                tokens += batch["input_ids"].numel() if mask is None else int((mask > 0).sum())
                model(**{name: tensor.to(model.device) for name, tensor in batch.items()}, **options)
    finally:
        model.train(was_training)
    if tokens == 0:
        raise UserError("there is no token to measure the usage with: give batches with some text")
    layers = {layer.layer: _layer_usage(sums[layer.name].total[:, :-1].cpu(), tokens) for layer in measured}
    return Usage(layers, tokens, max(total.choices for total in sums.values()))


def _layer_usage(sums: torch.Tensor, tokens: int) -> LayerUsage:
    count, weight, saliency = sums
    return LayerUsage(load=count / tokens, mass=weight / tokens, reap=saliency / count.clamp(min=1))


# score -> function that returns the values (E,) by which experts are ranked
SCORES: dict[str, Callable[[LayerUsage], torch.Tensor]] = {
    "reap": lambda usage: usage.reap,
    "load": lambda usage: usage.load,
    "mass": lambda usage: usage.mass,
}
