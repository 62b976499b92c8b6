# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module trains each matrix of each expert by torch's Muon, and what is no matrix by AdamW.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/; Liu et al., arXiv:2502.16982) replaces the momentum of a
matrix by the nearest orthogonal matrix. The experts of a layer lie in one tensor: each expert is orthogonalised alone, and so
are the gate and the up projection in `gate_up_proj`.

# E experts, O outputs of a matrix, I inputs of a matrix
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.optim import AdamW, Optimizer
from torch.optim._muon import DEFAULT_A, DEFAULT_B, DEFAULT_C, DEFAULT_NS_STEPS, EPS, _adjust_lr
from torch.optim.adamw import adamw

from ..utils.errors import UserError
from .roles import parameter_groups, routed_layers


# layout of a stored tensor -> function that views the tensor as matrices (..., O, I)
LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "matrix": lambda tensor: tensor,
    "experts": lambda tensor: tensor,
    "experts_transposed": lambda tensor: tensor.mT,
    "gate_up": lambda tensor: tensor.unflatten(-2, (2, -1)),
    "gate_up_transposed": lambda tensor: tensor.mT.unflatten(-2, (2, -1)),
    "interleaved": lambda tensor: tensor.unflatten(-2, (-1, 2)).transpose(-3, -2),
    "interleaved_transposed": lambda tensor: tensor.mT.unflatten(-2, (-1, 2)).transpose(-3, -2),
}


def matrix_layouts(model: nn.Module) -> dict[int, str]:
    """Returns the layout of each matrix of linear layers and experts, a key of [`LAYOUTS`], by the id of the parameter.

    A linear layer `gate_up_proj` holds two matrices, as experts of that name do.
    """
    layouts = {
        id(module.weight): "gate_up" if name.rpartition(".")[2] == "gate_up_proj" else "matrix"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and min(module.weight.shape) > 1
    }
    for layer in routed_layers(model):
        experts: Any = layer.experts
        ending = "_transposed" if experts.is_transposed else ""
        fused = "gate_up" if getattr(experts, "is_concatenated", True) else "interleaved"
        for name, parameter in experts.named_parameters(recurse=False):
            if parameter.dim() == 3:
                kind = fused if name == "gate_up_proj" and experts.has_gate else "experts"
                layouts[id(parameter)] = kind + ending
    return layouts


def orthogonalise(
    matrices: torch.Tensor,
    coefficients: tuple[float, float, float] = (DEFAULT_A, DEFAULT_B, DEFAULT_C),
    steps: int = DEFAULT_NS_STEPS,
    eps: float = EPS,
) -> torch.Tensor:
    """Returns torch's Newton-Schulz iteration of each matrix, all at once: `torch.optim.Muon` takes one matrix a call.

    The results equal those of torch's function bit for bit on CPUs.

    Args:
        matrices: (..., O, I), of any dtype.
        coefficients: a, b and c of the polynomial a x + b x^3 + c x^5.
        steps: number of iterations.
        eps: least norm to divide by.

    Returns:
        (..., O, I) in bfloat16; the singular values of each matrix lie near 1.
    """
    a, b, c = coefficients
    # contiguous, so that a norm is summed in one order however the matrices are stored
    x = matrices.to(torch.bfloat16).contiguous().reshape(matrices.shape[:-2].numel(), *matrices.shape[-2:])
    is_tall = x.shape[-2] > x.shape[-1]
    x = x.mT if is_tall else x
    # torch divides in place, and so changes the momentum of weights in bfloat16 if it has no Nesterov step
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if is_tall else x).reshape(matrices.shape)


