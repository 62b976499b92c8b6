# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This lets `load_state_dict` take the names and tensors of a checkpoint on disk, whole or shard by shard.

transformers saves the experts of most models as one tensor each and renames some routers, and undoes both in
`from_pretrained` alone. A `Trainer` resumes, and loads its best checkpoint, by `load_state_dict(strict=False)`, and would
go on with other experts and routers.
"""

import logging
from collections.abc import Collection
from copy import deepcopy

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from ..checkpoint_damage import CheckpointError


Tensors = dict[str, torch.Tensor]
TRAINER_LOGGER = logging.getLogger("transformers.trainer")
REPORTS = ("There were missing keys", "There were unexpected keys")


class RestoringError(CheckpointError):
    """A checkpoint that does not give a model all of its tensors; the message names one of those."""


class DiskLayout:
    """Which tensors on disk make up which tensors of a model, by transformers' own conversions.

    Attributes:
        own: the model's tensors, by name, without their data.
        groups: the names on disk that become one tensor of the model, or a few that belong together; by the first of these.

    Raises:
        RestoringError: if what the model saves does not give its tensors back.
    """

    def __init__(self, model: PreTrainedModel):
        conversions = get_model_conversion_mapping(model, add_legacy=False)
        self._renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
        self._by_pattern = {pattern: entry for entry in self._converters for pattern in entry.source_patterns}
        self._prefix = model.base_model_prefix
        self.own: Tensors = {name: tensor.to("meta") for name, tensor in model.state_dict().items()}
        saved: Tensors = dict(revert_weight_conversion(model, self.own))
        # all at once: a renaming may depend on names that lie in another shard
        self._targets = {name: self._target(name) for name in sorted(saved, key=dot_natural_key)}
        self.groups: dict[str, set[str]] = {}
        for name, (target, _) in self._targets.items():
            self.groups.setdefault(target, set()).add(name)
        made = {name: tensor.shape for name, tensor in self.convert(model, saved).items()}
        if made != {name: tensor.shape for name, tensor in self.own.items()}:
            raise RestoringError(f"what a {type(model).__name__} saves does not give its tensors back")

    @property
    def names(self) -> Collection[str]:
        """All names on disk."""
        return self._targets.keys()

    def _target(self, name: str) -> tuple[str, str | None]:
        target, pattern = rename_source_key(name, self._renamings, self._converters, self._prefix, self.own)
        return (name, None) if target not in self.own and name in self.own else (target, pattern)

    def convert(self, model: PreTrainedModel, saved: Tensors) -> Tensors:
        """The model's tensors that whole groups of tensors on disk make up."""
        made, converters = {}, {}
        # experts are stacked in the order in which they come, which must be that of their numbers
        for name in sorted(saved, key=dot_natural_key):
            target, pattern = self._targets[name]
            if pattern is None:
                made[target] = saved[name]
                continue
            converter = converters.setdefault(target, deepcopy(self._by_pattern[pattern]))
            converter.add_tensor(target, name, pattern, saved[name])
        for target, converter in converters.items():
            for name, tensor in converter.convert(target, model=model, config=model.config).items():
                made[name] = tensor[0] if isinstance(tensor, list) else tensor
        return made


class RestoreHook:
    """A hook of a model's `load_state_dict` that takes what lies on disk, and keeps account of what it has taken.

    Experts that lie in several shards wait until all are there. Names that are the model's own pass as they are.
    """

    def __init__(self):
        self._layout: DiskLayout | None = None
        self._waiting: Tensors = {}
        self._own: set[str] = set()
        self._taken: set[str] = set()
        self._tied: dict[str, str] = {}

    def __call__(self, model: PreTrainedModel, state_dict: Tensors, prefix: str, *_) -> None:
        """Replaces what lies on disk by what the model has, in `state_dict`.

        Raises:
            RestoringError: if transformers' conversions cannot be undone for the model's class.
        """
        given = {name.removeprefix(prefix): name for name in state_dict if name.startswith(prefix)}
        self._own, self._tied = set(model.state_dict()), dict(model.all_tied_weights_keys)
        TRAINER_LOGGER.addFilter(self.quiet)  # the logger adds it once
        if not self._own >= given.keys():
            self._layout = self._layout or self._read_layout(model)
            # names that nobody knows stay, for torch to report them
            self._waiting |= {name: state_dict.pop(given[name]) for name in given if name in self._layout.names}
            whole = [names for names in self._layout.groups.values() if names <= self._waiting.keys()]
            saved = {name: self._waiting.pop(name) for names in whole for name in names}
            state_dict |= {prefix + name: tensor for name, tensor in self._layout.convert(model, saved).items()}
        for alias, source in self._tied.items():
            if prefix + source in state_dict:
                state_dict.setdefault(prefix + alias, state_dict[prefix + source])
        self._taken |= {name.removeprefix(prefix) for name in state_dict if name.startswith(prefix)} & self._own

    def _read_layout(self, model: PreTrainedModel) -> DiskLayout:
        try:
            return DiskLayout(model)
        except Exception as error:
            raise RestoringError(
                f"{type(model).__name__}: its checkpoint's names cannot be turned into the model's ({error}), and a resumed "
                "run would go on with other experts: load the model itself from the checkpoint, and train it anew"
            ) from error

    def quiet(self, record: logging.LogRecord) -> bool:
        """Whether a log record of the trainer's is to be shown: of a load in shards it compares names on disk alone."""
        return bool(self._missing()) or not record.getMessage().startswith(REPORTS)

    def _missing(self) -> list[str]:
        return sorted(self._own - self._taken - self._tied.keys())

    def finish(self, whole: bool) -> None:
        """Forgets what was taken, after it has looked whether that was enough.

        Args:
            whole: whether a whole checkpoint was loaded, rather than what a user likes to load.

        Raises:
            RestoringError: if a tensor of the model was not in a checkpoint that gave others.
        """
        TRAINER_LOGGER.removeFilter(self.quiet)
        waiting, missing, taken = sorted(self._waiting), self._missing(), bool(self._taken)
        self._waiting, self._taken = {}, set()
        if waiting or (whole and taken and missing):
            lack = f"it has {waiting[0]} and lacks others of those experts" if waiting else f"it lacks {missing[0]}"
            raise RestoringError(
                f"the checkpoint that was loaded is not whole: {lack}: restore the file, or resume from another checkpoint"
            )


def _has_experts(model: PreTrainedModel) -> bool:
    return any(name.rpartition(".")[2] == "experts" for name, _ in model.named_modules())


def restore_hook(model: object) -> RestoreHook | None:
    """The [`RestoreHook`] of a model, None if it has none."""
    hooks = getattr(model, "_load_state_dict_pre_hooks", {}).values()
    return next((hook.hook for hook in hooks if isinstance(hook.hook, RestoreHook)), None)


def load_from_disk_names(model: object) -> RestoreHook | None:
    """Lets `model.load_state_dict` take the names on disk, if it is a Mixture of Experts of transformers' kind.

    Returns:
        The hook, a new one or the one that the model has; None for any other model, PEFT's included, which loads adapters.
    """
    if not isinstance(model, PreTrainedModel) or not _has_experts(model):
        return None
    if restore_hook(model) is None:
        model.register_load_state_dict_pre_hook(RestoreHook())
    return restore_hook(model)
