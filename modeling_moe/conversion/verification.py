# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""Source and result of a conversion, run on the same text."""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from ..utils.loading import load_model, load_tokenizer


VERIFICATION_TEXT = (
    "A mixture of experts sends each token through a few of many small networks. A router decides which. At first all "
    "of them are the same, so the model writes what the dense one would have written; training then tells them apart."
)


@dataclass(frozen=True)
class Verification:
    """Source and result on the same text.

    Attributes:
        source_loss: of the source, nats per token.
        result_loss: of the result, nats per token.
        largest_difference: between any two of their logits, compared in fp32.
        router_spread: of the result's sparse layers the least and the largest share of the tokens that one expert has,
            times the number of experts: (1, 1) is balance. None for a result without sparse layers of this package.
    """

    source_loss: float
    result_loss: float
    largest_difference: float
    router_spread: tuple[float, float] | None

    def rows(self) -> list[tuple[str, str]]:
        """Titles and texts of a table."""
        rows = [
            ("loss, source and result", f"{self.source_loss:.4f}, {self.result_loss:.4f}"),
            ("largest logit difference", f"{self.largest_difference:.1e}"),
        ]
        if self.router_spread is not None:
            least, most = self.router_spread
            rows.append(("tokens of an expert", f"{least:.2f} to {most:.2f} times its share"))
        return rows


@torch.no_grad()
def _run(model: PreTrainedModel, input_ids: torch.Tensor) -> tuple[float, torch.Tensor, tuple[float, float] | None]:
    wanted = {"output_router_logits": True} if hasattr(model, "update_routers") else {}
    output = model.eval()(input_ids, labels=input_ids, **wanted)
    load = getattr(output, "expert_load", None)
    spread = None
    if load is not None:
        share = load.float() / load.float().mean(dim=-1, keepdim=True)
        spread = (share.min().item(), share.max().item())
    return output.loss.item(), output.logits.float(), spread


def verify(
    source: str | Path,
    result: str | Path,
    gguf_file: str | None = None,
    dtype: str = "auto",
    text: str = VERIFICATION_TEXT,
) -> Verification:
    """Loads two checkpoints, one after the other, and compares them on a text.

    Args:
        source: folder or Hub name of the source, with its tokenizer.
        result: folder of what was made from it.
        gguf_file: name of the GGUF file in the source's folder.
        dtype: in which the source is loaded: the result's.
        text: what they read, up to 512 tokens of it.

    Raises:
        UserError: if one of them cannot be loaded.
    """
    tokenizer = load_tokenizer(str(source), gguf_file)
    input_ids = tokenizer(text, return_tensors="pt").input_ids[:, :512]
    source_loss, expected, _ = _run(load_model(str(source), gguf_file, dtype), input_ids)
    result_loss, got, spread = _run(load_model(str(result)), input_ids)
    return Verification(source_loss, result_loss, (expected - got).abs().max().item(), spread)
