# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module runs a model of any family on fake tensors, which have shapes and dtypes but no memory, to learn its costs.

The model's own code decides what is computed and kept, so a plan follows from no list of families. Attention and
experts take the operators that a CPU takes; what they keep for backward is the same on a GPU.
"""

import copy
import inspect
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from peft import get_peft_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..lora import moe_lora_config
from ..monitoring import UnreachableRouting, sparse_layers
from ..utils.errors import UserError
from .recording import CostRecorder, RunCost


Method = Literal["full", "lora", "qlora", "router"]
METHODS: tuple[Method, ...] = get_args(Method)
Recompute = Literal["none", "experts", "layers"]
RECOMPUTE: tuple[Recompute, ...] = get_args(Recompute)


# sdpa, whose mask is left out as a real run leaves it out
ATTENTION = "moe_plan"


def _mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """Makes the mask of attention; a plain causal one is left out.

    transformers reads positions to see that a batch holds no packed sequences, and makes the mask where it cannot read
    them, as on tensors without values.
    """
    return sdpa_mask(*args, **kwargs | {"allow_is_causal_skip": True})


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, sdpa_attention_forward)
ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, _mask)


class SimulationError(UserError):
    """A model's code cannot run on tensors without values."""


class Prefill(NamedTuple):
    """The prompt's pass before generation.

    Attributes:
        cost: what the pass costs; the peak includes the cache.
        cache: the model's cache, of fake tensors.
    """

    cost: RunCost
    cache: Any


@dataclass
class SimulatedModel:
    """A model on fake tensors; [`simulated_model`] makes one.

    Attributes:
        mode: the mode in which the tensors live.
        model: the model, with an adapter for methods lora and qlora.
        method: what trains; None for inference.
    """

    mode: FakeTensorMode
    model: nn.Module
    method: Method | None

    def tensors(self) -> Iterator[torch.Tensor]:
        """Yields the parameters and buffers, a shared one once."""
        yield from self.model.parameters()
        yield from self.model.buffers()

    def training_step(self, batch_size: int, length: int, recompute: Recompute = "none") -> RunCost:
        """Runs forward and backward of one micro-batch; the peak includes the gradients and not the optimizer.

        Args:
            batch_size: number of sequences.
            length: tokens of each.
            recompute: what backward computes again instead of keeping it: nothing, the experts' first projection
                (`experts_recompute`), or all of each layer (gradient checkpointing).

        Raises:
            SimulationError: if the model's code needs values.
        """
        inner = _transformers_model(self.model)
        inner.config.get_text_config().experts_recompute = recompute == "experts"
        recorder = CostRecorder(self.tensors())
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        hooks = [parameter.register_post_accumulate_grad_hook(recorder.drop_gradient) for parameter in trained]
        try:
            with self._run(recorder):
                if recompute == "layers":
                    # the state of random numbers is no matter of shapes, and a fake tensor cannot hold it
                    inner.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
                self.model.train()
                ids = torch.zeros(batch_size, length, dtype=torch.long)
                # the outputs are not held, as in a Trainer's step
                self.model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            return recorder.cost
        finally:
            for hook in hooks:
                hook.remove()
            if recompute == "layers":
                with without_deprecations():
                    inner.gradient_checkpointing_disable()

    @torch.no_grad()
    def prefill(self, batch_size: int, length: int) -> Prefill:
        """Runs the prompt's pass, with logits for the last token alone where the model can leave out the others.

        Raises:
            SimulationError: if the model's code needs values.
        """
        recorder = CostRecorder(self.tensors())
        with self._run(recorder):
            self.model.eval()
            ids = torch.zeros(batch_size, length, dtype=torch.long)
            cache = self.model(input_ids=ids, use_cache=True, **self._last_logits()).past_key_values
        return Prefill(recorder.cost, cache)

    @torch.no_grad()
    def decode(self, batch_size: int, cache: Any) -> RunCost:
        """Runs the pass of one further token of each sequence; the cache grows by the tokens.

        Raises:
            SimulationError: if the model's code needs values.
        """
        recorder = CostRecorder([*self.tensors(), *cache_tensors(cache)])
        with self._run(recorder):
            self.model.eval()
            ids = torch.zeros(batch_size, 1, dtype=torch.long)
            self.model(input_ids=ids, past_key_values=cache, use_cache=True, **self._last_logits())
        return recorder.cost

    def _last_logits(self) -> dict[str, int]:
        takes = inspect.signature(_transformers_model(self.model).forward).parameters
        return {"logits_to_keep": 1} if "logits_to_keep" in takes else {}

    @contextmanager
    def _run(self, recorder: CostRecorder) -> Iterator[None]:
        with _only_shapes(type(_transformers_model(self.model)).__name__), self.mode, recorder:
            yield


