# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module makes the data of the facts experiment, and cuts a dense model into a frozen head and a trained tail.

# N facts, M tokens of a fact, S tokens of a row, H hidden, V tokens in the data
"""

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from modeling_moe.checkpoints import LazyTensor, State
from modeling_moe.configuration_moe import MoEConfig
from modeling_moe.conversion import load_state
from modeling_moe.utils.errors import UserError
from modeling_moe.utils.seeds import generator_for

from .python_text import python_documents


# digits of a fact
DIGITS = 6
# every fifth topic of the language reference is held out
HELD_OUT_TOPICS = 5


@dataclass(frozen=True)
class Rows:
    """Holds rows of data for the trained layers.

    Attributes:
        states: (..., S, H), what enters the first trained layer.
        labels: (..., S) int64, indices into the tokens of the data; -100 where nothing is learned.
    """

    states: torch.Tensor
    labels: torch.Tensor


@dataclass(frozen=True)
class FactsData:
    """Holds everything that the runs share.

    Attributes:
        config: configuration of the trained layers as a dense model.
        weights: checkpoint of the trained layers.
        facts: rows (1 + seeds, N, M); set 0 is for the search of learning rates, set i for seed i.
        prose: rows (prose_pool, S) to train on.
        held_out: rows (held_out_rows, S) to evaluate on.
    """

    config: dict[str, Any]
    weights: dict[str, torch.Tensor]
    facts: Rows
    prose: Rows
    held_out: Rows

    def save(self, path: str | Path) -> None:
        """Writes the data to a file."""
        torch.save(asdict(self), path)

    @classmethod
    def load(cls, path: str | Path) -> "FactsData":
        """Maps the file of [`save`] into memory, so that several processes share it."""
        content = torch.load(path, mmap=True)
        facts, prose, held_out = (Rows(**content[name]) for name in ("facts", "prose", "held_out"))
        return cls(content["config"], content["weights"], facts, prose, held_out)


def make_names(seed: int) -> Iterator[str]:
    """Yields names of two words without end; no name comes twice."""
    rng, seen = random.Random(seed), set()
    while True:
        first, last = ("".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(2)) for _ in "ab")
        name = f"{first.title()} {last.title()}"
        if name not in seen:
            seen.add(name)
            yield name


def make_facts(tokenizer: PreTrainedTokenizerBase, facts: int, sets: int, seed: int) -> torch.Tensor:
    """Makes facts of equal length: the end-of-text token if there is one, a name and a colon, six random digits.

    Only names with the most common number of tokens are used.

    Returns:
        (sets, N, M) int64; no name comes twice. The first sets do not depend on the number of sets.

    Raises:
        UserError: if the tokenizer does not have one token for each digit.
    """
    digits = [tokenizer(str(digit), add_special_tokens=False).input_ids for digit in range(10)]
    if any(len(ids) != 1 for ids in digits):
        raise UserError("the tokenizer does not have one token for each digit, which recall needs: use another model")
    begin = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    names = make_names(seed)

    def prompt() -> list[int]:
        return begin + tokenizer(f"{next(names)}:", add_special_tokens=False).input_ids

    probe = [prompt() for _ in range(200)]
    length = Counter(map(len, probe)).most_common(1)[0][0]
    prompts = [ids for ids in probe if len(ids) == length]
    while len(prompts) < sets * facts:
        if len(ids := prompt()) == length:
            prompts.append(ids)
    rng = random.Random(f"digits {seed}")
    rows = [ids + [digits[rng.randrange(10)][0] for _ in range(DIGITS)] for ids in prompts[: sets * facts]]
    return torch.tensor(rows).view(sets, facts, -1)


def prose_rows(
    tokenizer: PreTrainedTokenizerBase, length: int, counts: Sequence[int], seed: int
) -> list[torch.Tensor]:
    """Returns rows (count, S) int64 of Python's language reference, to train on and held out, from different topics.

    Raises:
        UserError: if the text has fewer rows.
    """
    topics = list(python_documents()["documentation"]["text"])
    training = "\n".join(text for i, text in enumerate(topics) if i % HELD_OUT_TOPICS)
    # topics quote each other, so that quoted paragraphs are removed
    paragraphs = "\n".join(topics[::HELD_OUT_TOPICS]).split("\n\n")
    held_out = "\n\n".join(paragraph for paragraph in paragraphs if paragraph not in training)
    parts = []
    for name, text, count in zip(("prose_pool", "held_out_rows"), (training, held_out), counts, strict=True):
        ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
        rows = ids[: len(ids) // length * length].view(-1, length)
        if len(rows) < count:
            raise UserError(f"{name} is {count}, but the text has {len(rows)} rows of {length} tokens: lower it")
        parts.append(rows[torch.randperm(len(rows), generator=generator_for(seed, name))[:count]])
    return parts


def cut(config: MoEConfig, state: State, first: int, last: int) -> tuple[MoEConfig, State]:
    """Returns a model of the layers `first` ... `last - 1`, with all tensors outside the layers.

    Raises:
        UserError: if what a layer computes depends on its position in the model.
    """
    if config.position_embedding_type != "rope" or config.scale_attn_by_inverse_layer_idx:
        raise UserError(
            "a model whose layers depend on their position cannot be cut in two: use one with rotary embeddings"
        )
    kept = {f"model.layers.{i}.": f"model.layers.{i - first}." for i in range(first, last)}
    tensors = {}
    for name, tensor in state.items():
        prefix = ".".join(name.split(".")[:3]) + "."
        if prefix in kept:
            tensors[kept[prefix] + name.removeprefix(prefix)] = tensor
        elif not name.startswith("model.layers."):
            tensors[name] = tensor
    changes: dict[str, Any] = {"num_hidden_layers": last - first}
    for name in ("layer_types", "mlp_layer_types", "no_rope_layers"):
        if (values := getattr(config, name)) is not None:
            changes[name] = values[first:last]
    if "sliding_attention" not in changes["layer_types"]:
        changes["sliding_window"] = None
    return config.replace(**changes), tensors


@torch.no_grad()
def entering_states(config: MoEConfig, state: State, layer: int, ids: torch.Tensor) -> torch.Tensor:
    """Returns the states (N, S, H) that enter a layer of a dense model, for sequences (N, S)."""
    model = load_state(*cut(config, state, 0, layer))
    seen: list[torch.Tensor] = []
    model.model.norm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    for rows in tqdm(ids.split(max(1, 1024 // ids.shape[1])), desc="states"):
        model.model(input_ids=rows, use_cache=False)
    return torch.cat(seen)


def tail_model(config: MoEConfig, state: State, layer: int, kept: torch.Tensor) -> tuple[MoEConfig, State]:
    """Returns a dense model of the layers from `layer` on, which reads states and has the vocabulary `kept` (V,)."""
    config, state = cut(config, state, layer, config.num_hidden_layers)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in state:
            state[name] = LazyTensor.of(state[name].read()[kept])
    changes = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    # the states already include the embedding multiplier
    changes |= {"vocab_size": len(kept), "embedding_multiplier": 1.0}
    return config.replace(**changes), state


def shuffled(count: int, size: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Yields indices (size,) without end; all `count` indices come in random order before any comes again."""
    order = torch.empty(0, dtype=torch.long)
    while True:
        while len(order) < size:
            order = torch.cat([order, torch.randperm(count, generator=generator)])
        yield order[:size]
        order = order[size:]


def positions(rows: int, length: int, facts_per_row: int) -> torch.Tensor:
    """Returns positions (rows, S) that restart at each fact, so that facts do not attend to each other."""
    return torch.arange(length // facts_per_row).repeat(rows, facts_per_row)
