# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""The commands load every model, tokenizer and configuration here, and a checkpoint's code runs only if the user says so."""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.distributed import DistributedConfig
from transformers.utils import logging as transformers_logging

from ..checkpoint_code import import_own_router
from ..checkpoint_damage import CheckpointError, refuse_missing
from ..checkpoints.gguf_header import refuse_damaged_header
from .errors import UserError
from .limits import refuse_unheld, refuse_vast_adapter, refuse_vast_fields
from .locations import folder_and_gguf, local_folder, read_json, refuse_outside


logger = transformers_logging.get_logger(__name__)

TOKENIZER_FILES = ("tokenizer*", "*vocab*", "merges.txt", "*.model", "tekken.json")
DESCRIPTIONS = ("config.json", "generation_config.json", "tokenizer_config.json")
MESSAGE_LENGTH = 600


def parse_dtype(name: str) -> torch.dtype | None:
    """The torch dtype of that name; None for `auto`.

    Raises:
        UserError: if it is none of the floating dtypes that a checkpoint is kept in.
    """
    dtypes = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in dtypes:
        raise UserError(f"dtype {name!r} is unknown: it must be one of {', '.join(dtypes)}")
    return dtypes[name]


def _in_one_line(error: BaseException) -> str:
    if isinstance(error, UnpicklingError):
        return "a file is damaged, or holds a pickle of other things than tensors, which is not run"
    text = " ".join(str(error).split())
    named = isinstance(error, (OSError, ValueError, RuntimeError)) and not isinstance(error, RecursionError)
    text = text if named and text else f"{type(error).__name__}: {text}".rstrip(": ")
    return text if len(text) <= MESSAGE_LENGTH else f"{text[:MESSAGE_LENGTH]} ..."


