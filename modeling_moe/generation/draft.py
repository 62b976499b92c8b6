# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""A draft model proposes tokens, and the model checks several of them in one call (Leviathan et al., arXiv:2211.17192).

transformers' assisted generation drafts, checks and samples. This module finds the draft model, fits it to the model, and
tells where checking several tokens in one call would change the text.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from huggingface_hub import hf_hub_download
from packaging import version
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel, PreTrainedTokenizerBase

from ..configuration_moe import MoEConfig
from ..router_catalogue import router_class
from ..utils.errors import UserError
from ..utils.json_files import read_json
from ..utils.lineage import CONVERSION, recorded_lineage
from ..utils.loading import adapter_base, embedding_rows, load_model, load_tokenizer, one_line_for
from ..utils.locations import folder_and_gguf, local_folder
from .arguments import WriterArguments


AUTO = "auto"


class Draft(NamedTuple):
    """A draft model.

    Attributes:
        name: folder or Hub name.
        model: causal LM in evaluation mode, with as many token ids as the model it drafts for.
    """

    name: str
    model: PreTrainedModel


def _record(name_or_path: str) -> Path:
    """Returns the conversion.json of a model; for an adapter, that of the base model.

    Raises:
        UserError: if there is none.
    """
    folder, gguf_file = folder_and_gguf(name_or_path)
    if not (Path(folder) / CONVERSION).is_file():
        folder = adapter_base(folder) or folder
    file = Path(folder) / CONVERSION
    if not gguf_file and not Path(folder).is_dir():
        with one_line_for(CONVERSION, folder):
            file = Path(hf_hub_download(folder, CONVERSION))
    if not file.is_file():
        raise UserError(
            f"draft auto: {folder} has no {CONVERSION}, which names the dense source: give a model as draft"
        )
    return file


def _place_of(name: str, files: dict[str, Any], beside: Path) -> str | None:
    """Returns the folder of a recorded source, or the path of its GGUF file; None if it is not found.

    Args:
        name: name of the source's folder.
        files: names of the source's files.
        beside: folder next to which the source may lie.
    """
    places = [Path(name), beside / name]
    with suppress(UserError):  # the name is no folder here and no package
        places.append(Path(local_folder(name)))
    gguf = next((file for file in files if file.endswith(".gguf")), None)
    for place in places:
        if files and all((place / file).is_file() for file in files):
            return str(place / gguf) if gguf else str(place)
    return None


def dense_source(name_or_path: str) -> str:
    """Returns the dense model that a MoE was upcycled from, as the MoE's `conversion.json` names it.

    The record has the name of the source's folder and, for a source from the Hub, the Hub's name. A folder is looked for
    here, beside the MoE and among installed packages. Other weights in a folder of that name make the draft worse, not
    the text.

    Args:
        name_or_path: folder or Hub name of the MoE, or folder of an adapter on it.

    Returns:
        Folder, path of a GGUF file, or Hub name.

    Raises:
        UserError: if there is no record, it tells of no upcycling, or the source is not found.
    """
    file = _record(name_or_path)
    recipe = read_json(file).get("recipe")
    recipe = recipe if isinstance(recipe, dict) else {}
    sources = recipe.get("sources")
    sources = [source for source in sources if isinstance(source, dict)] if isinstance(sources, list) else []
    if recipe.get("method") != "upcycle" or not sources:
        raise UserError(f"draft auto: {file} tells of no upcycling from a dense model: give a model as draft")
    names = [str(source.get("name")) for source in sources]
    for name, source in zip(names, sources, strict=True):
        files = source.get("files")
        plain = isinstance(files, dict) and all(Path(part).name == part for part in (name, *files))
        if plain and (place := _place_of(name, files, file.absolute().parent.parent)):
            return place
    if base := recorded_lineage(file.parent).get("base_model"):
        return str(base)
    raise UserError(
        f"draft auto: {file} names the dense source {names[0]!r}, which is not here, beside the model or among the installed "
        "packages: give the source's folder as draft"
    )


def refuse_other_tokens(tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase, name: str) -> None:
    """Refuses a draft model whose tokenizer gives an id to another text than the model's tokenizer does.

    Args:
        tokenizer: the model's tokenizer.
        other: the draft model's tokenizer; tokens that only one of the two has do not matter.
        name: folder or Hub name of the draft model, for the message.

    Raises:
        UserError: gives an id and both texts.
    """
    texts = {index: text for text, index in tokenizer.get_vocab().items()}
    for text, index in sorted(other.get_vocab().items(), key=lambda item: item[1]):
        if texts.get(index, text) != text:
            raise UserError(
                f"draft {name} has another tokenizer: token {index} is {text!r} there and {texts[index]!r} in the model; give "
                "a model with the same tokenizer"
            )


