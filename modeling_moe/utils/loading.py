# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""All commands load models, tokenizers and configurations by this module; a checkpoint's code runs only with permission."""

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
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
from .json_files import read_json
from .limits import refuse_vast_adapter, refuse_vast_fields, refuse_vast_model
from .locations import folder_and_gguf, local_folder, refuse_outside
from .twins import twin_config


logger = transformers_logging.get_logger(__name__)

TOKENIZER_FILES = ("tokenizer*", "*vocab*", "merges.txt", "*.model", "tekken.json")
DESCRIPTIONS = ("config.json", "generation_config.json", "tokenizer_config.json")
MESSAGE_LENGTH = 600
# quant_method of experts in bitsandbytes' 4-bit format, in config.json
FOUR_BITS = "modeling_moe_4bit"


# type of the --dtype flags, whose --help then lists the names
DtypeName = Literal["auto", "float32", "bfloat16", "float16"]


def parse_dtype(name: str) -> torch.dtype | None:
    """Returns the torch dtype of a name; None for `auto`.

    Raises:
        UserError: if the name is none of auto, float32, bfloat16 and float16.
    """
    dtypes = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in dtypes:
        raise UserError(f"dtype {name!r} is unknown: it must be one of {', '.join(dtypes)}")
    return dtypes[name]


def _in_one_line(error: BaseException) -> str:
    """Returns an error's message as one line of limited length, with the error's class if the message needs it."""
    if isinstance(error, UnpicklingError):
        return "a file is damaged, or holds a pickle of other objects than tensors, which is not run"
    text = " ".join(str(error).split())
    named = isinstance(error, (OSError, ValueError, RuntimeError)) and not isinstance(error, RecursionError)
    text = text if named and text else f"{type(error).__name__}: {text}".rstrip(": ")
    return text if len(text) <= MESSAGE_LENGTH else f"{text[:MESSAGE_LENGTH]} ..."


@contextmanager
def one_line_for(what: str, name: str, trust_remote_code: bool = False) -> Iterator[None]:
    """Turns any exception that a damaged or foreign checkpoint causes in another library into one sentence.

    torch, pickle, safetensors, tokenizers (which raises plain `Exception`), JSON and a checkpoint's own code have no common
    class of errors.

    Args:
        what: what is loaded, such as "the model", for the message.
        name: folder or Hub name.
        trust_remote_code: whether code that the checkpoint brings may run.

    Raises:
        UserError: names the checkpoint and the cause.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        # transformers names its own flag; a router that only the checkpoint's code defines is named by this package
        needs_code = any(text in str(error) for text in ("trust_remote_code=True", "import_own_router"))
        if needs_code and not trust_remote_code:
            raise UserError(
                f"{what} of {name} needs Python code that the checkpoint brings, or names in another repository: read it, "
                "then pass --trust_remote_code true to run it"
            ) from error
        if isinstance(error, CheckpointError):
            raise UserError(_in_one_line(error)) from error
        if Path(name).exists():
            raise UserError(f"{what} of {name} cannot be loaded: {_in_one_line(error)}") from error
        raise UserError(
            f"{name} is no folder here, and the Hub does not give {what}: {_in_one_line(error)}"
        ) from error


class _WithoutReport(logging.Filter):
    """Keeps transformers' table of missing and unexpected tensors off the terminal, and stores the text in `report`.

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
    """Captures transformers' load report while a model loads, and turns the error that refers to it into one sentence."""
    source = logging.getLogger("transformers.modeling_utils")
    level, captured = source.level, _WithoutReport(source.getEffectiveLevel())
    source.addFilter(captured)
    if captured.level > logging.WARNING:
        # transformers writes the report only if warnings are enabled
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
    """Returns the model on which the LoRA adapter in a folder was trained, as adapter_config.json names it.

    Returns:
        Folder or Hub name; None if the folder holds no adapter.

    Raises:
        UserError: if adapter_config.json is damaged, names no model, or names a folder that does not exist.
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
    """Refuses a folder whose links lead outside, or whose JSON descriptions are damaged or ask for absurd sizes."""
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
    """Refuses a generation config whose token ids are neither integers nor lists of integers."""
    for name, value in values.items():
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if name.endswith("_token_id") and not all(isinstance(token, int) for token in ids):
            raise UserError(
                f"{file} is damaged: its {name} is {value!r:.100}, which must be a token's number or a list"
            )


def _check_gguf(folder: str, gguf_file: str | None) -> None:
    """Refuses a GGUF file with a damaged header; a file that is still on the Hub passes unchecked."""
    if gguf_file and (Path(folder) / gguf_file).is_file():
        refuse_damaged_header(Path(folder) / gguf_file)


def _check_folder(folder: str) -> None:
    """Checks a model's or adapter's folder, and warns if the folder holds both."""
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
            f"moe merge_adapter --model_name_or_path {base} --output_dir merged"
        )


def _base_folder(folder: str) -> str:
    """Returns the folder or Hub name of the whole model: for a folder with only an adapter, the adapter's base model."""
    return folder if (Path(folder) / "config.json").is_file() else adapter_base(folder) or folder


