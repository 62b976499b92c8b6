# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module finds the experts classes of the installed transformers and writes which of them the operator computes.

    python -m moe_benchmark.experts_classes docs/experts-classes.md

A class is found by what transformers' decorator `use_experts_implementation` leaves on it.
"""

import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig

from modeling_moe.dispatch.backends.native.structures import NATIVE_ACTIVATIONS
from modeling_moe.dispatch.interface import activation_of, reason_unsupported


MODELS = Path(transformers.__file__).parent / "models"
DECORATOR = "@use_experts_implementation"
# part of a field's name -> its small value; the sizes differ so that a transposed matrix does not pass for another
SIZES = {
    "num_": 8,
    "experts": 8,
    "intermediate": 24,
    "ffn": 24,
    "hidden_size": 32,
    "hidden_dim": 32,
    "latent_size": 32,
}


class Sources(NamedTuple):
    """Sources holds modelling files of transformers by what they say of their experts.

    Attributes:
        decorated: folders of models with classes on the experts interface.
        others: names of experts classes that are not on the interface, with the folder before a dot.
    """

    decorated: list[str]
    others: list[str]


def sources() -> Sources:
    """Reads the modelling files of the installed transformers, without importing them."""
    found = Sources([], [])
    for path in sorted(MODELS.glob("*/modeling_*.py")):
        text, model = path.read_text(encoding="utf-8"), path.parent.name
        if DECORATOR in text:
            found.decorated.append(model)
        for before, name in re.findall(r"(@.*\n)?^class (\w*Experts)\(nn\.\w+\)", text, flags=re.MULTILINE):
            if DECORATOR not in before and "Shared" not in name:
                found.others.append(f"{model}.{name}")
    return found


def experts_classes(model: str) -> Iterator[type[nn.Module]]:
    """Yields the classes on the experts interface that the folder of a model defines."""
    modelling = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    for value in list(vars(modelling).values()):
        if not inspect.isclass(value) or not issubclass(value, nn.Module) or value.__module__ != modelling.__name__:
            continue
        if hasattr(value, "_apply_gate") and hasattr(value.__init__, "__wrapped__"):
            yield value


def _configs(model: str) -> Iterator[PreTrainedConfig]:
    """Yields small configurations of a model, that of its text decoder first."""
    module = importlib.import_module(f"transformers.models.{model}.configuration_{model}")
    kinds = [each for each in vars(module).values() if inspect.isclass(each) and issubclass(each, PreTrainedConfig)]
    kinds = [each for each in kinds if each.__module__ == module.__name__]
    for kind in sorted(kinds, key=lambda each: ("Text" not in each.__name__, "Vision" in each.__name__)):
        try:
            config = kind()
        except (TypeError, ValueError):  # it is made of others alone
            continue
        for name, value in list(vars(config).items()):
            size = next((size for part, size in SIZES.items() if part in name and name[0] != "_"), None)
            if size is not None and isinstance(value, list):
                setattr(config, name, [size] * len(value))
            elif size is not None and (value is None or type(value) is int):
                setattr(config, name, size)
        yield config


def build(model: str, kind: type[nn.Module]) -> Any:
    """Returns small experts of a class in float32, with random weights that reach the limits of gates.

    Raises:
        RuntimeError: if no configuration of the model suits the class.
    """
    failures = []
    for config in _configs(model):
        config._experts_implementation = "eager"
        try:
            # a second argument is the expert width
            more = len(inspect.signature(kind.__init__).parameters) - 2
            module = kind(config, *[24] * more)
        except (AttributeError, TypeError) as error:
            failures.append(f"{type(config).__name__}: {error}")
            continue
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.normal_(std=0.7)
        return module.float()
    raise RuntimeError(f"no configuration suits {kind.__name__}: {'; '.join(failures)}")


def row(model: str, kind: type[nn.Module]) -> str:
    """Returns the line of the page's table for a class."""
    module = build(model, kind)
    activation = activation_of(module)
    if activation is None:
        cells = ["transformers", f"no: {reason_unsupported(module)}"]
    else:
        constants = ", ".join(f"{constant:g}" for constant in activation.constants)
        native = "`native`, `loop`" if activation.name in NATIVE_ACTIVATIONS else "`loop`"
        cells = [
            f"{native}, `grouped_mm`, `triton`",
            f"`{activation.name}`" + (f" ({constants})" if constants else ""),
        ]
    return f"| {' | '.join([f'`{model}`', f'`{kind.__name__}`', *cells])} |\n"


PAGE = """# Experts classes

This page lists every class of transformers {version} that follows its experts interface, with the back ends that compute the
class under `experts_implementation="moe"`; LoRA on its experts needs one of them too. It is written by

```
python -m moe_benchmark.experts_classes docs/experts-classes.md
```

The last column names what the experts compute between their two matrices, a key of
`modeling_moe.dispatch.activations.ACTIVATIONS` with the constants of the default configuration; or why transformers' own
functions compute the class. `tests/dispatch/test_experts_classes.py` compares the outputs and gradients of each class with
transformers' eager loop. [Compatibility](compatibility.md#which-experts-classes-are-served) says how a gate is recognised.

| Model | Class | Computed by | Activation |
|---|---|---|---|
"""


def page() -> str:
    """Returns the page on the experts classes of the installed transformers."""
    found = sources()
    rows = [row(model, kind) for model in found.decorated for kind in experts_classes(model)]
    others = ", ".join(f"`{name}`" for name in found.others)
    text = PAGE.format(version=transformers.__version__) + "".join(rows)
    return f"{text}\nThese classes are not on the interface, and their own code computes them: {others}.\n"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(), encoding="utf-8")