@contextmanager
def one_line_for(what: str, name: str, trust_remote_code: bool = False) -> Iterator[None]:
    """Turns whatever a damaged or foreign checkpoint makes other libraries raise into one sentence.

    Files that anybody may have written fail in any way: torch, pickle, safetensors, tokenizers (which raises plain
    `Exception`), JSON and a checkpoint's own code have no class of errors in common.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not trust_remote_code and "trust_remote_code=True" in str(error):
            raise UserError(
                f"{what} of {name} needs Python code that the checkpoint brings, or names in another repository: read it, "
                "then pass --trust_remote_code true to run it"
            ) from error
        if isinstance(error, CheckpointError):
            raise UserError(_in_one_line(error)) from error
        if Path(name).is_dir():
            raise UserError(f"{what} of {name} cannot be loaded: {_in_one_line(error)}") from error
        raise UserError(
            f"{name} is no folder here, and the Hub does not give {what}: {_in_one_line(error)}"
        ) from error


class _WithoutReport(logging.Filter):
    """Keeps transformers' table of missing and unexpected tensors off the terminal; the text stays here.

    Args:
        level: least level of the other messages that pass.
    """

    report = ""

    def __init__(self, level: int):
        super().__init__()
        self.level = level

    def filter(self, record: logging.LogRecord) -> bool:
        if "LOAD REPORT" not in (text := record.getMessage()):
            return record.levelno >= self.level
        self.report = text
        return False


@contextmanager
def _captured_report(name: str) -> Iterator[_WithoutReport]:
    """While a model loads, the table does not reach the terminal: an error or one warning says what is in it."""
    source = logging.getLogger("transformers.modeling_utils")
    level, captured = source.level, _WithoutReport(source.getEffectiveLevel())
    source.addFilter(captured)
    if captured.level > logging.WARNING:
        # where the user has silenced warnings the table would not be written at all
        source.setLevel(logging.WARNING)
    try:
        yield captured
    except CheckpointError:
        raise
    except RuntimeError as error:
        if unfit := sorted(set(re.findall(r"destined for (\S+?)\.(?=\s|$)", captured.report))):
            more = f" (and {len(unfit) - 1} more)" if len(unfit) > 1 else ""
            raise CheckpointError(
                f"the checkpoint {name} does not fit its config.json: a tensor that {unfit[0]}{more} is made of is missing or "
                "misshapen, so download it again"
            ) from error
        raise
    finally:
        source.removeFilter(captured)
        source.setLevel(level)


def adapter_base(name_or_path: str | Path) -> str | None:
    """The model that the LoRA adapter in a folder was trained on, as adapter_config.json names it.

    Returns:
        A folder or Hub name; None if the folder holds no adapter.

    Raises:
        UserError: if adapter_config.json is damaged or names no model, or names a folder that is not there.
    """
    file = Path(name_or_path) / "adapter_config.json"
    if not file.is_file():
        return None
    base = read_json(file).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise UserError(f"{file} names no base_model_name_or_path: write the model's folder or Hub name there")
    try:
        return local_folder(base)
    except UserError as error:
        raise UserError(
            f"{file} names the base model {base}, and there is no such folder: write its place into "
            "base_model_name_or_path, a Hub name or an absolute path"
        ) from error


def _check_files(folder: str) -> None:
    """Refuses a folder whose files lead elsewhere, or whose descriptions are no JSON objects or ask for too much."""
    refuse_outside(folder)
    refuse_vast_adapter(folder)
    for name in DESCRIPTIONS:
        if (file := Path(folder) / name).is_file():
            values = read_json(file)
            refuse_vast_fields(values, file)
            code = values.get("auto_map")
            if code is not None and not isinstance(code, dict | list):
                raise UserError(f"{file} is damaged: its auto_map must be an object")
            if name == "generation_config.json":
                _check_token_ids(values, file)


def _check_token_ids(values: dict[str, Any], file: Path) -> None:
    for name, value in values.items():
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if name.endswith("_token_id") and not all(isinstance(token, int) for token in ids):
            raise UserError(
                f"{file} is damaged: its {name} is {value!r:.100}, which must be a token's number or a list"
            )


def _check_gguf(folder: str, gguf_file: str | None) -> None:
    """Refuses a GGUF file whose lengths do not fit into it; one on the Hub passes."""
    if gguf_file and (Path(folder) / gguf_file).is_file():
        refuse_damaged_header(Path(folder) / gguf_file)


def _check_folder(folder: str) -> None:
    """Refuses a folder whose files lead elsewhere; says which weights count where it holds a model and an adapter."""
    _check_files(folder)
    base = adapter_base(folder)
    if base is None:
        return
    if (Path(folder) / "config.json").is_file():
        logger.warning(f"{folder} holds a model and an adapter: the adapter is applied to the model beside it.")
        return
    _check_files(base)
    if adapter_base(base) is not None:
        raise UserError(
            f"the adapter in {folder} was trained on another adapter, {base}: merge that into its model first, by "
            f"python scripts/merge_adapter.py --model_name_or_path {base} --output_dir merged"
        )


def _base_folder(folder: str) -> str:
    """The folder, or Hub name, of the whole model: of an adapter alone that of the model it was trained on."""
    return folder if (Path(folder) / "config.json").is_file() else adapter_base(folder) or folder


def _trust_own_router(folder: str, trust_remote_code: bool) -> None:
    """Runs the code that a checkpoint brings for a router of its author's own, if code may run."""
    file = Path(_base_folder(folder)) / "config.json"
    if trust_remote_code and file.is_file() and "MoERouter" in (read_json(file).get("auto_map") or {}):
        import_own_router(file.parent)