def _import_checkpoint_router(folder: str, trust_remote_code: bool) -> None:
    """Registers the router class that a checkpoint's own code defines, if that code may run."""
    file = Path(_base_folder(folder)) / "config.json"
    if trust_remote_code and file.is_file() and "MoERouter" in (read_json(file).get("auto_map") or {}):
        import_own_router(file.parent)


def saved_in_4bit(config: PreTrainedConfig) -> bool:
    """Returns whether a checkpoint's experts are in the 4-bit format that `modeling_moe.lora` writes."""
    settings = getattr(config, "quantization_config", None)
    return isinstance(settings, Mapping) and settings.get("quant_method") == FOUR_BITS


def _register_quantizer(config: PreTrainedConfig) -> None:
    """Lets transformers know the 4-bit format of experts if a checkpoint is in that format.

    This is the one place where a file of `utils` names a sub-package. All commands load models here, and whether
    `modeling_moe.lora` is needed stands in the checkpoint alone. An import in each command would take seconds, because of
    PEFT, and entry points would not work in a clone that is not installed.
    """
    if saved_in_4bit(config):
        import_module("modeling_moe.lora")


def load_model(
    name_or_path: str,
    gguf_file: str | None = None,
    dtype: str = "auto",
    distributed_config: DistributedConfig | None = None,
    *,
    trust_remote_code: bool = False,
    quantization_config: Any = None,
) -> PreTrainedModel:
    """Loads a causal LM, or a multimodal model with a head for texts, on the CPU, or split over processes.

    Args:
        name_or_path: folder, name of an installed package that holds a model, path of a GGUF file, or Hub name. For a
            LoRA adapter, the base model is loaded first and the adapter is applied to it.
        gguf_file: name of the GGUF file in the folder, if the model is one.
        dtype: `auto` (the checkpoint's), `float32`, `bfloat16` or `float16`.
        distributed_config: how transformers splits the model over processes.
        trust_remote_code: whether Python code that the checkpoint brings may run.
        quantization_config: transformers' description of how to quantize while loading, such as
            [`~modeling_moe.lora.Experts4bitConfig`].

    Raises:
        UserError: if there is no such model, it needs code that may not run, a file is damaged, or a tensor is missing
            or has the wrong shape.
    """
    options: dict[str, Any] = {"dtype": parse_dtype(dtype) or "auto", "trust_remote_code": trust_remote_code}
    folder, gguf_file = folder_and_gguf(name_or_path, gguf_file)
    if gguf_file:
        options["gguf_file"] = gguf_file
    if distributed_config is not None:
        options["distributed_config"] = distributed_config
    if quantization_config is not None:
        options["quantization_config"] = quantization_config
    _check_folder(folder)
    config = load_config(folder, gguf_file, trust_remote_code=trust_remote_code)
    if not gguf_file and _twin(_base_folder(folder)) is not None:
        options["config"] = config  # transformers does not read config.json of this family
    _register_quantizer(config)
    with one_line_for("the model", folder, trust_remote_code), _captured_report(folder):
        refuse_vast_model(config, _base_folder(folder), gguf_file)
        # transformers must ignore mismatched sizes, so that the error below can name the tensor
        text_only = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
        multimodal = not text_only and type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
        auto_class = AutoModelForImageTextToText if multimodal else AutoModelForCausalLM
        model, info = auto_class.from_pretrained(
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
    """Returns whether a folder holds a tokenizer's files; True for a name on the Hub, where this is not known yet."""
    return not Path(folder).is_dir() or any(any(Path(folder).glob(pattern)) for pattern in TOKENIZER_FILES)


def load_tokenizer(
    name_or_path: str, gguf_file: str | None = None, *, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a model; for an adapter without a tokenizer, the tokenizer of the base model.

    Args:
        name_or_path: name of the model as in [`load_model`].
        gguf_file: name of the GGUF file in the folder, if the model is one.
        trust_remote_code: whether Python code that the tokenizer brings may run.

    Raises:
        UserError: if there is no tokenizer, it needs code that may not run, or a file is damaged.
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
    """Loads the configuration of a model; for an adapter, the configuration of the base model.

    A model type that transformers computes under another name is opened as the family of that name, see
    [`modeling_moe.utils.twins.twin_of`].

    Args:
        name_or_path: name of the model as in [`load_model`].
        gguf_file: name of the GGUF file in the folder, if the model is one.
        trust_remote_code: whether Python code that the checkpoint brings may run.

    Raises:
        UserError: if there is no configuration, it needs code that may not run, or it is damaged.
    """
    folder, gguf_file = folder_and_gguf(name_or_path, gguf_file)
    folder = folder if gguf_file else _base_folder(folder)
    _check_files(folder)
    _check_gguf(folder, gguf_file)
    options: dict[str, Any] = {"gguf_file": gguf_file} if gguf_file else {}
    with one_line_for("the configuration", folder, trust_remote_code):
        _import_checkpoint_router(folder, trust_remote_code)
        if not gguf_file and (twin := _twin(folder)) is not None:
            return twin
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, **options)


def _twin(folder: str) -> PreTrainedConfig | None:
    """Returns the configuration of a model that transformers computes under another name; None for other models."""
    values, _ = PreTrainedConfig.get_config_dict(folder)
    return twin_config(values, folder)


def _language_model(model: torch.nn.Module) -> PreTrainedModel:
    """Returns the transformers model inside wrappers such as those of PEFT."""
    return next(module for module in model.modules() if isinstance(module, PreTrainedModel))


def embedding_rows(model: torch.nn.Module) -> int:
    """Returns the number of token ids for which a causal LM, with or without an adapter, has an embedding."""
    embedding = _language_model(model).get_input_embeddings()
    rows = getattr(embedding, "num_embeddings", None)
    if not isinstance(rows, int):
        raise TypeError(f"the input embedding is a {type(embedding).__name__}, which has no num_embeddings")
    return rows


def refuse_misfit(tokenizer: PreTrainedTokenizerBase, model: torch.nn.Module) -> None:
    """Refuses a tokenizer with token ids for which the model has no embedding.

    Args:
        tokenizer: any tokenizer.
        model: a causal LM, with or without an adapter.

    Raises:
        UserError: gives the number of tokens of both.
    """
    tokens = max([len(tokenizer), *(index + 1 for index in tokenizer.get_vocab().values())])
    rows = embedding_rows(model)
    if tokens > rows:
        raise UserError(
            f"the tokenizer has {tokens} tokens and the model {rows}: take the tokenizer that belongs to the model, or "
            "resize the model's embeddings"
        )


def refuse_longer(model: PreTrainedModel | torch.nn.Module, tokens: int, what: str) -> None:
    """Refuses a text that is longer than the model's number of positions.

    Args:
        model: a causal LM, with or without an adapter; a model whose configuration gives no number of positions passes.
        tokens: length of the text.
        what: beginning of the message, such as "max_length is 512"; the message continues with ", more than ...".

    Raises:
        UserError: gives the model's number of positions.
    """
    positions = getattr(_language_model(model).config.get_text_config(), "max_position_embeddings", None)
    if positions and tokens > positions:
        raise UserError(f"{what}, more than the model's {positions} positions: make it shorter")
