# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""How a checkpoint lies on disk: one tensor for each expert, fused in memory; and refusing one that is damaged."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter, revert_weight_conversion


class CheckpointError(ValueError, RuntimeError):
    """A checkpoint that does not fit its configuration; also the RuntimeError that transformers raises for it."""


def register_expert_layout(model_type: str) -> None:
    """Tells transformers to write `experts.E.gate_proj.weight` and the like, and to fuse them when it loads.

    Servers and older tools know only these names. What they cannot run anyway, biases and the first layer of experts
    that are not gated, stays fused on disk.
    """
    # the lookahead: before 5.23 transformers takes the biases, whose names go on, for the matrices when it saves
    gate, up, down = (f"mlp.experts.*.{name}_proj.weight" for name in ("gate", "up", "down"))
    # every copy of this file registers: the installed one and those that checkpoints bring
    register_checkpoint_conversion_mapping(
        model_type,
        [
            WeightConverter(
                [gate, up], "mlp.experts.gate_up_proj(?!_bias)", [MergeModulelist(dim=0), Concatenate(dim=1)]
            ),
            WeightConverter(down, "mlp.experts.down_proj(?!_bias)", [MergeModulelist(dim=0)]),
        ],
        overwrite=True,
    )


def fuse_experts(state_dict: dict[str, torch.Tensor], prefix: str, num_experts: int) -> None:
    """Replaces one tensor for each expert by the fused ones, in place; a fused state dict stays as it is."""
    stacks = {}
    for name in ("gate_proj", "up_proj", "down_proj"):
        keys = [f"{prefix}{expert}.{name}.weight" for expert in range(num_experts)]
        if all(key in state_dict for key in keys):
            stacks[name] = torch.stack([state_dict.pop(key) for key in keys])
    if "gate_proj" in stacks and "up_proj" in stacks:
        stacks["gate_up_proj"] = torch.cat([stacks.pop("gate_proj"), stacks.pop("up_proj")], dim=1)
    state_dict |= {f"{prefix}{name}": stack for name, stack in stacks.items()}


def _shapes_on_disk(folder: Path) -> dict[str, tuple[int, ...]]:
    shapes = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                # the headless model's names, whichever model was saved
                shapes[name.removeprefix("model.")] = tuple(tensors.get_slice(name).get_shape())
    return shapes


def _first_misfit(model_class: type, config, folder: Path) -> str:
    """What the first tensor is that the checkpoint lacks or has in another shape; empty if there is none."""
    with torch.device("meta"):
        model = model_class(config)
    found = _shapes_on_disk(folder)
    for name, tensor in revert_weight_conversion(model, model.state_dict()).items():
        shape = found.get(name.removeprefix("model."))
        if shape is None and not (name == "lm_head.weight" and config.tie_word_embeddings):
            return f"it has no {name}"
        if shape is not None and shape != tuple(tensor.shape):
            return f"{name} has shape {shape} where config.json asks for {tuple(tensor.shape)}"
    return ""


@contextmanager
def refuse_incomplete(model_class: type, name_or_path, config=None) -> Iterator[Callable]:
    """Around transformers' loading: names what a damaged checkpoint lacks.

    transformers reports a missing expert as a failed conversion, and fills in new weights for a layer whose experts
    are all missing. Yields `check(model, loading_info)`, to be called with what was loaded.

    Raises:
        CheckpointError: if a tensor is misshapen, or some experts are missing while others are there.
    """

    def refuse(cause=None):
        folder, problem = Path(str(name_or_path)), ""
        if folder.is_dir():
            problem = _first_misfit(model_class, config or model_class.config_class.from_pretrained(folder), folder)
        raise CheckpointError(
            f"the checkpoint {name_or_path} does not fit its config.json: {problem or cause}. Restore the file or "
            "correct the field."
        ) from cause

    def check(model, info):
        experts = {name for name, _ in model.named_parameters() if ".mlp.experts." in name}
        if experts.intersection(info["missing_keys"]) not in (set(), experts):
            refuse()

    try:
        yield check
    except RuntimeError as error:
        if isinstance(error, CheckpointError) or "report" not in str(error):
            raise
        refuse(error)
