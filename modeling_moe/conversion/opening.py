# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module opens a checkpoint of any family as a MoE checkpoint, and reads only the headers of its files."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import PreTrainedConfig

from ..checkpoints import Source, State, fingerprint, open_source
from ..configuration_moe import MoEConfig
from ..modeling_moe import MoEForCausalLM
from ..utils.errors import UserError
from ..utils.json_files import read_json
from ..utils.limits import LAYERS
from ..utils.loading import parse_dtype
from .families.catalogue import fields_without_effect, moe_config, source_config
from .families.wrappers import left_out, text_values
from .importing import import_state
from .prediction_layers import PredictionLayers, kept_prediction_layers, prediction_layers


@dataclass(frozen=True)
class Checkpoint:
    """A source checkpoint under this package's names, with no tensor read.

    Attributes:
        config: configuration of the model; its dtype is the dtype of the tensors.
        state: tensors with names and layout of a MoE checkpoint on disk.
        source: the files that hold the tensors.
        source_config: configuration as the source's config.json gives it.
        prediction: layers that predict further tokens, which no model of this package computes; None if there are none.
        without_effect: fields of config.json that neither this package nor the source's own model reads.
    """

    config: MoEConfig
    state: State
    source: Source
    source_config: PreTrainedConfig
    prediction: PredictionLayers | None = None
    without_effect: Mapping[str, Any] = field(default_factory=dict)

    @property
    def left_out(self) -> dict[str, int]:
        """Parameters of the parts of a multimodal source that are not its text model, such as model.visual; else empty."""
        return left_out(self.source.state, self.source_config)

    def identity(self) -> dict[str, Any]:
        """Returns name, file hashes and configuration of the source, for a result's recipe; reads all weights.

        Raises:
            UserError: if a file differs from the hash beside it.
        """
        beside = self.prediction.files if self.prediction else ()
        files = fingerprint(self.source.folder, (*self.source.files, *beside))
        identity = {"name": self.source.folder.name, "files": files, "config": self.source_config.to_diff_dict()}
        return identity | ({"left_out": self.left_out} if self.left_out else {})

    def prediction_for(self, target: str) -> PredictionLayers | None:
        """Returns the layers that predict further tokens if a format can hold them: this package's, or their own family's."""
        held = self.prediction is not None and target in ("moe", self.prediction.model_type)
        return self.prediction if held else None

    def notes(self, target: str) -> list[str]:
        """Returns a sentence for each thing that a conversion to `target` leaves out or does not read."""
        notes = []
        if self.left_out:
            shown = ", ".join(f"{name} ({count:,} parameters)" for name, count in self.left_out.items())
            notes.append(f"Only the text model is converted; these parts of the source are left out: {shown}.")
        if self.without_effect:
            shown = ", ".join(f"{name} ({value!r:.60})" for name, value in self.without_effect.items())
            notes.append(
                f"The source's model does not read these fields of config.json, which are kept only in conversion.json: {shown}."
            )
        if self.prediction is not None and self.prediction_for(target) is None:
            notes.append(
                f"The layers that predict further tokens ({len(self.prediction.state)} tensors) are left out: target {target} "
                f"cannot hold them; moe and {self.prediction.model_type or 'the family that published them'} can."
            )
        return notes


def cast(state: State, config: MoEConfig, dtype: torch.dtype) -> State:
    """Casts floating tensors to `dtype`, except those that routers of this package keep in fp32."""
    with torch.device("meta"):
        kept = MoEForCausalLM(config)._keep_in_fp32_modules_strict or set()

    def target(name: str) -> torch.dtype:
        if not state[name].dtype.is_floating_point or name.rpartition(".")[2] in kept:
            return state[name].dtype
        return dtype

    return {name: tensor.to(target(name)) for name, tensor in state.items()}


# if a configuration asks for more than this many times the parameters in the checkpoint, the two do not belong together
LARGEST_RATIO = 8


def _refuse_more_layers(source: Source) -> None:
    """Refuses a config.json with more layers than tensors, before a model with that many layers is built."""
    if source.gguf_file or not (source.folder / "config.json").is_file():
        return
    values = text_values(read_json(source.folder / "config.json"))
    for name in LAYERS:
        if isinstance(values.get(name), int | float) and values[name] > len(source.state):
            raise UserError(
                f"{name} is {values[name]} in {source.folder / 'config.json'}, but the checkpoint has "
                f"{len(source.state)} tensors: the two do not belong together, download both again"
            )


def _refuse_other_size(config: MoEConfig, source: Source) -> None:
    """Refuses a configuration with far more parameters than the checkpoint, before a model with them is built."""
    held = sum(tensor.numel for tensor in source.state.values())
    if config.num_params() > LARGEST_RATIO * held:
        raise UserError(
            f"the configuration in {source.folder} asks for {config.num_params():,} parameters where the checkpoint has "
            f"{held:,}: the two do not belong together, download both again"
        )


def open_checkpoint(
    name_or_path: str, gguf_file: str | None = None, dtype: str = "auto", *, trust_remote_code: bool = False
) -> Checkpoint:
    """Opens a checkpoint by folder or Hub name and reads only the headers of the files.

    Args:
        name_or_path: folder or Hub name of a model of one of `FAMILIES` or of this package; or path of a GGUF file.
        gguf_file: name of the GGUF file in the folder, if the model is one.
        dtype: dtype to which tensors are cast while they are read; `auto` keeps the source's.
        trust_remote_code: whether code that the source's configuration brings may run.

    Raises:
        UserError: if the source is damaged, quantised, of an unknown family, or has a feature that a MoE cannot have.
    """
    parse_dtype(dtype)
    source = open_source(name_or_path, gguf_file)
    _refuse_more_layers(source)
    described = source_config(source.folder, source.gguf_file, trust_remote_code=trust_remote_code)
    try:
        config = moe_config(described)
        without_effect = fields_without_effect(described)
    except (TypeError, AttributeError, ArithmeticError, LookupError, RecursionError) as error:
        # a field of a wrong type can make the family's code raise any of these
        raise UserError(
            f"the configuration in {source.folder} cannot be converted: {type(error).__name__} {error}"
        ) from error
    _refuse_other_size(config, source)
    state = import_state(source.state, described, config)
    if described.model_type == MoEConfig.model_type:
        prediction = kept_prediction_layers(source.folder)
    else:
        prediction = prediction_layers(source.state, described)
    wanted = parse_dtype(dtype)
    if wanted is not None:
        state = cast(state, config, wanted)
        if prediction is not None:
            prediction = replace(prediction, state=cast(prediction.state, config, wanted))
    config.dtype = state["model.embed_tokens.weight"].dtype
    return Checkpoint(config, state, source, described, prediction, without_effect)
