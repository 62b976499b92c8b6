# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""A checkpoint that asks for far more than it holds is refused by arithmetic, before anything of that size is made."""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PreTrainedConfig

from .errors import UserError
from .locations import read_json


# fields of a configuration whose objects are made one by one -> the most that anybody means
LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")
MOST = dict.fromkeys(LAYERS, 10_000) | {"num_labels": 1_000_000}
MOST_RANK = 65_536
# numbers that a byte of a file can stand for, at one bit each
NUMBERS_OF_A_BYTE = 8
WEIGHTS = ("*.safetensors", "*.bin")


def refuse_vast_fields(values: dict[str, Any], where: str | Path) -> None:
    """Refuses a configuration with more layers or labels than any model has.

    Args:
        values: of config.json; those of the configurations in it are looked at too.
        where: the file or folder, for the message.

    Raises:
        UserError: names the field.
    """
    for name, value in values.items():
        if isinstance(value, dict):
            refuse_vast_fields(value, where)
        elif name in MOST and isinstance(value, int | float) and value > MOST[name]:
            raise UserError(f"{name} is {value} in {where}: it must be at most {MOST[name]:,}, so correct the field")


def refuse_vast_adapter(folder: str | Path) -> None:
    """Refuses an adapter whose adapter_config.json asks for more than any adapter has.

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


def refuse_unheld(config: PreTrainedConfig, folder: str, gguf_file: str | None = None) -> None:
    """Refuses a configuration with far more parameters than the checkpoint's files can hold.

    transformers would make the missing ones of random numbers before it names them.

    Args:
        config: of the checkpoint; a class of its own code passes.
        folder: of the checkpoint; a name on the Hub passes.
        gguf_file: name of the GGUF file in the folder, if it is one.

    Raises:
        UserError: says how many parameters are asked for, and how many bytes are there.
        SafetensorError: if a safetensors file is damaged.
    """
    refuse_vast_fields(config.to_dict(), folder)
    patterns = (gguf_file,) if gguf_file else WEIGHTS
    files = {file for pattern in patterns for file in Path(folder).glob(pattern) if file.is_file()}
    for file in files:
        if file.suffix == ".safetensors":
            # a damaged file is called damaged; the header alone is read
            with safe_open(file, framework="np"):
                pass
    if not files or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    asked, held = sum(tensor.numel() for tensor in model.parameters()), sum(file.stat().st_size for file in files)
    if asked > NUMBERS_OF_A_BYTE * held:
        raise UserError(
            f"the configuration in {folder} asks for {asked:,} parameters where the files have {held:,} bytes: the two do "
            "not belong together, download both again"
        )
