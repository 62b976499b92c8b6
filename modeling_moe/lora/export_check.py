# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module checks by logits that an exported adapter changes the served model as it changed the model it was trained on.

The check reads the exported files alone, adds `scaling * B @ A` to the served model's tensors on disk expert by expert,
and knows nothing of how the files were made.
"""

import gc
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
# largest error as a share of the change; weights that are rounded to 16 bits after merging lose more of a small update
FACTOR_TOLERANCE, MERGED_TOLERANCE = 0.02, 0.5
# largest difference of two models that should be one, as a share of the largest logit
MODEL_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Comparison:
    """The logits of one sequence of random tokens, in fp32, in absolute differences.

    Attributes:
        change: largest difference that the adapter makes to the model it was trained on.
        served_change: largest difference that the exported adapter makes to the served model.
        error: largest difference between the two adapted models.
        base_difference: largest difference between the two models without adapter.
    """

    change: float
    served_change: float
    error: float
    base_difference: float

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
    weights = {name: tensor.read() for name, tensor in state.items()}
    weights = {name: weight.float() if weight.is_floating_point() else weight for name, weight in weights.items()}
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


def _served_logits(served: str, adapter: Path | None, ids: torch.Tensor, trust_remote_code: bool) -> torch.Tensor:
    """Returns the logits of a model, or of the model with an exported adapter."""
    if adapter is None:
        return _logits(load_model(served, dtype="float32", trust_remote_code=trust_remote_code), ids)
    config = load_config(served, trust_remote_code=trust_remote_code)
    config.dtype = torch.float32
    weights = adapted_state(open_source(served).state, adapter)
    kind = type(meta_model(config, trust_remote_code))
    return _logits(kind.from_pretrained(None, config=config, state_dict=weights, dtype=torch.float32), ids)


def compare(
    adapter: Path, base: str, served: str, exported: Path | None, merged: Path | None, trust_remote_code: bool = False
) -> Comparison:
    """Compares the logits of the trained model with those of the served model, both with and without adapter.

    Args:
        adapter: folder of the trained adapter.
        base: folder or Hub name of the model that the adapter was trained on.
        served: folder or Hub name of the model that a server loads.
        exported: folder of the exported adapter, or None if `merged` is given.
        merged: folder of the served model with the adapter merged.
        trust_remote_code: whether the models' own code may run.

    Raises:
        UserError: if the adapter changes nothing, or the exported one makes another change.
    """
    model = load_model(base, dtype="float32", trust_remote_code=trust_remote_code)
    ids = _ids(model)
    plain = _logits(model, ids)
    trained = _logits(apply_adapter(model, adapter), ids)
    del model
    gc.collect()
    served_plain = _served_logits(served, None, ids, trust_remote_code)
    got = _served_logits(served if merged is None else str(merged), exported, ids, trust_remote_code)
    result = Comparison(
        change=_distance(trained, plain),
        served_change=_distance(got, served_plain),
        error=_distance(got, trained),
        base_difference=_distance(served_plain, plain),
    )
    tolerance = FACTOR_TOLERANCE if merged is None else MERGED_TOLERANCE
    _refuse_other(result, trained.abs().max().item(), tolerance, str(adapter))
    return result


def _distance(left: torch.Tensor, right: torch.Tensor) -> float:
    return (left - right).abs().max().item()


def _refuse_other(result: Comparison, largest: float, tolerance: float, adapter: str) -> None:
    """Refuses an adapter that changes nothing, and an export that changes the logits by another amount.

    Raises:
        UserError: names the figures.
    """
    if result.change == 0 or result.served_change == 0:
        where = "the model that it was trained on" if result.change == 0 else "the served model"
        raise UserError(
            f"the adapter in {adapter} changes no logit of {where}: train it longer, or export another one"
        )
    if result.base_difference > MODEL_TOLERANCE * largest:
        raise UserError(
            f"the served model and the model that the adapter was trained on differ by {result.base_difference:.1e} in logits of "
            f"up to {largest:.1e} without any adapter: give an export of that model as --served_model"
        )
    if result.error > max(tolerance * result.change, 1e-6 * largest) + result.base_difference:
        raise UserError(
            f"the adapter in {adapter} changes logits by up to {result.change:.1e}, and the result differs by {result.error:.1e} "
            "from that: merge it with moe merge_adapter, and report the family"
        )
