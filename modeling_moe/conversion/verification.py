# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module compares the source and the result of a conversion on a text."""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from ..utils.errors import UserError
from ..utils.loading import embedding_rows, load_model, load_tokenizer


VERIFICATION_TEXT = (
    "A mixture of experts sends each token through a few of many small networks. A router decides which. At first all "
    "of them are the same, so the model writes what the dense one would have written; training then tells them apart."
)


@dataclass(frozen=True)
class Verification:
    """The comparison of source and result on one text.

    Attributes:
        source_loss: cross entropy of the source, in nats per token.
        result_loss: cross entropy of the result, in nats per token.
        largest_difference: largest absolute difference of two logits, compared in fp32.
        router_spread: least and largest share of the tokens that one expert of any sparse layer receives, times the
            number of experts: (1, 1) is perfect balance. None for a result without sparse layers of this package.
    """

    source_loss: float
    result_loss: float
    largest_difference: float
    router_spread: tuple[float, float] | None

    def rows(self) -> list[tuple[str, str]]:
        """Returns titles and texts of a table."""
        rows = [
            ("cross entropy, source and result", f"{self.source_loss:.4f}, {self.result_loss:.4f}"),
            ("largest logit difference", f"{self.largest_difference:.1e}"),
        ]
        if self.router_spread is not None:
            least, most = self.router_spread
            rows.append(("tokens of an expert", f"{least:.2f} to {most:.2f} times its share"))
        return rows


def verification_ids(
    source: str | Path,
    gguf_file: str | None = None,
    text: str = VERIFICATION_TEXT,
    trust_remote_code: bool = False,
) -> torch.Tensor:
    """Tokenises the text of a verification with the source's tokenizer.

    Args:
        source: folder or Hub name of the source.
        gguf_file: name of the GGUF file in the source's folder, if it is one.
        text: text of which up to 512 tokens are used.
        trust_remote_code: whether code that the source brings may run.

    Returns:
        Token ids, int64 of shape (1, S).

    Raises:
        UserError: if the source has no tokenizer, or the text has fewer than two tokens.
    """
    tokenizer = load_tokenizer(str(source), gguf_file, trust_remote_code=trust_remote_code)
    input_ids = tokenizer(text, return_tensors="pt").input_ids[:, :512]
    if input_ids.shape[1] < 2:
        raise UserError(
            f"the tokenizer of {source} makes fewer than 2 tokens of a text to verify on: save another tokenizer"
        )
    return input_ids


def damaged_weight(model: PreTrainedModel) -> str | None:
    """Returns the name of the first parameter with a NaN or an infinity, or None if every parameter is finite."""
    return next((name for name, weight in model.named_parameters() if not weight.isfinite().all()), None)


def refuse_unusable(model: PreTrainedModel, input_ids: torch.Tensor, name: str | Path) -> None:
    """Refuses a model that cannot compute a text of token ids (1, S).

    Raises:
        UserError: if a weight is not finite, or a token id has no embedding.
    """
    if (damaged := damaged_weight(model)) is not None:
        raise UserError(
            f"{damaged} of {name} holds NaN or infinity, so that nothing can be verified: download it again"
        )
    if (largest := input_ids.max().item()) >= (rows := embedding_rows(model)):
        raise UserError(
            f"the tokenizer has a token {largest} and {name} an embedding of {rows}: they do not belong together"
        )


class _ForwardPass(NamedTuple):
    """Cross entropy in nats per token, logits (1, S, V) in fp32, and `router_spread` of [`Verification`]."""

    loss: float
    logits: torch.Tensor
    router_spread: tuple[float, float] | None


@torch.no_grad()
def _run(model: PreTrainedModel, input_ids: torch.Tensor, name: str | Path) -> _ForwardPass:
    """Runs a model on token ids (1, S).

    Raises:
        UserError: if a weight or a logit is not finite, or a token id has no embedding.
    """
    refuse_unusable(model, input_ids, name)
    wanted = {"output_router_logits": True} if hasattr(model, "update_routers") else {}
    # the model's own loss is not used because it contains the router losses too
    output = model.eval()(input_ids, **wanted)
    logits = output.logits.float()
    if not logits.isfinite().all():
        raise UserError(f"the logits of {name} are not finite in {model.dtype}: convert it with --dtype float32")
    load = getattr(output, "expert_load", None)
    spread = None
    if load is not None:
        share = load.float() / load.float().mean(dim=-1, keepdim=True)
        spread = (share.min().item(), share.max().item())
    loss = torch.nn.functional.cross_entropy(logits[0, :-1], input_ids[0, 1:])
    return _ForwardPass(loss.item(), logits, spread)


def verify(
    source: str | Path,
    result: str | Path,
    gguf_file: str | None = None,
    dtype: str = "auto",
    text: str = VERIFICATION_TEXT,
    trust_remote_code: bool = False,
) -> Verification:
    """Loads two checkpoints, one after the other, and compares them on a text.

    Args:
        source: folder or Hub name of the source, with a tokenizer.
        result: folder of the model that was made from the source.
        gguf_file: name of the GGUF file in the source's folder, if it is one.
        dtype: dtype in which the source is loaded, which should be the result's.
        text: text of which up to 512 tokens are used.
        trust_remote_code: whether code that the source brings may run.

    Raises:
        UserError: if a model cannot be loaded, or a weight (the message names it) or a logit is not finite.
    """
    input_ids = verification_ids(source, gguf_file, text, trust_remote_code)
    model = load_model(str(source), gguf_file, dtype, trust_remote_code=trust_remote_code)
    expected = _run(model, input_ids, source)
    del model
    got = _run(load_model(str(result)), input_ids, result)
    difference = (expected.logits - got.logits).abs().max().item()
    return Verification(expected.loss, got.loss, difference, got.router_spread)
