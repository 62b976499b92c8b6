# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module keeps an exponential moving average of the routers, and uses it in the evaluations of a `Trainer`."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn
from transformers import Trainer, TrainerCallback

from ..utils.errors import UserError
from .resume_state import read_tensors
from .roles import parameter_roles


AVERAGE_FILE = "router_average.pt"


class RouterAverage:
    """The moving average of all trained parameters of the routers, in float32: A <- decay A + (1 - decay) W after each step.

    The average begins with the weights that the routers have.

    Args:
        model: any MoE of transformers, also with an adapter, in DDP or FSDP2.
        decay: a number from 0 to below 1.

    Raises:
        UserError: if the decay is out of range, or no router is trained.

    Example:
        >>> average = RouterAverage(model, decay=0.999)
        >>> for batch in batches:
        ...     model(**batch).loss.backward()
        ...     optimizer.step()
        ...     average.update()
        >>> with average.applied():
        ...     evaluate(model)
    """

    def __init__(self, model: nn.Module, decay: float):
        if not 0 <= decay < 1:
            raise UserError(f"router_average is {decay}: it must be at least 0 and below 1")
        roles = parameter_roles(model)
        self._weights = {
            name: parameter
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and roles[name] == "router"
        }
        if not self._weights:
            raise UserError("router_average has no effect: the model trains no router")
        self._model, self._decay, self._is_applied = model, decay, False
        self._average = {name: weight.detach().float().clone() for name, weight in self._weights.items()}
        self._move = get_ema_multi_avg_fn(decay)

    @torch.no_grad()
    def update(self) -> None:
        """Moves the average towards the weights; call it after each optimizer step."""
        self._move(list(self._average.values()), [weight.detach().float() for weight in self._weights.values()], 0)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Gives the model the averaged routers inside the block, and the trained ones afterwards, bit for bit."""
        if self._is_applied:
            yield
            return
        trained = {name: weight.detach().clone() for name, weight in self._weights.items()}
        self._put(self._average)
        self._is_applied = True
        try:
            yield
        finally:
            self._put(trained)
            self._is_applied = False

    @torch.no_grad()
    def _put(self, values: dict[str, torch.Tensor]) -> None:
        for module in self._model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # FSDP2 may hold gathered weights from the last pass
        for name, weight in self._weights.items():
            weight.copy_(values[name])

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Returns the whole average by the names of the parameters; under FSDP2 all processes must call it."""
        return {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in self._average.items()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Takes the result of [`RouterAverage.state_dict`].

        Raises:
            UserError: if the average is that of other routers.
        """
        for name, average in self._average.items():
            saved = state.get(name)
            if (
                not isinstance(saved, torch.Tensor)
                or saved.shape != average.shape
                or state.keys() != self._average.keys()
            ):
                raise UserError(f"the saved average is that of other routers: {name} is missing or has another shape")
            if isinstance(average, DTensor):
                saved = distribute_tensor(saved.to(average.device), average.device_mesh, average.placements)
            average.copy_(saved)


class _Follow(TrainerCallback):
    """Makes the average when training begins, and updates it after each optimizer step."""

    def __init__(self, trainer: "RouterAverageMixin"):
        self._trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        """Makes the average, or reads that of the checkpoint."""
        self._trainer.begin_average(kwargs["model"])

    def on_step_end(self, args, state, control, **kwargs):
        """Updates the average."""
        assert self._trainer.router_average is not None  # `on_train_begin` makes it
        self._trainer.router_average.update()


class RouterAverageMixin(Trainer):
    """Evaluates with averaged routers, and keeps the average in checkpoints; put it before another `Trainer` class.

    Call [`RouterAverageMixin.average_routers`] before `train`. The checkpoints' weights are the trained ones, and
    `router_average.pt` in a checkpoint is the average, which a resumed run and `load_best_model_at_end` read.

    Attributes:
        router_average: the average; None before training, and if none is kept.

    Example:
        >>> class MyTrainer(RouterAverageMixin, SFTTrainer):
        ...     pass
        >>> trainer = MyTrainer(model=model, args=args, train_dataset=dataset)
        >>> trainer.average_routers(0.999)
        >>> trainer.train()
    """

    router_average: RouterAverage | None = None
    _router_decay: float | None = None
    _average_from: str | None = None

    def average_routers(self, decay: float) -> None:
        """Keeps an average of the routers in training; a later call replaces the decay of an earlier one.

        [`RouterAverage`] describes the argument and the errors.
        """
        assert self.model is not None  # `Trainer` has a model unless it is given `model_init`
        RouterAverage(self.model, decay)
        if self._router_decay is None:
            self.add_callback(_Follow(self))
        self._router_decay = decay

    def begin_average(self, model: nn.Module) -> None:
        """Makes the average of a model whose training begins."""
        assert self._router_decay is not None  # only the callback of `average_routers` calls this method
        self.router_average = RouterAverage(model, self._router_decay)
        if self._average_from is not None:
            self.router_average.load_state_dict(_read(self._average_from))

    def averaged(self) -> Any:
        """Returns a context in which the model has the averaged routers, if an average is kept."""
        return nullcontext() if self.router_average is None else self.router_average.applied()

    def evaluation_loop(self, *args, **kwargs):
        """Evaluates or predicts with the averaged routers."""
        with self.averaged():
            return super().evaluation_loop(*args, **kwargs)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.router_average is not None:
            state = self.router_average.state_dict()
            if self.args.should_save:
                torch.save(state, Path(output_dir) / AVERAGE_FILE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and self._router_decay is not None:
            _read(checkpoint)
        self._average_from = checkpoint
        super()._load_optimizer_and_scheduler(checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if self.router_average is not None:
            self.router_average.load_state_dict(_read(str(self.state.best_model_checkpoint)))


def _read(checkpoint: str) -> dict[str, torch.Tensor]:
    if not (Path(checkpoint) / AVERAGE_FILE).is_file():
        raise UserError(f"{checkpoint} holds no average of the routers: omit router_average, as the first run did")
    return read_tensors(Path(checkpoint) / AVERAGE_FILE)