def fit_draft(draft: PreTrainedModel, model: PreTrainedModel, tokens: int | None = None) -> None:
    """Fits a draft model to the model whose tokens it drafts, in place.

    transformers compares the numbers of token ids, which differ between sizes of one family by padding. The rows that the
    draft model lacks are added; a wrong proposal costs time, not exactness.

    Args:
        draft: causal LM.
        model: causal LM with the same tokens.
        tokens: number of tokens that are drafted at once; if None, transformers' rule applies: up to 20, and none after one
            that the draft model gives a probability below 0.4.
    """
    rows = embedding_rows(model)
    if embedding_rows(draft) != rows:
        draft.resize_token_embeddings(rows, mean_resizing=False)
    # the model's settings apply to both; sampling settings of the draft model would make worse proposals
    draft.generation_config = GenerationConfig()
    if tokens is not None:
        draft.generation_config.num_assistant_tokens = tokens
        draft.generation_config.assistant_confidence_threshold = 0.0


def load_draft(args: WriterArguments, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Draft:
    """Loads the draft model that the arguments name, on the model's device.

    Raises:
        UserError: if the draft model cannot be found or loaded, has other tokens than the model, or writes no text.
    """
    name = args.draft or AUTO
    if name == AUTO:
        name = dense_source(args.model_name_or_path)
    # the user trusts the MoE's code, not that of a model which the MoE's files name
    trust = args.trust_remote_code and args.draft != AUTO
    refuse_other_tokens(tokenizer, load_tokenizer(name, trust_remote_code=trust), name)
    draft = load_model(name, dtype=args.dtype, trust_remote_code=trust)
    if not isinstance(draft, GenerationMixin) or draft.config.is_encoder_decoder:
        raise UserError(f"draft {name} is a {type(draft).__name__}, which cannot draft: give a causal LM")
    fit_draft(draft, model, args.draft_tokens)
    draft.to(model.device)  # pyrefly: ignore[bad-argument-type]: a decorator of transformers hides the signature
    return Draft(name, draft.eval())


def _routing_reason(config: MoEConfig) -> str | None:
    """Returns why the routing of a token depends on the other tokens of a call; None if it does not."""
    router = router_class(config)
    if "sparse" not in config.mlp_layer_types:
        return None
    if not (router.causal or router.per_token):
        return f"router_type={config.router_type!r} chooses among the tokens of one call"
    if config.expert_capacity is None and config.eval_capacity_factor is None:
        return None
    if config.capacity_priority != "token":
        return f"capacity_priority={config.capacity_priority!r} ranks the tokens of one call"
    if config.expert_capacity is None and not config.capacity_running:
        return "eval_capacity_factor counts the tokens of one call (capacity_running counts all tokens so far)"
    return None


def _rope_reason(config: Any, length: int, total: int) -> str | None:
    """Returns why rotary positions depend on the longest position of a call; None if they do not in this text."""
    rope = getattr(config, "rope_parameters", None) or {}
    tables = [rope, *(table for table in rope.values() if isinstance(table, dict))]
    for table in tables:
        kind = table.get("rope_type")
        border = table.get("original_max_position_embeddings") or getattr(config, "max_position_embeddings", total)
        if (kind == "dynamic" and total > border) or (kind == "longrope" and length <= border < total):
            return f"rope_type={kind!r} changes at position {border} with the longest text of one call"
    return None


def reason_not_exact(model: PreTrainedModel, config: GenerationConfig, length: int) -> str | None:
    """Returns why a draft model could change the text, as a clause that names the field; None if it cannot.

    Without a draft model each new token is one call. With one, a call has several tokens, some of which are rejected.

    Args:
        model: causal LM in evaluation mode.
        config: generation config; `max_new_tokens` must be set.
        length: number of tokens of the prompt.
    """
    if config.stop_strings:
        return "stop_strings in generation_config.json are looked for after several tokens at once"
    own = model.config if isinstance(model.config, MoEConfig) else None
    if own is not None and (reason := _routing_reason(own)):
        return reason
    return _rope_reason(model.config.get_text_config(), length, length + (config.max_new_tokens or 0))


def refuse_draft_window(draft: Draft, tokens: int) -> None:
    """Refuses a draft model whose sliding window is shorter than the text, where transformers cannot crop its cache.

    It fails on transformers 5.17 and works on 5.24; releases between them are refused too.

    Args:
        draft: draft model.
        tokens: number of tokens of prompt and new text.

    Raises:
        UserError: names the window and the remedy.
    """
    config = draft.model.config.get_text_config()
    window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    slides = window is not None and (kinds is None or any(kind != "full_attention" for kind in kinds))
    if slides and tokens > window and version.parse(transformers.__version__) < version.parse("5.24"):
        raise UserError(
            f"draft {draft.name} has a sliding window of {window} tokens, shorter than the text of {tokens}, which "
            f"transformers {transformers.__version__} cannot draft with: install transformers 5.24, or give another draft"
        )


@contextmanager
def counted_calls(model: torch.nn.Module | None) -> Iterator[list[int]]:
    """Counts the calls of a model, each of which drafts one token, in a list of one number; nothing is counted for None."""
    calls = [0]

    def count(*_: Any) -> None:
        calls[0] += 1

    if model is None:
        yield calls
        return
    handle = model.register_forward_hook(count)
    try:
        yield calls
    finally:
        handle.remove()
