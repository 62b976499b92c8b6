# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module compares an export, loaded by transformers alone, with the model that it was made from."""

import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file

from ..utils.clean_process import tensor_from_clean_process
from ..utils.errors import UserError
from ..utils.loading import load_model
from .verification import refuse_unusable


# largest difference of logits in fp32, as a share of the largest logit (or of 1), that the order of sums can explain
TOLERANCE = 1e-3
# largest share where the conversion rounded weights, in steps of their dtype
ROUNDED_STEPS = 16
PLAIN_TRANSFORMERS = """
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
folder, ids, output = sys.argv[1:]
model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
wrong = {kind: sorted(map(str, names)) for kind, names in info.items() if names}
if wrong:
    sys.exit(f"transformers does not find the tensors that it expects: {wrong}")
with torch.no_grad():
    torch.save(model.eval()(load_file(ids)["ids"]).logits, output)
"""


class PlainComparison(NamedTuple):
    """The comparison of a source and of an export that transformers loaded without this package.

    Attributes:
        largest_difference: largest absolute difference of two logits; both models compute in fp32.
        tolerance: largest difference that rounding explains.
    """

    largest_difference: float
    tolerance: float


@torch.no_grad()
def compare_in_plain_transformers(
    source: str | Path,
    result: str | Path,
    input_ids: torch.Tensor,
    gguf_file: str | None = None,
    rounded_dtype: torch.dtype | None = None,
    *,
    trust_remote_code: bool = False,
) -> PlainComparison:
    """Loads an export in a process that cannot import this package, and compares it with the source on a text.

    Args:
        source: folder or Hub name of the source, which is loaded as its family or this package computes it.
        result: folder of the export.
        input_ids: token ids, int64 of shape (1, S).
        gguf_file: name of the GGUF file in the source's folder, if it is one.
        rounded_dtype: dtype of the export's weights if the conversion rounded them; None if it rounded nothing.
        trust_remote_code: whether code that the source brings may run.

    Raises:
        UserError: if transformers alone does not load the export whole, a weight or logit is not finite, or the logits differ
            by more than rounding explains.
    """
    model = load_model(str(source), gguf_file, "float32", trust_remote_code=trust_remote_code).eval()
    refuse_unusable(model, input_ids, source)
    expected = model(input_ids).logits.float()
    del model
    with tempfile.TemporaryDirectory() as temporary:
        ids = Path(temporary) / "ids.safetensors"
        save_file({"ids": input_ids}, ids)
        got = tensor_from_clean_process(
            PLAIN_TRANSFORMERS,
            Path(result).resolve(),
            ids,
            failure=f"{result} does not load in transformers without this package: {{cause}}",
        )
    share = TOLERANCE if rounded_dtype is None else max(TOLERANCE, ROUNDED_STEPS * torch.finfo(rounded_dtype).eps)
    compared = PlainComparison((got - expected).abs().max().item(), share * max(1.0, expected.abs().max().item()))
    # a NaN is not below the tolerance either
    if not compared.largest_difference <= compared.tolerance:
        raise UserError(
            f"transformers computes other logits from the export: they differ by {compared.largest_difference:.1e}, and "
            f"rounding explains {compared.tolerance:.1e}; nothing was written, please report this"
        )
    return compared
