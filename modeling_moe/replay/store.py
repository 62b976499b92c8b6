# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module keeps the experts that the tokens of texts chose, and finds them again by the token ids of a text.

A trainer shuffles, pads, packs and splits the texts of a rollout before it trains on them. The token ids of a text stay what
they are, so that they are the key.

# S tokens of a text, L sparse layers, K experts per token
"""

from collections import OrderedDict
from hashlib import blake2b
from typing import Any, NamedTuple

import torch
from torch import nn

from .vllm_outputs import texts_of_output


NOT_RECORDED = -1


class _Text(NamedTuple):
    """A text: token ids (S,), the experts (S', L, K) of its first S' tokens, and how many texts were added before."""

    ids: torch.Tensor
    experts: torch.Tensor
    number: int

    @property
    def nbytes(self) -> int:
        return self.ids.nbytes + self.experts.nbytes


class RoutingStore:
    """Keeps the experts of texts in the memory of the CPU, and forgets the oldest texts beyond a limit.

    Args:
        max_bytes: the most bytes that the texts may take together.

    Raises:
        ValueError: for a limit below 1.
    """

    def __init__(self, max_bytes: int = 2**31):
        if max_bytes < 1:
            raise ValueError(f"max_bytes is {max_bytes}: give at least 1")
        self.max_bytes, self.nbytes = max_bytes, 0
        self._added = 0
        # the oldest text comes first
        self._texts: OrderedDict[bytes, _Text] = OrderedDict()
        # digest of the first 1, 2, 4, 8, ... tokens of a text -> keys of the texts that begin so: the texts of a training share
        # a long beginning, such as that of a chat template
        self._buckets: dict[bytes, dict[bytes, None]] = {}

    def __len__(self) -> int:
        return len(self._texts)

    def clear(self) -> None:
        """Forgets all texts."""
        self._texts.clear()
        self._buckets.clear()
        self.nbytes = 0

    def add(self, ids: torch.Tensor, experts: torch.Tensor) -> None:
        """Keeps the experts of a text; an equal text is replaced.

        Args:
            ids: (S,) integer token ids of prompt and answer, without padding.
            experts: (S', L, K) integer ids of the experts of the first S' <= S tokens, in the order of the model's sparse
                layers; -1 where nothing was recorded, and in the columns that a layer with fewer experts of a token lacks.

        Raises:
            ValueError: if the shapes do not fit.
        """
        if ids.dim() != 1 or experts.dim() != 3 or len(experts) > len(ids):
            raise ValueError(
                f"ids {tuple(ids.shape)} and experts {tuple(experts.shape)} must be (S,) and (S', L, K) with S' <= S"
            )
        if not len(ids):
            return
        ids = ids.detach().to("cpu", torch.int64).contiguous()
        # in 16 bits, unless a layer has more experts
        dtype = torch.int32 if experts.numel() and experts.max() >= 2**15 else torch.int16
        text = _Text(ids, experts.detach().to("cpu", dtype).contiguous(), self._added)
        self._added += 1
        key = _key(ids)
        self._forget(key)
        self._texts[key] = text
        for bucket in _buckets(ids):
            self._buckets.setdefault(bucket, {})[key] = None
        self.nbytes += text.nbytes
        while self.nbytes > self.max_bytes and len(self._texts) > 1:
            self._forget(next(iter(self._texts)))

    def add_output(self, output: Any, model: nn.Module) -> None:
        """Keeps the experts of each answer to a prompt that vLLM has generated with `enable_return_routed_experts=True`.

        Args:
            output: a `RequestOutput` of vLLM.
            model: the model that will be trained, or one with the same sparse layers.

        Raises:
            ValueError: if vLLM returned no experts, or experts of other tokens or of another model.

        Example:
            >>> store = RoutingStore()
            >>> for output in LLM(path, enable_return_routed_experts=True).generate(prompts):
            ...     store.add_output(output, model)
        """
        for ids, experts in list(texts_of_output(output, model)):
            self.add(ids, experts)

    def _forget(self, key: bytes) -> None:
        text = self._texts.pop(key, None)
        if text is None:
            return
        self.nbytes -= text.nbytes
        for bucket in _buckets(text.ids):
            del self._buckets[bucket][key]
            if not self._buckets[bucket]:
                del self._buckets[bucket]

    def find(self, ids: torch.Tensor) -> torch.Tensor | None:
        """Returns the experts (S', L, K) of the text that agrees longest with `ids` (S,); None if no text agrees.

        A text agrees if it begins with `ids`, or `ids` begin with it: a generation goes on with padding where the trainer has
        cut the text, and the last token of an answer was never an input. That token decides nothing, so that of two texts
        which agree on all tokens before it the newer one is returned.
        """
        ids = ids.detach().to("cpu", torch.int64).contiguous()
        decides = max(len(ids) - 1, 1)
        best, rank = None, (0, 0)
        buckets = _buckets(ids[:decides])
        for level, bucket in reversed(list(enumerate(buckets))):
            for key in self._buckets.get(bucket, ()):
                text = self._texts[key]
                if level + 1 < len(buckets) and len(text.ids) >= 2 ** (level + 1):
                    continue  # it does not agree, or the bucket of more tokens would hold it
                shared = min(len(text.ids), len(ids))
                own = (min(shared, decides), text.number)
                if own >= rank and torch.equal(text.ids[:shared], ids[:shared]):
                    best, rank = text, own
            if best is not None:
                break  # texts of the buckets of fewer tokens agree on fewer tokens
        return None if best is None else best.experts[: len(ids)]


def _digest(tokens: bytes) -> bytes:
    return blake2b(tokens, digest_size=16).digest()


def _key(ids: torch.Tensor) -> bytes:
    return _digest(ids.numpy().tobytes())


def _buckets(ids: torch.Tensor) -> list[bytes]:
    """Returns the digests of the first 1, 2, 4, 8, ... of the tokens (S,) int64."""
    tokens = ids.numpy().tobytes()
    return [_digest(tokens[: ids.itemsize * 2**level]) for level in range(len(ids).bit_length())]
