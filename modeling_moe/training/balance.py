# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module balances the experts of transformers' own MoE models: by router losses, and by their selection bias.

# B rows, S tokens per row, T = B*S tokens, E experts, Z experts without weights, K choices per token
"""

import logging
from dataclasses import dataclass, replace
from typing import Any, Literal
from weakref import WeakSet

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from ..monitoring import (
    BatchFrame,
    BatchFrames,
    LayerPass,
    LossMeans,
    Observation,
    observe,
    probabilities,
    report_router_losses,
    sparse_layers,
)
from ..router import Routing, RoutingContext, expert_load
from ..router_losses import COEFFICIENTS, AttachLoss, router_losses
from ..utils.errors import UserError
from .scorings import Scorings
from .selection_bias import SelectionBias, find_bias, move_biases
from .transformers_losses import TransformersLossesOff


logger = logging.getLogger(__name__)

SCOPES = ("batch", "sequence")
NEVER_STEPPED = (
    "the selection biases did not move, because Balance.step was not called: call modeling_moe.training.enable() before you make "
    "the Trainer, give it callbacks=[MoECallback()], or call step() after each optimizer.step() of your own loop."
)


@dataclass(frozen=True)
class BalanceSettings:
    """The router losses and the step of the selection bias, by the names of [`~modeling_moe.MoEConfig`]'s fields.

    Attributes:
        router_aux_loss_coef: coefficient of the load-balancing loss, with transformers' meaning: the loss of a balanced
            layer is K.
        router_aux_loss_scope: tokens over which the load-balancing loss measures balance, "batch" or "sequence".
        router_z_loss_coef: coefficient of the z-loss.
        router_seq_aux_loss_coef: coefficient of DeepSeek-V3's balance loss of each sequence.
        router_entropy_loss_coef: coefficient of the entropy of a token's probabilities.
        router_bias_update_rate: step size of the selection bias; 0 leaves it as it is.
        num_experts: number E of the experts of one layer.

    Raises:
        UserError: for a negative number, and for another scope.
    """

    router_aux_loss_coef: float = 0.0
    router_aux_loss_scope: Literal["batch", "sequence"] = "batch"
    router_z_loss_coef: float = 0.0
    router_seq_aux_loss_coef: float = 0.0
    router_entropy_loss_coef: float = 0.0
    router_bias_update_rate: float = 0.0
    num_experts: int = 0
    # these losses need what routers of transformers do not return
    router_importance_loss_coef = 0.0
    router_load_loss_coef = 0.0
    # a token chooses among all experts of a layer at once
    router_parts = 1

    def __post_init__(self):
        for name in (*COEFFICIENTS.values(), "router_bias_update_rate"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise UserError(f"{name} is {getattr(self, name)}: choose a number of 0 or more")
        if self.router_aux_loss_scope not in SCOPES:
            raise UserError(f"router_aux_loss_scope is {self.router_aux_loss_scope!r}: choose one of {SCOPES}")

    def used(self) -> dict[str, float | str]:
        """Returns the settings that have an effect, by name."""
        names = [name for name in (*COEFFICIENTS.values(), "router_bias_update_rate") if getattr(self, name) > 0]
        scope = ["router_aux_loss_scope"] if self.router_aux_loss_coef > 0 else []
        return {name: getattr(self, name) for name in (*names, *scope)}

    @property
    def has_losses(self) -> bool:
        """Says whether any router loss has a coefficient."""
        return any(getattr(self, name) > 0 for name in COEFFICIENTS.values())


class Balance:
    """Router losses and moving selection biases on a model of transformers; [`balance`] makes one.

    A handle and a context manager: [`Balance.detach`], or the end of a `with` block, removes everything from the model but
    the values of the biases.

    Attributes:
        settings: the coefficients and the step size.
        biases: selection biases of the layers that have one; empty if the step size is 0.
        scale: factor on the router losses of a batch whose model does not get `num_items_in_batch`, such as
            1 / gradient accumulation steps.
        token_scale: factor on the router losses of a batch whose model gets `num_items_in_batch`, beside the batch's share
            of the labels; the number of ranks if DDP averages their gradients.
    """

    def __init__(self, model: nn.Module, settings: BalanceSettings):
        self.settings = settings
        self.scale = self.token_scale = 1.0
        self.biases: list[SelectionBias] = []
        self._loads: dict[str, torch.Tensor] = {}
        self._means = LossMeans(model)
        self._noted = self._stepped = False
        self._theirs: TransformersLossesOff | None = None
        self._scorings = Scorings(model) if settings.has_losses else None
        self._attach(model)
        _LIVE.add(self)

    def __enter__(self) -> "Balance":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.detach()

    def _attach(self, model: nn.Module) -> None:
        layers = sparse_layers(model)
        if self.settings.router_bias_update_rate > 0:
            self.biases = _find_biases(model)
            self._widen_biases()
            self._warn_of_adapter(model)
        self._model = model
        self._experts = {id(layer.experts) for layer in layers}
        self._frames = BatchFrames(model, [layer.name for layer in layers])
        if self._theirs is None:
            self._theirs = TransformersLossesOff(self._frames.models, self._trains)
        self._observation: Observation | None = observe(model, torch.compiler.disable(self._on_pass))

    def _widen_biases(self) -> None:
        narrow = [bias.widen() for bias in self.biases if bias.is_narrow]
        if narrow:
            logger.warning(
                f"{len(narrow)} selection biases are now float32 instead of {narrow[0]}, which would round their small steps "
                "away: load the saved model in float32 to keep them exactly."
            )

    def _warn_of_adapter(self, model: nn.Module) -> None:
        if isinstance(model, PeftModel) and not all(bias.is_in_adapter(model) for bias in self.biases):
            logger.warning(
                "the adapter does not hold the selection biases that move: merge it into the model, or name the routers in "
                "modules_to_save."
            )

    def _release(self) -> None:
        """Removes the hooks that belong to one outermost model."""
        if self._observation is not None:
            self._observation.remove()
            self._frames.remove()
            self._observation = None

    def is_on(self, model: nn.Module) -> bool:
        """Says whether the handle balances experts of a model, wrapped or not."""
        return self._observation is not None and any(id(module) in self._experts for module in model.modules())

    def follow(self, model: nn.Module) -> None:
        """Makes `model` the module that the training loop calls, for example after PEFT has put layers around the old one.

        It also gives `config.output_router_logits`, which TRL sets, its old value.
        [`~modeling_moe.training.MoECallback`] calls it when training begins.
        """
        if model is not self._model:
            self._release()
            self._attach(model)
        if self._theirs is not None:
            self._theirs.restore_config()

    def detach(self) -> None:
        """Ends the balancing and restores the model; a second call does nothing. A moved bias keeps its value.

        It warns if the model was trained and [`Balance.step`] was never called.
        """
        if self._loads and not self._stepped:
            logger.warning(NEVER_STEPPED)
        self.forget()
        self._release()
        if self._theirs is not None:
            self._theirs.restore()
            self._theirs = None
        _LIVE.discard(self)

    def _trains(self) -> bool:
        frame = self._frames.current
        return frame is not None and frame.records_gradient and self._model.training

    def _on_pass(self, event: LayerPass) -> torch.Tensor | None:
        """Counts the load of a pass, and returns the weights of the experts with the router losses attached."""
        frame = self._frames.current
        if frame is None:
            if event.recomputed and event.layer.experts.training:
                raise RuntimeError(
                    "balance() cannot tell which batch a repeated layer belongs to: checkpoint with transformers' "
                    "gradient_checkpointing_enable."
                )
            return None
        if not (frame.records_gradient and event.layer.experts.training):
            return None
        context = frame.context(event)
        event = event._replace(token_mask=context.token_mask)
        routing = _routing(event, None if self._scorings is None else self._scorings.of(event))
        if not event.recomputed:
            self._count(event, routing, context)
        return self._attach_losses(event, routing, context, frame) if self.settings.has_losses else None

    @torch.no_grad()
    def _count(self, event: LayerPass, routing: Routing, context: RoutingContext) -> None:
        """Adds the load of a pass to that of the optimizer step."""
        if event.note is not None and not self._noted:
            self._noted = True
            logger.warning(f"{event.layer.name}: {event.note}.")
        if self.settings.router_bias_update_rate > 0:
            load = expert_load(routing, context.token_mask).float()
            name = event.layer.name
            self._loads[name] = self._loads[name] + load if name in self._loads else load

    def _attach_losses(
        self, event: LayerPass, routing: Routing, context: RoutingContext, frame: BatchFrame
    ) -> torch.Tensor | None:
        settings = replace(self.settings, num_experts=event.layer.num_experts)
        weights = frame.token_weights(context, len(routing.index), routing.probs.dtype, routing.probs.device)
        losses = router_losses(routing, context, settings, weights)
        if not event.recomputed:
            self._means.add(losses._asdict())
            report_router_losses(self._model, losses._asdict())
        total = losses.weighted_sum(settings)
        if total is None or not total.requires_grad:
            return None  # the first run of reentrant checkpointing, or a model whose router and inputs are frozen
        share = frame.share()
        factor = self.scale if share is None else self.token_scale * share.to(total.device)
        return AttachLoss.apply(event.weight, total * factor / len(self._experts))

    def losses(self) -> dict[str, float]:
        """Returns each router loss by name, the mean over layers and training passes since the last call, over all ranks.

        All ranks must call it. It waits for the device, which no training pass does.

        Returns:
            Losses without their coefficients: "balance" (K in balance), "z", "sequence_balance", "entropy"; empty without
            passes or without router losses.
        """
        return self._means.read()

    def step(self) -> None:
        """Moves the selection biases by the load since the last call: call it once after each `optimizer.step()`.

        [`~modeling_moe.training.MoECallback`] calls it. All ranks must call it.
        """
        self._stepped = True
        counted = [bias for bias in self.biases if bias.layer.name in self._loads]
        if counted:
            self._widen_biases()  # a cast of the model narrows them again
            loads = [self._loads[bias.layer.name] for bias in counted]
            move_biases(counted, loads, self.settings.router_bias_update_rate)
        self.forget()

    def forget(self) -> None:
        """Forgets the load since the last step, so that the passes of an abandoned step move nothing."""
        self._loads = {}


# the handles that are attached to a model
_LIVE: WeakSet[Balance] = WeakSet()


def balance(
    model: nn.Module,
    *,
    router_aux_loss_coef: float | None = None,
    router_aux_loss_scope: Literal["batch", "sequence"] = "batch",
    router_z_loss_coef: float = 0.0,
    router_seq_aux_loss_coef: float = 0.0,
    router_entropy_loss_coef: float = 0.0,
    router_bias_update_rate: float = 0.0,
) -> Balance:
    """Trains an MoE model of transformers with this package's router losses, and moves its selection biases.

    Losses: in training each sparse layer attaches its router losses to the weights of its experts, so that they reach the
    gradient whatever loss the trainer computes, once under every checkpointing of transformers. A loss is that of one layer,
    then the mean over the layers; padding is left out. transformers' own balance loss and TRL's are switched off. The loss
    that the model returns does not contain the router losses; [`Balance.losses`] returns them.

    Bias: [`Balance.step`] moves the biases that choose experts, which transformers loads and never moves, by DeepSeek-V3's
    rule (arXiv:2408.15664). The training passes since the last step count, of all micro-batches and ranks. Checkpoints hold
    the biases as they hold weights.

    A `Trainer` needs [`~modeling_moe.training.MoECallback`], which [`~modeling_moe.training.enable`] gives to each new one:
    it scales the losses and steps the biases. Your own loop sets the handle's `scale` and calls [`Balance.step`].

    Args:
        model: any MoE model of transformers whose experts follow its experts interface, with or without adapters. Call
            `balance` before DDP wraps the model.
        router_aux_loss_coef: coefficient of the load-balancing loss; None takes that of the model's configuration, 0 if it
            has none.
        router_aux_loss_scope: tokens over which the load-balancing loss measures balance. "sequence" gives equal gradients
            for every split of a step into micro-batches and ranks; "batch" does if the parts are balanced alike.
        router_z_loss_coef: coefficient of the z-loss.
        router_seq_aux_loss_coef: coefficient of DeepSeek-V3's balance loss of each sequence.
        router_entropy_loss_coef: coefficient of the entropy of a token's probabilities.
        router_bias_update_rate: step size of the selection biases; DeepSeek-V3 used 0.001.

    Raises:
        UnreachableRouting: a ValueError, if the model is dense, or its experts cannot be reached.
        UserError: for a model of this package, a model that is balanced already, a number below 0, a bias that does not
            exist, router logits that cannot be read, and if there is nothing to do. The first training pass raises it for the
            router logits of a block that does not run alone.

    Example:
        >>> with balance(model, router_aux_loss_coef=0.01) as handle:
        ...     for batch in batches:
        ...         model(**batch).loss.backward()
        ...         optimizer.step()
        ...         handle.step()
        ...         optimizer.zero_grad()
    """
    layers = sparse_layers(model)
    if any(layer.returns_routing for layer in layers):
        raise UserError(
            f"{type(_inner(model)).__name__} trains its router losses and selection biases itself: set router_aux_loss_coef and "
            "router_bias_update_rate in its configuration"
        )
    if balances_of(model):
        raise UserError("the model is balanced already: detach the first balance")
    if router_aux_loss_coef is None:
        router_aux_loss_coef = getattr(_inner(model).config.get_text_config(), "router_aux_loss_coef", None) or 0.0
    settings = BalanceSettings(
        router_aux_loss_coef=router_aux_loss_coef,
        router_aux_loss_scope=router_aux_loss_scope,
        router_z_loss_coef=router_z_loss_coef,
        router_seq_aux_loss_coef=router_seq_aux_loss_coef,
        router_entropy_loss_coef=router_entropy_loss_coef,
        router_bias_update_rate=router_bias_update_rate,
    )
    if not settings.has_losses and router_bias_update_rate == 0:
        raise UserError("there is nothing to balance: set router_aux_loss_coef or router_bias_update_rate")
    return Balance(model, settings)


def _inner(model: nn.Module) -> Any:
    """Returns the outermost model of transformers in a module."""
    return next(module for module in model.modules() if isinstance(module, PreTrainedModel))


def balances_of(model: nn.Module) -> list[Balance]:
    """Returns the handles that balance the experts of a model, wrapped or not."""
    return [handle for handle in list(_LIVE) if handle.is_on(model)]


def _find_biases(model: nn.Module) -> list[SelectionBias]:
    """Returns the selection biases of a model's layers.

    Raises:
        UserError: if no router has one.
    """
    found = [bias for layer in sparse_layers(model) if (bias := find_bias(model, layer)) is not None]
    if not found:
        raise UserError(
            f"no router of {type(_inner(model)).__name__} has a selection bias: omit router_bias_update_rate, and set "
            "router_aux_loss_coef"
        )
    return found


def _routing(event: LayerPass, scoring: str | None) -> Routing:
    """Returns the routing of a pass, with the probabilities by a scoring function; without one they are the router logits."""
    dtype = torch.promote_types(event.weight.dtype, torch.float32)
    outputs = event.layer.num_experts if event.logits is None else event.logits.shape[-1]
    logits = event.weight.new_zeros(len(event.index), outputs) if event.logits is None else event.logits
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    probs = logits if scoring is None else probabilities(logits, scoring)
    return Routing(logits, event.weight.detach().to(dtype), event.index.long(), probs)
