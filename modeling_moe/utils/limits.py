# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""These checks compare sizes by arithmetic and refuse absurdly large ones before anything of that size is allocated."""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PreTrainedConfig

from ..configuration_moe import MoEConfig
from .errors import UserError
from .json_files import read_json
from .sizes import size_text


# configuration fields that count objects which are built one by one -> largest accepted value
LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")
MOST = dict.fromkeys(LAYERS, 10_000) | {"num_labels": 1_000_000}
MOST_RANK = 65_536
# a byte holds at most 8 parameters, of one bit each
PARAMETERS_PER_BYTE = 8
WEIGHTS = ("*.safetensors", "*.bin")
# limits of a result: bytes of its weights, and experts in all layers together, each of which is three tensors on disk
MOST_BYTES = 10**15
MOST_EXPERTS = 100_000


def refuse_vast_fields(values: dict[str, Any], where: str | Path) -> None:
    """Refuses a configuration with more layers or labels than any model has.

    Args:
        values: content of config.json; nested configurations are checked too.
        where: file or folder of the configuration, for the message.

    Raises:
        UserError: names the field.
    """
    for name, value in values.items():
        if isinstance(value, dict):
            refuse_vast_fields(value, where)
        elif name in MOST and isinstance(value, int | float) and value > MOST[name]:
            raise UserError(f"{name} is {value} in {where}: it must be at most {MOST[name]:,}, so correct the field")


def refuse_vast_adapter(folder: str | Path) -> None:
    """Refuses an adapter whose adapter_config.json has a larger rank or more layers than any adapter has.

    Raises:
        UserError: names the field, or says that the file is damaged.
    """
    file = Path(folder) / "adapter_config.json"
    if not file.is_file():
        return
    values = read_json(file)
    rank, copies = values.get("r"), values.get("layer_replication") or []
    if isinstance(rank, int) and rank > MOST_RANK:
        raise UserError(f"r is {rank} in {file}: it must be at most {MOST_RANK:,}, so correct the field")
    try:
        layers = sum(end - start for start, end in copies)
    except (TypeError, ValueError) as error:
        raise UserError(f"layer_replication in {file} must be a list of pairs of layers: {error}") from error
    if layers > MOST["num_hidden_layers"]:
        raise UserError(
            f"layer_replication makes {layers} layers in {file}: they must be at most {MOST['num_hidden_layers']:,}"
        )


def refuse_vast_model(config: PreTrainedConfig, folder: str, gguf_file: str | None = None) -> None:
    """Refuses a configuration with far more parameters than the checkpoint's files can hold.

    transformers would initialise the missing parameters at random before it names them.

    Args:
        config: configuration of the checkpoint; a class that the checkpoint's own code defines passes unchecked.
        folder: folder of the checkpoint; a name on the Hub passes unchecked.
        gguf_file: name of the GGUF file in the folder, if the checkpoint is one.

    Raises:
        UserError: gives the number of parameters and the number of bytes.
        SafetensorError: if a safetensors file is damaged.
    """
    refuse_vast_fields(config.to_dict(), folder)
    patterns = (gguf_file,) if gguf_file else WEIGHTS
    files = {file for pattern in patterns for file in Path(folder).glob(pattern) if file.is_file()}
    for file in files:
        if file.suffix == ".safetensors":
            # this reads only the header, and raises if the file is damaged
            with safe_open(file, framework="np"):
                pass
    if not files or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    asked, held = sum(tensor.numel() for tensor in model.parameters()), sum(file.stat().st_size for file in files)
    if asked > PARAMETERS_PER_BYTE * held:
        raise UserError(
            f"the configuration in {folder} asks for {asked:,} parameters where the files have {held:,} bytes: the two do "
            "not belong together, download both again"
        )


def refuse_vast_result(config: MoEConfig, dtype: torch.dtype) -> None:
    """Refuses to make a model of an absurd size, as a mistyped number of experts asks for.

    Args:
        config: configuration of the result.
        dtype: dtype of the result's weights.

    Raises:
        UserError: if the weights take more than a petabyte, or all layers together have more than 100,000 experts.
    """
    if (nbytes := config.num_params() * dtype.itemsize) > MOST_BYTES:
        raise UserError(f"the result would take {size_text(nbytes)}, more than a petabyte: ask for fewer experts")
    experts = (config.num_hidden_layers - len(config.mlp_only_layers)) * config.num_experts
    if experts > MOST_EXPERTS:
        raise UserError(
            f"num_experts is {config.num_experts:,}, {experts:,} in all layers: at most {MOST_EXPERTS:,} can be written"
        )