def _is_whole(parameter: torch.Tensor) -> bool:
    """Returns whether this process holds whole matrices of a tensor, of which a process mesh may divide the experts."""
    if not isinstance(parameter, DTensor):
        return True
    return all(
        placement.is_replicate() or (type(placement) is Shard and placement.dim == 0 and parameter.dim() == 3)
        for placement in parameter.placements
    )


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class MoEMuon(AdamW):
    """Muon on the groups that have a `layout`, and AdamW on the others; [`moe_muon`] makes the groups of a model.

    Muon's momentum, Nesterov step, weight decay and factor on the learning rate are those of `torch.optim.Muon` on each matrix
    as a parameter (O, I) of its own. Under FSDP2 and expert parallelism a process steps the experts that it holds; a matrix
    that is divided over processes is gathered for the step.

    Args:
        groups: groups of parameters; the key `layout` is a key of [`LAYOUTS`], or None for AdamW.
        lr: learning rate of groups without one.
        betas, eps, weight_decay: those of AdamW; Muon has the weight decay of its group.
        momentum: Muon's momentum.
        adjust_lr_fn: `match_rms_adamw` (arXiv:2502.16982), with which AdamW's learning rate and weight decay serve Muon, or
            `original`; the factor depends on the shape (O, I).

    Raises:
        UserError: for parameters that FSDP1 or DeepSpeed has flattened.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        momentum: float = 0.95,
        adjust_lr_fn: str = "match_rms_adamw",
    ):
        for group in groups:
            for parameter in group["params"]:
                flat = group.get("layout") and parameter.dim() < 2
                if flat or hasattr(parameter, "ds_id") or hasattr(parameter, "_is_flat_param"):
                    raise UserError("Muon needs whole matrices, which FSDP1 and DeepSpeed flatten: use FSDP2 or DDP")
        super().__init__(groups, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        for name, value in {"momentum": momentum, "adjust_lr_fn": adjust_lr_fn, "layout": None}.items():
            self.defaults[name] = value
            for group in self.param_groups:
                group.setdefault(name, value)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Takes a saved state as every optimizer does; Adam's own method asks each parameter for a number of steps."""
        Optimizer.__setstate__(self, state)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Makes one optimizer step; parameters without a gradient stay as they are."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            (self._adamw_step if group["layout"] is None else self._muon_step)(group)
        return loss

    def _adamw_step(self, group: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        parameters, gradients, means, squares, largest, steps = [], [], [], [], [], []
        has_complex = self._init_group(group, parameters, gradients, means, squares, largest, steps)
        adamw(
            parameters,
            gradients,
            means,
            squares,
            largest,
            steps,
            has_complex=has_complex,
            amsgrad=group["amsgrad"],
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=group["maximize"],
        )

    def _muon_step(self, group: dict[str, Any]) -> None:
        lr, momentum, matrices_of = float(group["lr"]), group["momentum"], LAYOUTS[group["layout"]]
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(parameter.grad, memory_format=torch.preserve_format)
            weight, gradient, average = map(_local, (parameter, parameter.grad, state["momentum_buffer"]))
            average.lerp_(gradient, 1 - momentum)
            update = gradient.lerp(average, momentum)
            if _is_whole(parameter):
                matrices = matrices_of(update)
                update = orthogonalise(matrices)
                weight.mul_(1 - lr * group["weight_decay"])
                weight = matrices_of(weight)
            else:
                update = _gathered(parameter, update, matrices_of)
                weight.mul_(1 - lr * group["weight_decay"])
            shape = _matrix_shape(parameter, group["layout"])
            weight.add_(update, alpha=-_adjust_lr(lr, group["adjust_lr_fn"], shape))


def _matrix_shape(parameter: torch.Tensor, layout: str) -> torch.Size:
    """Returns the shape (O, I) of the matrices of a parameter, which processes may share."""
    return LAYOUTS[layout](torch.empty(parameter.shape, device="meta")).shape[-2:]


def _gathered(
    parameter: DTensor, update: torch.Tensor, matrices_of: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Returns this process's part of the orthogonalised update of a tensor whose matrices are divided over processes."""
    mesh, placements = parameter.device_mesh, parameter.placements
    parts = DTensor.from_local(
        update, mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
    )
    whole = parts.full_tensor()
    result = torch.empty_like(whole, dtype=torch.bfloat16)
    matrices_of(result).copy_(orthogonalise(matrices_of(whole)))
    copies = DTensor.from_local(result, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return copies.redistribute(placements=placements).to_local()


def moe_muon(
    model: nn.Module,
    learning_rate: float,
    weight_decay: float = 0.1,
    *,
    rates: Mapping[str, float | str] | None = None,
    weight_decays: Mapping[str, float] | None = None,
    **options: Any,
) -> MoEMuon:
    """Returns an optimizer for any MoE: Muon for each matrix of each expert and of linear layers, AdamW for the rest.

    AdamW trains embeddings, the head, routers, all that has one dimension, matrices of one row or column, and whatever is
    neither a linear layer nor experts.

    Args:
        model: any causal LM of transformers without an adapter, also in DDP, or divided by FSDP2.
        learning_rate: learning rate of both, as for AdamW.
        weight_decay: weight decay of both.
        rates: see [`~modeling_moe.training.parameter_groups`].
        weight_decays: see [`~modeling_moe.training.parameter_groups`].
        **options: further arguments of [`MoEMuon`].

    Raises:
        UserError: for a model with an adapter, and see [`~modeling_moe.training.parameter_groups`].

    Example:
        >>> optimizer = moe_muon(model, 2e-4, 0.1, rates={"router": 0.5})
        >>> trainer = Trainer(model=model, args=args, train_dataset=dataset, optimizers=(optimizer, None))
    """
    if any(hasattr(module, "base_layer") for module in model.modules()):
        raise UserError("Muon cannot train an adapter, whose factors are no maps of their own: use AdamW for LoRA")
    layouts, groups = matrix_layouts(model), []
    for group in parameter_groups(model, learning_rate, weight_decay, rates=rates, weight_decays=weight_decays):
        parts: dict[str | None, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            layout = None if group["role"] in ("router", "embedding") else layouts.get(id(parameter))
            parts.setdefault(layout, []).append(parameter)
        groups += [{**group, "params": parameters, "layout": layout} for layout, parameters in parts.items()]
    return MoEMuon(groups, lr=learning_rate, weight_decay=weight_decay, **options)