@contextmanager
def without_deprecations() -> Iterator[None]:
    """Hides deprecations of transformers: the older names are those that all supported releases take."""
    logger = logging.getLogger("transformers.utils.generic")
    logger.addFilter(_is_no_deprecation)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logger.removeFilter(_is_no_deprecation)


def _is_no_deprecation(record: logging.LogRecord) -> bool:
    return "are deprecated" not in record.getMessage()


@contextmanager
def _only_shapes(name: str) -> Iterator[None]:
    """Turns any exception of a model's code into one sentence; torch logs each failure of an operator otherwise."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with without_deprecations():
            yield
    except UserError:
        raise
    except Exception as error:  # a model's code may raise anything
        text = " ".join(str(error).split())
        raise SimulationError(
            f"{name} cannot run on tensors without values ({type(error).__name__}: {text[:200]}), so memory and time of "
            "its passes are unknown"
        ) from error
    finally:
        logger.setLevel(level)


def _transformers_model(model: nn.Module) -> PreTrainedModel:
    return next(module for module in model.modules() if isinstance(module, PreTrainedModel))


def simulated_model(
    config: PreTrainedConfig,
    dtype: torch.dtype,
    method: Method | None = None,
    lora_rank: int = 16,
    experts_implementation: str = "moe",
    trust_remote_code: bool = False,
) -> SimulatedModel:
    """Makes a model on fake tensors.

    Args:
        config: configuration of a causal LM that transformers loads; it is copied.
        dtype: dtype of the weights.
        method: what trains: all weights, LoRA on experts and attention with whole routers, LoRA on experts in 4 bits
            (simulated with the matrices in `dtype`), or the routers alone. None for inference.
        lora_rank: rank of the updates.
        experts_implementation: name of an experts function of transformers' interface.
        trust_remote_code: whether Python code that the checkpoint brings may run.

    Raises:
        UserError: if the method trains nothing of this model, or transformers has no causal LM for the configuration.
    """
    config = copy.deepcopy(config)
    # a quantised checkpoint is planned as the model that it was made from
    vars(config).pop("quantization_config", None)
    with torch.device("meta"):
        try:
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
        except (ValueError, TypeError, AttributeError, AssertionError, RuntimeError, ZeroDivisionError) as error:
            text = " ".join(str(error).split())
            raise UserError(
                f"a configuration of type {config.model_type!r} makes no causal LM: {text[:300]}"
            ) from error
        if model.config._attn_implementation == "sdpa":
            model.set_attn_implementation(ATTENTION)
        routed = _sparse_layers(model)
        if routed:
            model.set_experts_implementation(experts_implementation)
        if method == "router":
            _train_routers_alone(model, routed)
        elif method in ("lora", "qlora"):
            with without_deprecations():
                model = get_peft_model(model, moe_lora_config(model, lora_rank, quiet=True))
        elif method is None:
            model.requires_grad_(False)
    mode = FakeTensorMode()
    with mode:
        _leave_meta(model)
    return SimulatedModel(mode, model, method)


def _leave_meta(model: nn.Module) -> None:
    """Replaces the tensors of a model on the meta device by fake tensors on the CPU; shared ones stay shared.

    A model cannot be made of fake tensors at once, because `Module.to` does not take them.
    """
    made: dict[int, torch.Tensor] = {}

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in made:
            empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
            parameter = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if parameter else empty
        return made[id(tensor)]

    for module in model.modules():
        held: tuple[dict[str, Any], ...] = (module._parameters, module._buffers, vars(module))
        for tensors in held:
            for name, tensor in tensors.items():
                if isinstance(tensor, torch.Tensor):
                    tensors[name] = fake(tensor)


def _sparse_layers(model: nn.Module) -> list[Any]:
    try:
        return sparse_layers(model)
    except UnreachableRouting:
        return []


def _train_routers_alone(model: nn.Module, routed: list[Any]) -> None:
    model.requires_grad_(False)
    routers = [layer.router for layer in routed if layer.router is not None]
    if not routers:
        raise UserError("the model has no routers that are known: choose full or lora")
    for router in routers:
        router.requires_grad_()


def cache_tensors(cache: Any) -> list[torch.Tensor]:
    """Returns the tensors of a cache of transformers, found in the attributes of the cache and of its layers."""
    found: dict[int, torch.Tensor] = {}
    seen: set[int] = set()

    def visit(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            found[id(value)] = value
        elif id(value) not in seen and not isinstance(value, (str, bytes, type, PreTrainedConfig)):
            seen.add(id(value))
            items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
            for item in [*items, *getattr(value, "__dict__", {}).values()]:
                visit(item)

    visit(cache)
    return list(found.values())


def cache_bytes(cache: Any) -> int:
    """Returns the bytes of the tensors in a cache, without its counters."""
    return sum(tensor.numel() * tensor.element_size() for tensor in cache_tensors(cache) if tensor.dim())
