# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module loads and saves models: damaged checkpoints are refused, and the code is saved beside the weights."""

from typing import Any

from torch import nn
from transformers.modeling_utils import PreTrainedModel

from .checkpoint_code import name_own_router, own_classes, save_own_code, warn_of_other_class
from .checkpoint_damage import refuse_damaged
from .compatibility import __version__, warn_of_old_code
from .router import Router
from .router_balancing import warn_of_unused


# transformers' auto class -> class that a checkpoint's code defines for it
AUTO_MAP = {
    "AutoConfig": "configuration_moe.MoEConfig",
    "AutoModel": "modeling_moe.MoEModel",
    "AutoModelForCausalLM": "modeling_moe.MoEForCausalLM",
    "AutoModelForSequenceClassification": "modeling_moe.MoEForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_moe.MoEForTokenClassification",
    "AutoModelForQuestionAnswering": "modeling_moe.MoEForQuestionAnswering",
}


def name_code(config: Any) -> None:
    """Names in a configuration the classes and the version of the code that is saved beside the weights."""
    config.auto_map, config.code_version = dict(AUTO_MAP), __version__


class CheckpointModel(PreTrainedModel):
    """A model of transformers that loads whole checkpoints only, and saves its code."""

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *model_args: Any, output_loading_info: bool = False, **kwargs: Any
    ) -> Any:
        """Loads a checkpoint as transformers does, and refuses one that lacks a tensor or has one that nothing takes.

        A head may be new if the checkpoint was saved from a class without that head.

        Raises:
            CheckpointError: names the first tensor that is missing, of another shape, or too many.
        """
        with refuse_damaged(cls, pretrained_model_name_or_path, kwargs) as check:
            # transformers annotates the model alone, and with this option returns a pair
            loaded: Any = super().from_pretrained(
                pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
            )
            model, info = loaded
            check(model, info)
        warn_of_old_code(model.config)
        warn_of_other_class(model)
        return (model, info) if output_loading_info else model

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        """Ties weights as transformers does, and keeps the names of missing tensors, which transformers passes in loading."""
        super().tie_weights(*args, **kwargs)
        if kwargs.get("missing_keys"):
            self._missing_at_load = set(kwargs["missing_keys"])

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Saves the weights, the configuration, and the code that loads them where this package is not installed.

        Raises:
            ValueError: for `push_to_hub=True` with a custom router or model class, whose code is saved after the push.
        """
        warn_of_unused(self)
        name_code(self.config)
        own = own_classes(self)
        if not own:
            super().save_pretrained(save_directory, *args, **kwargs)
            return
        if kwargs.get("push_to_hub"):
            raise ValueError(f"{own[0].__name__} is your own code: save first, and call push_to_hub after that.")
        name_own_router(self.config)
        super().save_pretrained(save_directory, *args, **kwargs)
        if kwargs.get("is_main_process", True):
            save_own_code(self, save_directory)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """Resizes the embedding as transformers does, and tables from token ids to experts; old ids keep their experts."""
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        for module in self.modules():
            if isinstance(module, Router):
                module.resize_vocabulary(self.config.vocab_size)
        return embeddings
