# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module maps the names of tensors on disk to the tensors of a model, by transformers' own conversions.

transformers saves the experts of most models as one tensor per expert, and renames some routers.
"""

from collections.abc import Iterable
from copy import deepcopy
from typing import NamedTuple

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key


Tensors = dict[str, torch.Tensor]


class Place(NamedTuple):
    """Says where a tensor on disk belongs in a model.

    Attributes:
        target: name of the model's tensor; of several that are converted together, the first one.
        pattern: the pattern of the name on disk by which transformers converts the tensor; None if the tensor is only
            renamed.
    """

    target: str
    pattern: str | None


class DiskNames:
    """Maps the names on disk of a checkpoint to the tensors of a model.

    Args:
        model: the model, on any device; its tensors are not read.

    Attributes:
        own: the model's tensors by name, without data.
    """

    def __init__(self, model: PreTrainedModel):
        conversions = get_model_conversion_mapping(model, add_legacy=False)
        self._renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
        self._by_pattern = {pattern: entry for entry in self._converters for pattern in entry.source_patterns}
        self._prefix = model.base_model_prefix
        self.own: Tensors = {name: tensor.to("meta") for name, tensor in model.state_dict().items()}

    def places(self, names: Iterable[str]) -> dict[str, Place]:
        """Returns where each tensor on disk belongs, in natural order of the names.

        Args:
            names: all names on disk, since a renaming may depend on other names.
        """
        return {name: self._place(name) for name in sorted(names, key=dot_natural_key)}

    def _place(self, name: str) -> Place:
        place = Place(*rename_source_key(name, self._renamings, self._converters, self._prefix, self.own))
        if place.target not in self.own and name in self.own:
            return Place(name, None)
        return place

    def convert(self, model: PreTrainedModel, saved: Tensors, places: dict[str, Place]) -> Tensors:
        """Converts complete groups of tensors on disk to tensors of the model.

        Args:
            model: the model, whose configuration some conversions read.
            saved: tensors by name on disk.
            places: the result of [`DiskNames.places`].
        """
        made, converters = {}, {}
        # the converter stacks experts in the order in which it receives them
        for name in sorted(saved, key=dot_natural_key):
            target, pattern = places[name]
            if pattern is None:
                made[target] = saved[name]
                continue
            converter = converters.setdefault(target, deepcopy(self._by_pattern[pattern]))
            converter.add_tensor(target, name, pattern, saved[name])
        for target, converter in converters.items():
            for name, tensor in converter.convert(target, model=model, config=model.config).items():
                made[name] = tensor[0] if isinstance(tensor, list) else tensor
        return made