def load_model(
    name_or_path: str,
    gguf_file: str | None = None,
    dtype: str = "auto",
    distributed_config: DistributedConfig | None = None,
    *,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Loads a causal LM: on the CPU, or split over processes.

    Args:
        name_or_path: folder, name of an installed package that holds a model, path of a GGUF file, or Hub name; of a
            LoRA adapter the base model is loaded, and the adapter onto it.
        gguf_file: name of the GGUF file in the folder, if it is one.
        dtype: `auto` (the checkpoint's), `float32`, `bfloat16` or `float16`.
        distributed_config: how transformers splits the model.
        trust_remote_code: whether Python code that the checkpoint brings may run.

    Raises:
        UserError: if there is no such model, it needs code that may not run, a file is damaged, or a tensor is missing
            or misshapen.
    """
    options: dict[str, Any] = {"dtype": parse_dtype(dtype) or "auto", "trust_remote_code": trust_remote_code}
    folder, gguf_file = folder_and_gguf(name_or_path, gguf_file)
    if gguf_file:
        options["gguf_file"] = gguf_file
    if distributed_config is not None:
        options["distributed_config"] = distributed_config
    _check_folder(folder)
    config = load_config(folder, gguf_file, trust_remote_code=trust_remote_code)
    with one_line_for("the model", folder, trust_remote_code), _captured_report(folder):
        refuse_unheld(config, _base_folder(folder), gguf_file)
        # ignored here, and refused below with their names
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
        for name, found, expected in sorted(info["mismatched_keys"]):
            raise CheckpointError(
                f"{folder} has {name} of shape {tuple(found)} where config.json asks for {tuple(expected)}"
            )
        refuse_missing(model, info, folder, new_head=False)
        if extra := sorted(info["unexpected_keys"]):
            logger.warning(
                f"{folder} has tensors that the model does not take: {', '.join(extra[:3])} ({len(extra)} in all)."
            )
    return model


def has_tokenizer(folder: str) -> bool:
    """Whether a folder holds a tokenizer's files; a name on the Hub may."""
    return not Path(folder).is_dir() or any(any(Path(folder).glob(pattern)) for pattern in TOKENIZER_FILES)


def load_tokenizer(
    name_or_path: str, gguf_file: str | None = None, *, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a model; that of the base model for an adapter that has none beside it.

    Args:
        name_or_path: as of [`load_model`].
        gguf_file: name of the GGUF file in the folder, if it is one.
        trust_remote_code: whether Python code that the tokenizer brings may run.

    Raises:
        UserError: if there is none, it needs code that may not run, or a file is damaged.
    """
    folder, gguf_file = folder_and_gguf(name_or_path, gguf_file)
    if not has_tokenizer(folder):
        folder = adapter_base(folder) or folder
    if not gguf_file and not has_tokenizer(folder):
        raise UserError(f"{folder} has no tokenizer: save one beside the model")
    _check_files(folder)
    _check_gguf(folder, gguf_file)
    options: dict[str, Any] = {"gguf_file": gguf_file} if gguf_file else {}
    with one_line_for("the tokenizer", folder, trust_remote_code):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, **options)
    if tokenizer is None:
        raise UserError(f"{folder} has no tokenizer: save one beside the model")
    return tokenizer


def load_config(
    name_or_path: str, gguf_file: str | None = None, *, trust_remote_code: bool = False
) -> PreTrainedConfig:
    """Loads the configuration of a model; that of the base model for an adapter.

    Args:
        name_or_path: as of [`load_model`].
        gguf_file: name of the GGUF file in the folder, if it is one.
        trust_remote_code: whether Python code that the checkpoint brings may run.

    Raises:
        UserError: if there is none, it needs code that may not run, or it is damaged.
    """
    folder, gguf_file = folder_and_gguf(name_or_path, gguf_file)
    folder = folder if gguf_file else _base_folder(folder)
    _check_files(folder)
    _check_gguf(folder, gguf_file)
    options: dict[str, Any] = {"gguf_file": gguf_file} if gguf_file else {}
    with one_line_for("the configuration", folder, trust_remote_code):
        _trust_own_router(folder, trust_remote_code)
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, **options)


def refuse_misfit(tokenizer: PreTrainedTokenizerBase, model: torch.nn.Module) -> None:
    """Refuses a tokenizer that writes token ids for which the model has no embedding.

    Args:
        tokenizer: any tokenizer.
        model: a causal LM, with or without an adapter.

    Raises:
        UserError: says how many tokens each has.
    """
    tokens = max([len(tokenizer), *(index + 1 for index in tokenizer.get_vocab().values())])
    rows = model.get_input_embeddings().num_embeddings
    if tokens > rows:
        raise UserError(
            f"the tokenizer has {tokens} tokens and the model {rows}: take the tokenizer that belongs to the model, or "
            "resize the model's embeddings"
        )


def refuse_longer(model: PreTrainedModel | torch.nn.Module, tokens: int, what: str) -> None:
    """Refuses a text that is longer than the model has positions.

    Args:
        model: a causal LM, with or without an adapter.
        tokens: length of the text.
        what: what the user gave, a sentence's beginning such as "max_length is 512"; the message says "more than ..." after it.

    Raises:
        UserError: says how many positions the model has; one that names no number of them passes.
    """
    config: Any = model.config
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions and tokens > positions:
        raise UserError(f"{what}, more than the model's {positions} positions: make it shorter")
