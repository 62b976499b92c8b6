# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module records which experts each pass of a running model uses, and keeps the record as a JSON file."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from torch import nn

from ..attention_experts import attends
from ..monitoring import LayerPass, observe
from ..utils.atomic import write_text
from ..utils.json_files import read_json


@dataclass
class LayerTrace:
    """A list of the experts that each pass of one layer used.

    Attributes:
        name: qualified name of the experts module in the model.
        num_experts: number E of experts.
        passes: for each call of the layer's experts the distinct expert ids in ascending order.
    """

    name: str
    num_experts: int
    passes: list[list[int]] = field(default_factory=list)


@dataclass
class Trace:
    """A record of the experts that each sparse layer of a model used, pass by pass.

    Attributes:
        layers: traces of the layers, in the order of the model.
    """

    layers: list[LayerTrace]

    def save(self, file: str | Path) -> None:
        """Writes the trace as a JSON file, which appears whole or not at all."""
        write_text(Path(file), json.dumps(asdict(self)) + "\n")

    @classmethod
    def load(cls, file: str | Path) -> "Trace":
        """Reads a file that [`Trace.save`] has written.

        Raises:
            ValueError: if the file is damaged or is no trace.
        """
        try:
            layers = [LayerTrace(**layer) for layer in read_json(Path(file))["layers"]]
            wrong = [(layer, needed) for layer in layers for needed in layer.passes if not _is_pass(needed, layer)]
        except (KeyError, TypeError) as error:
            raise ValueError(f"{file} is no trace of experts: record one with record_trace") from error
        for layer, needed in wrong:
            raise ValueError(
                f"{file} is no trace of experts: {layer.name} has the pass {needed}, and a pass lists distinct ids below "
                f"{layer.num_experts} in ascending order"
            )
        return cls(layers)


def _is_pass(needed: list[int], layer: LayerTrace) -> bool:
    """Returns True for distinct ids of experts of the layer in ascending order."""
    return needed == sorted(set(needed)) and all(0 <= expert < layer.num_experts for expert in needed)


@contextmanager
def record_trace(model: nn.Module) -> Iterator[Trace]:
    """Records which experts each pass of any MoE uses while a `with` block runs; the experts may be offloaded.

    Example:
        >>> with record_trace(model) as trace:
        ...     model.generate(**inputs, max_new_tokens=100)
        >>> trace.save("trace.json")

    Empty assignments, experts without weights and experts inside attention are left out. Each pass waits for the device once
    per layer.

    Args:
        model: any model of transformers whose experts follow its experts interface.

    Raises:
        UnreachableRouting: if the model is dense, or its experts cannot be reached.
    """
    traces: dict[str, LayerTrace] = {}

    def record(event: LayerPass) -> None:
        if event.layer.name in traces:
            chosen = event.arrived.unique().tolist()
            traces[event.layer.name].passes.append([e for e in chosen if 0 <= e < event.layer.num_experts])

    with observe(model, record) as observation:
        layers = [layer for layer in observation.layers if not attends(layer.experts)]
        traces.update({layer.name: LayerTrace(layer.name, layer.num_experts) for layer in layers})
        yield Trace(list(traces.values()))
