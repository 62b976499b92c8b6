# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""Mixture-of-Experts models for transformers.

Importing the package registers `model_type = "moe"` with AutoConfig and the AutoModel classes, and the experts'
implementations of [`~modeling_moe.dispatch`] with transformers.
"""

from typing import TYPE_CHECKING, Any

import transformers

from . import dispatch as _dispatch  # noqa: F401, registers the experts' implementations
from .compatibility import __version__
from .configuration_moe import MoEConfig
from .modeling_moe import (
    MODELS,
    MoEForCausalLM,
    MoEForQuestionAnswering,
    MoEForSequenceClassification,
    MoEForTokenClassification,
    MoEModel,
    MoEPreTrainedModel,
)
from .router import Routing
from .utils.versions import warn_of_untested


if TYPE_CHECKING:
    from .monitoring import watch


warn_of_untested()
transformers.AutoConfig.register(MoEConfig.model_type, MoEConfig, exist_ok=True)
for _model in MODELS:
    getattr(transformers, _model._auto_class).register(MoEConfig, _model, exist_ok=True)

__all__ = [
    "MoEConfig",
    "MoEForCausalLM",
    "MoEForQuestionAnswering",
    "MoEForSequenceClassification",
    "MoEForTokenClassification",
    "MoEModel",
    "MoEPreTrainedModel",
    "Routing",
    "__version__",
    "watch",
]


def __getattr__(name: str) -> Any:
    """Imports `watch` when it is first used, so that importing the package stays cheap."""
    if name == "watch":
        from .monitoring import watch

        return watch
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
