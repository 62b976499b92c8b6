# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module writes the routing of single tokens compactly into the page, which builds what is looked at from it.

# L sparse layers, S tokens of a text, K experts per token
"""

import base64
import json
from typing import Any

import numpy as np
from markupsafe import Markup

from ..data import LayerTrace, ModelTrace, TracedText
from .visible import ELLIPSIS, shorten, visible


# characters of a token in the text, of the start of a longer token in its tooltip, and of a context
TOKEN, TOOLTIP, CONTEXT = 40, 300, 60
TOP_TOKENS = 12


def to_json(value: Any) -> Markup:
    """Returns JSON that is safe inside a `<script type="application/json">`: ASCII without `<`, `>` and `&`."""
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def text_data(text: TracedText) -> dict[str, Any]:
    """Returns a text for the page.

    `index` is base64 of little-endian uint8 or uint16 (L, S, K), where the largest value means empty; `weight` and
    `margin` are base64 of int16 (L, S, K) and (L, S), to be multiplied by `weight_unit` and `margin_unit`; -32768 means
    that the assignment was dropped, and that the margin is not known.
    """
    layers, size, top_k = text.index.shape
    width: Any = np.uint8 if text.index.max(initial=0) < np.iinfo(np.uint8).max else np.uint16
    index = np.where(text.index < 0, np.iinfo(width).max, text.index).astype(np.dtype(width).newbyteorder("<"))
    weight, weight_unit = _quantised(text.weight)
    data: dict[str, Any] = {
        "tokens": [_cut(token, TOKEN) for token in text.tokens],
        "long": {
            place: f"{visible(token[:TOOLTIP])}{ELLIPSIS} ({len(token):,} characters)"
            for place, token in enumerate(text.tokens)
            if len(token) > TOKEN
        },
        "shape": [layers, size, top_k],
        "bytes": np.dtype(width).itemsize,
        "index": _base64(index),
        "weight": weight,
        "weight_unit": weight_unit,
        "margin": None,
        "margin_unit": 0.0,
    }
    if text.margin is not None:
        data["margin"], data["margin_unit"] = _quantised(text.margin)
    return data


def top_data(layer: LayerTrace) -> list[list[list[Any]]]:
    """Returns, for each expert, `[token, count, share, before, after]` of the tokens that it takes most."""
    return [
        [
            [
                _cut(top.token, TOKEN),
                top.count,
                round(float(top.share), 3),
                _cut(top.context[0][-CONTEXT:], CONTEXT),
                _cut(top.context[2][:CONTEXT], CONTEXT),
            ]
            for top in tops[:TOP_TOKENS]
        ]
        for tops in layer.top_tokens
    ]


def model_data(model: ModelTrace) -> dict[str, Any]:
    """Returns what the page's choices show of a model: layers (index in the model, number of experts), texts, and name."""
    return {
        "layers": [[layer.title, layer.num_experts] for layer in model.layers],
        "texts": [f"{place}: {shorten(text.domain, 40)}" for place, text in enumerate(model.texts, start=1)],
        "name": shorten(model.name, 60),
    }


def _cut(text: str, limit: int) -> str:
    """Returns the visible start of a text; the limit counts the text's own characters, whatever their symbols' length."""
    return visible(text) if len(text) <= limit else visible(text[: limit - 1]) + ELLIPSIS


def _quantised(values: np.ndarray) -> tuple[str, float]:
    """Returns base64 of int16 values and their unit: an error of at most 1/65,534 of the largest value."""
    finite = np.isfinite(values)
    most = float(abs(values[finite]).max(initial=0.0)) or 1.0
    whole = np.where(finite, np.rint(np.where(finite, values, 0) / most * 32767), -32768)
    return _base64(whole.astype("<i2")), float(f"{most / 32767:.8g}")


def _base64(values: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(values).tobytes()).decode("ascii")
