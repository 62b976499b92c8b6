"""The random reports on which the page is tested have the fields, types and shapes of a real trace."""

from dataclasses import fields, is_dataclass

import datasets
import numpy as np
import torch

from modeling_moe.monitoring.report import TraceOptions, trace_routing
from tests.builders import tiny_model, train_tokenizer
from tests.monitoring.synthetic_report import synthetic_report


def check_alike(real, synthetic, path="model"):
    """Compares types, and of arrays the dtype's kind and the number of dimensions, down to the last field."""
    if is_dataclass(real):
        assert type(real) is type(synthetic), path
        for field in fields(real):
            check_alike(getattr(real, field.name), getattr(synthetic, field.name), f"{path}.{field.name}")
    elif isinstance(real, np.ndarray):
        assert (real.dtype.kind, real.ndim) == (synthetic.dtype.kind, synthetic.ndim), path
    elif isinstance(real, list | tuple) and real and synthetic:
        check_alike(real[0], synthetic[0], f"{path}[0]")
    else:
        assert type(real) is type(synthetic), path


def test_a_synthetic_report_is_built_like_a_real_trace():
    tokenizer, random = train_tokenizer(), torch.Generator().manual_seed(0)
    blocks = torch.randint(3, 60, (6, 40), generator=random).tolist()
    rows = {name: datasets.Dataset.from_dict({"input_ids": blocks[half::2]}) for half, name in enumerate("ab")}
    options = TraceOptions(texts=1, text_tokens=16)
    real = trace_routing(tiny_model(num_experts_per_tok=2), tokenizer, rows, "tiny", options).trace
    assert real.layers[0].top_tokens[0]
    check_alike(real, synthetic_report(layers=2, experts=5, domains=2, texts=1).models[0])
    layer, text = real.layers[0], real.texts[0]
    assert layer.load.shape == layer.specialisation.shape == layer.significant.shape == (2, 5)
    assert layer.position.shape == (len(real.position_edges) - 1, 5)
    assert real.position_edges == [0, 1, 2, 4, 8, 16, 32, 40]
    assert [path.shape for path in real.paths] == [(5, 5)]
    assert (text.index.shape, text.weight.shape, text.margin.shape) == ((2, 16, 2), (2, 16, 2), (2, 16))
    assert set(real.losses) == set(real.tokens) == set(real.domains) == {"a", "b"}
