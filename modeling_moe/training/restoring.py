# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module lets `load_state_dict` take the names and tensors of a checkpoint on disk, whole or shard by shard.

transformers saves the experts of most models as one tensor per expert and renames some routers. Only `from_pretrained`
undoes both. A `Trainer` resumes, and loads its best checkpoint, by `load_state_dict(strict=False)`, which would keep
the experts and routers that the model has.
"""

import logging
from collections.abc import Collection

from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from ..checkpoint_damage import CheckpointError
from ..utils.disk_names import DiskNames, Tensors


TRAINER_LOGGER = logging.getLogger("transformers.trainer")
REPORTS = ("There were missing keys", "There were unexpected keys")


class RestoringError(CheckpointError):
    """A checkpoint lacks tensors of a model; the message names one of them."""


class DiskLayout(DiskNames):
    """Maps tensors on disk, as a model saves them, to the tensors of the model.

    Attributes:
        groups: for each tensor of the model, or the first of several that are converted together, the names on disk.

    Raises:
        RestoringError: if the conversions do not give the model's tensors back.
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__(model)
        saved: Tensors = dict(revert_weight_conversion(model, self.own))
        self.saved_places = self.places(saved)
        self.groups: dict[str, set[str]] = {}
        for name, place in self.saved_places.items():
            self.groups.setdefault(place.target, set()).add(name)
        made = {name: tensor.shape for name, tensor in self.convert(model, saved, self.saved_places).items()}
        if made != {name: tensor.shape for name, tensor in self.own.items()}:
            raise RestoringError(f"the checkpoint names of {type(model).__name__} cannot be converted back")

    @property
    def names(self) -> Collection[str]:
        """All names on disk."""
        return self.saved_places.keys()


class RestoreHook:
    """Converts the tensors that `load_state_dict` receives from names on disk, and remembers which tensors were
    loaded.

    Experts of one layer in several shards wait until the last shard arrives. Names of the model itself pass unchanged.
    """

    def __init__(self):
        self._layout: DiskLayout | None = None
        self._waiting: Tensors = {}
        self._own: set[str] = set()
        self._taken: set[str] = set()
        self._tied: dict[str, str] = {}

    def __call__(self, model: PreTrainedModel, state_dict: Tensors, prefix: str, *_) -> None:
        """Replaces tensors on disk by tensors of the model, in `state_dict`.

        Raises:
            RestoringError: if transformers' conversions cannot be undone for the class of the model.
        """
        given = {name.removeprefix(prefix): name for name in state_dict if name.startswith(prefix)}
        self._own, self._tied = set(model.state_dict()), dict(model.all_tied_weights_keys)
        TRAINER_LOGGER.addFilter(self.quiet)  # the logger ignores a filter that it has
        if not self._own >= given.keys():
            self._layout = self._layout or self._read_layout(model)
            # unknown names stay, so that torch reports them
            self._waiting |= {name: state_dict.pop(given[name]) for name in given if name in self._layout.names}
            whole = [names for names in self._layout.groups.values() if names <= self._waiting.keys()]
            saved = {name: self._waiting.pop(name) for names in whole for name in names}
            made = self._layout.convert(model, saved, self._layout.saved_places)
            state_dict |= {prefix + name: tensor for name, tensor in made.items()}
        for alias, source in self._tied.items():
            if prefix + source in state_dict:
                state_dict.setdefault(prefix + alias, state_dict[prefix + source])
        self._taken |= {name.removeprefix(prefix) for name in state_dict if name.startswith(prefix)} & self._own

    def _read_layout(self, model: PreTrainedModel) -> DiskLayout:
        try:
            return DiskLayout(model)
        except Exception as error:
            raise RestoringError(
                f"{type(model).__name__}: the names of the checkpoint cannot be turned into the model's ({error}), and a "
                "resumed run would go on with other experts: load the model itself from the checkpoint, and train it anew"
            ) from error

    def quiet(self, record: logging.LogRecord) -> bool:
        """Returns whether to show a log record of the trainer, which reports missing keys for each shard alone."""
        return bool(self._missing()) or not record.getMessage().startswith(REPORTS)

    def _missing(self) -> list[str]:
        return sorted(self._own - self._taken - self._tied.keys())

    def finish(self, whole: bool) -> None:
        """Checks that the loaded checkpoint was complete, and forgets what was loaded.

        Args:
            whole: whether a whole checkpoint was loaded; a user may load a part.

        Raises:
            RestoringError: if a checkpoint had some tensors of the model and lacked others.
        """
        TRAINER_LOGGER.removeFilter(self.quiet)
        waiting, missing, taken = sorted(self._waiting), self._missing(), bool(self._taken)
        self._waiting, self._taken = {}, set()
        if waiting or (whole and taken and missing):
            lack = f"it has {waiting[0]} and lacks others of these experts" if waiting else f"it lacks {missing[0]}"
            raise RestoringError(
                f"the loaded checkpoint is not complete: {lack}: restore the file, or resume from another checkpoint"
            )


def _has_experts(model: PreTrainedModel) -> bool:
    return any(name.rpartition(".")[2] == "experts" for name, _ in model.named_modules())


def restore_hook(model: object) -> RestoreHook | None:
    """Returns the [`RestoreHook`] of a model, or None."""
    hooks = getattr(model, "_load_state_dict_pre_hooks", {}).values()
    return next((hook.hook for hook in hooks if isinstance(hook.hook, RestoreHook)), None)


def load_from_disk_names(model: object) -> RestoreHook | None:
    """Lets `model.load_state_dict` take the names on disk, if the model is a transformers model with experts.

    Returns:
        The model's hook, new or existing; None for every other model, including PEFT models, which load adapters.
    """
    if not isinstance(model, PreTrainedModel) or not _has_experts(model):
        return None
    if restore_hook(model) is None:
        model.register_load_state_dict_pre_hook(RestoreHook())
    return restore_hook(model)
