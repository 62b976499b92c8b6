# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module checks by logits that an exported adapter changes the served model as it changed the model it was trained on.

The check reads the exported files alone, adds `scaling * B @ A` to the served model's tensors on disk expert by expert,
and knows nothing of how the files were made.
"""

import gc
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from ..checkpoints import State, open_source
from ..checkpoints.safetensors_format import read_tensors
from ..utils.errors import UserError
from ..utils.json_files import read_json
from ..utils.loading import embedding_rows, load_config, load_model
from .factors import PREFIX, meta_model
from .merging import apply_adapter


LENGTH = 64
# largest error as a share of the change
TOLERANCE = 0.02
# largest part of the change that rounding a merged model's weights to 16 bits may take away
ROUNDING_TOLERANCE = 0.5
# largest difference of two models that should be one, as a share of the largest logit
MODEL_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Comparison:
    """The logits of one sequence of random tokens, in fp32, in absolute differences.

    Attributes:
        change: largest difference that the adapter makes to the model it was trained on.
        served_change: largest difference that the exported adapter makes to the served model.
        error: largest difference between the two adapted models, before the weights of a merged model are rounded.
        base_difference: largest difference between the two models without adapter.
        rounding: largest difference that rounding a merged model's weights to the served model's dtype makes.
    """

    change: float
    served_change: float
    error: float
    base_difference: float
    rounding: float = 0.0

    def figures(self) -> dict[str, float]:
        """Returns the figures for a record in JSON."""
        return asdict(self)


@torch.no_grad()
def _logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model.eval()(ids).logits.float()


def _ids(model: PreTrainedModel) -> torch.Tensor:
    """Returns random token ids (1, S)."""
    length = min(LENGTH, getattr(model.config, "max_position_embeddings", LENGTH) or LENGTH)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(embedding_rows(model), (1, length), generator=generator)


def _add(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
    """Returns a weight of one matrix plus `scaling * b @ a`."""
    return weight + scaling * (b.float() @ a.float())


def _add_stacked(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
    """Returns a weight of all experts, (E, N, M) or (E, M, N), plus each expert's `scaling * b @ a`.

    vLLM reads `a` (E * R, M) expert after expert and `b` (N, R * E) rank after rank.
    """
    experts = len(weight)
    a = a.float().view(experts, -1, a.shape[1])
    b = b.float().view(len(b), -1, experts)
    update = torch.stack([b[:, :, expert] @ a[expert] for expert in range(experts)])
    # gpt-oss is the only family of this layout, and stores its square matrices transposed too
    return weight + scaling * update.transpose(1, 2)


def _read(state: State) -> dict[str, torch.Tensor]:
    """Reads all tensors, floating ones in fp32."""
    gc.collect()  # a model refers to itself, so the one before may still lie in memory
    weights = {name: tensor.read() for name, tensor in state.items()}
    return {name: weight.float() if weight.is_floating_point() else weight for name, weight in weights.items()}


def adapted_state(state: State, folder: Path) -> dict[str, torch.Tensor]:
    """Returns a model's tensors on disk, in fp32, with the adapter of a folder added.

    Args:
        state: tensors of the model on disk.
        folder: folder of an exported adapter.

    Raises:
        UserError: if the adapter has factors for which the model has no tensor.
    """
    config, factors = read_json(folder / "adapter_config.json"), read_tensors(folder / "adapter_model.safetensors")
    scaling = config["lora_alpha"] / config["r"]
    weights = _read(state)
    for key in (name.removesuffix(".lora_A.weight") for name in factors if name.endswith(".lora_A.weight")):
        a, b = (factors[f"{key}.lora_{part}.weight"].read() for part in "AB")
        name, add = f"{key.removeprefix(PREFIX)}.weight", _add
        if name.endswith((".experts.weight", ".experts.base_layer.weight")):
            part = "gate_up_proj" if ".base_layer." in name else "down_proj"
            name, add = f"{name.split('.experts.')[0]}.experts.{part}", _add_stacked
        if name not in weights:
            raise UserError(
                f"the exported adapter has {key}, and the served model no {name}: give another --served_model"
            )
        weights[name] = add(weights[name], a, b, scaling)
    return weights


def _logits_of(name: str, ids: torch.Tensor, trust_remote_code: bool) -> torch.Tensor:
    """Returns the logits of a saved model in fp32."""
    gc.collect()
    return _logits(load_model(name, dtype="float32", trust_remote_code=trust_remote_code), ids)


def _logits_with(
    weights: dict[str, torch.Tensor], served: str, ids: torch.Tensor, trust_remote_code: bool
) -> torch.Tensor:
    """Returns the logits of the served model with other weights, under their names on disk."""
    config = load_config(served, trust_remote_code=trust_remote_code)
    config.dtype = torch.float32
    kind = type(meta_model(config, trust_remote_code))
    return _logits(kind.from_pretrained(None, config=config, state_dict=weights, dtype=torch.float32), ids)


def _refuse_other_weights(merged: Path, exact: State) -> None:
    """Refuses a merged model whose weights are not the exact ones, each rounded once to the dtype on disk."""
    written = open_source(merged).state
    for name, tensor in exact.items():
        if not torch.equal(written[name].read(), tensor.read().to(written[name].dtype)):
            raise UserError(
                f"{name} of the merged model is not the served model's tensor plus the adapter's update: the disk damaged it, "
                "or a source changed meanwhile; run the same command again"
            )


def compare(
    adapter: Path, base: str, served: str, result: Path, trust_remote_code: bool = False, exact: State | None = None
) -> Comparison:
    """Compares the logits of the trained model with those of the served model, both with and without adapter.

    Rounding the weights of a merged model to 16 bits takes away a part of the change, the larger the smaller the change is. So
    the weights before rounding are compared by logits, and the written weights with them one by one.

    Args:
        adapter: folder of the trained adapter.
        base: folder or Hub name of the model that the adapter was trained on.
        served: folder or Hub name of the model that a server loads.
        result: folder of the exported adapter, or of the served model with the adapter merged.
        trust_remote_code: whether the models' own code may run.
        exact: tensors of the merged model, before they are rounded to the dtype on disk; None for an exported adapter.

    Raises:
        UserError: if the adapter changes nothing, the exported one makes another change, or rounding hides the change.
    """
    model = load_model(base, dtype="float32", trust_remote_code=trust_remote_code)
    ids = _ids(model)
    plain = _logits(model, ids)
    trained = _logits(apply_adapter(model, adapter), ids)
    del model
    served_plain = _logits_of(served, ids, trust_remote_code)
    if exact is None:
        weights = adapted_state(open_source(served).state, result)
        got = before = _logits_with(weights, served, ids, trust_remote_code)
    else:
        _refuse_other_weights(result, exact)
        before = _logits_with(_read(exact), served, ids, trust_remote_code)
        got = _logits_of(str(result), ids, trust_remote_code)
    comparison = Comparison(
        change=_distance(trained, plain),
        served_change=_distance(got, served_plain),
        error=_distance(before, trained),
        base_difference=_distance(served_plain, plain),
        rounding=_distance(got, before),
    )
    _refuse_other(comparison, trained.abs().max().item(), str(adapter))
    return comparison


def _distance(left: torch.Tensor, right: torch.Tensor) -> float:
    return (left - right).abs().max().item()


def _refuse_other(result: Comparison, largest: float, adapter: str) -> None:
    """Refuses an adapter that changes nothing, and an export that changes the logits by another amount.

    Raises:
        UserError: names the figures.
    """
    if not math.isfinite(sum(asdict(result).values())):
        raise UserError(
            f"the logits with the adapter in {adapter} are not finite: train it again, or on another model"
        )
    if result.change == 0 or result.served_change == 0:
        where = "the model that it was trained on" if result.change == 0 else "the served model"
        raise UserError(
            f"the adapter in {adapter} changes no logit of {where}: train it longer, or export another one"
        )
    if result.base_difference > MODEL_TOLERANCE * largest:
        raise UserError(
            f"the served model and the model that the adapter was trained on differ by {result.base_difference:.1e} in logits of "
            f"up to {largest:.1e} without any adapter: give an export of that model, in its own dtype, as --served_model"
        )
    if result.error > max(TOLERANCE * result.change, 1e-6 * largest) + result.base_difference:
        raise UserError(
            f"the adapter in {adapter} changes logits by up to {result.change:.1e}, and the result differs by {result.error:.1e} "
            "from that: merge it with moe merge_adapter, and report the family"
        )
    if result.rounding > ROUNDING_TOLERANCE * result.change:
        raise UserError(
            f"the adapter in {adapter} changes logits by up to {result.change:.1e}, and rounding the merged weights to the served "
            f"model's dtype by up to {result.rounding:.1e}: serve the adapter without merging it, or merge it into a copy of "
            "the model in float32"
        )
