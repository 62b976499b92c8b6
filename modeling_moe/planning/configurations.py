# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module reads the configuration to plan, and reads no weights."""

from pathlib import Path

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PreTrainedConfig

from ..conversion import moe_config, source_config
from ..utils.errors import UserError
from ..utils.loading import load_config, one_line_for
from ..utils.locations import folder_and_gguf
from ..utils.presets import presets


def read_config(
    name_or_path: str, gguf_file: str | None = None, *, trust_remote_code: bool = False
) -> PreTrainedConfig:
    """Returns the configuration of a causal LM.

    A family that this package converts, and for which transformers has no causal LM, gets the converted configuration.

    Args:
        name_or_path: folder, Hub name (only config.json is downloaded), preset, or path of a configuration file.
        gguf_file: name of the GGUF file in the folder, if the model is one.
        trust_remote_code: whether Python code that the checkpoint brings may run.

    Raises:
        UserError: if there is no configuration, or it is that of another kind of model.
    """
    config = _any_config(name_or_path, gguf_file, trust_remote_code)
    code = getattr(config, "auto_map", None) or {}
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or "AutoModelForCausalLM" in code:
        return config
    return moe_config(config)


def local_folder_of(name_or_path: str, gguf_file: str | None = None) -> Path | None:
    """Returns the folder of a model's safetensors files; None for a preset, a file, a GGUF file or a name on the Hub."""
    if Path(name_or_path).is_file() or (name_or_path in presets() and not Path(name_or_path).is_dir()):
        return None
    folder, gguf_file = folder_and_gguf(name_or_path, gguf_file)
    return Path(folder) if not gguf_file and Path(folder).is_dir() else None


def _any_config(name_or_path: str, gguf_file: str | None, trust_remote_code: bool) -> PreTrainedConfig:
    file = presets().get(name_or_path) if not Path(name_or_path).is_dir() else None
    path = file or Path(name_or_path)
    if path.suffix == ".json" and gguf_file is None:
        if not path.is_file():
            raise UserError(f"model_name_or_path {name_or_path} does not exist: correct the path of the configuration")
        if path.name == "config.json":
            return source_config(path.parent, trust_remote_code=trust_remote_code)
        with one_line_for("the configuration", str(path), trust_remote_code):
            return AutoConfig.from_pretrained(str(path), trust_remote_code=trust_remote_code)
    folder = local_folder_of(name_or_path, gguf_file)
    if folder is not None and (folder / "config.json").is_file():
        return source_config(folder, trust_remote_code=trust_remote_code)
    return load_config(name_or_path, gguf_file, trust_remote_code=trust_remote_code)
