"""This module builds experts of many kinds with random weights, and the float64 oracle of every back end."""

import copy

import pytest
import torch
from transformers import AutoConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Experts
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Experts
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.olmoe.modeling_olmoe import OlmoeExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from modeling_moe.dispatch import backend_of, backends
from modeling_moe.dispatch.backends.native.structures import NATIVE_ACTIVATIONS
from modeling_moe.dispatch.interface import activation_of
from modeling_moe.modeling_moe import MoEExperts
from tests.builders import tiny_config
from tests.conftest import NEEDS_TRITON


OURS = {
    "gated": {},
    "gated-bias": {"mlp_bias": True},
    "plain": {"gated_experts": False},
    "relu-bias": {"gated_experts": False, "mlp_bias": True, "hidden_act": "relu"},
    "relu2": {"hidden_act": "relu2"},
    "gelu": {"hidden_act": "gelu"},
    "gelu-tanh": {"hidden_act": "gelu_pytorch_tanh"},
    "gelu-new": {"hidden_act": "gelu_new", "gated_experts": False, "mlp_bias": True},
    "clamped": {"swiglu_limit": 0.9, "mlp_bias": True},
    "clamped-silu": {"swiglu_limit": 0.9, "swiglu_alpha": None, "mlp_bias": True},
}
THEIRS = {
    "mixtral": (MixtralExperts, "mixtral"),
    "qwen3_moe": (Qwen3MoeExperts, "qwen3_moe"),
    "olmoe": (OlmoeExperts, "olmoe"),
    "deepseek_v3": (DeepseekV3Experts, "deepseek_v3"),
    "deepseek_v4": (DeepseekV4Experts, "deepseek_v4"),
    "gpt_oss": (GptOssExperts, "gpt_oss"),
}
# limits that random numbers reach
LIMITS = {"deepseek_v4": {"swiglu_limit": 0.9}}
HIDDEN, WIDTH = 32, 24


def native_computes(dtype: torch.dtype, activation: str = "silu_gated") -> bool:
    """Returns True if the native back end serves a dtype and an activation on this machine."""
    reason = backends.BACKENDS["native"].reason_unavailable(torch.device("cpu"), dtype)
    return reason is None and activation in NATIVE_ACTIVATIONS


NEEDS_NATIVE = pytest.mark.skipif(not native_computes(torch.float32), reason="no gcc, or another system than Linux")
CPU_BACKENDS = [pytest.param("moe_native", marks=NEEDS_NATIVE), "moe_loop", "moe_grouped_mm"]
BACKENDS = [*CPU_BACKENDS, pytest.param("moe_triton", marks=NEEDS_TRITON)]


def fastest(device: str, dtype: torch.dtype = torch.float32) -> str:
    """Returns the back end that `experts_implementation="moe"` takes on a device."""
    if device == "cuda":
        return "loop" if dtype == torch.float64 else "triton"
    return "native" if native_computes(dtype) else "loop"


def assert_backend(module, arguments) -> None:
    """Fails if another back end than the one that `experts_implementation` names is about to compute the experts.

    A back end that cannot serve gives way without a message, and a test of it would pass by another one.
    """
    states, index = arguments[:2]
    name, dtype = module.config._experts_implementation, next(module.parameters()).dtype
    asked = name.removeprefix("moe_") if name != "moe" else None
    # test_native.py tests the CPU's choice, and what `native` does not serve
    left_open = asked is None and states.device.type == "cpu"
    left_open |= asked == "native" and not native_computes(dtype, activation_of(module).name)
    if name == "eager" or left_open:
        return
    served = backend_of(module, states, index, backend=asked).removesuffix(" (decode)")
    expected = asked or fastest("cuda", dtype)
    assert served == expected, f"{served} would serve, not {expected}"


def make(
    kind: str,
    implementation: str,
    experts=5,
    hidden=HIDDEN,
    width=WIDTH,
    dtype=torch.float64,
    device: str = "cpu",
    **fields,
):
    """Builds experts of a kind. Their random weights do not depend on the implementation, and each call asserts it."""
    sizes = {"hidden_size": hidden, "moe_intermediate_size": width, "intermediate_size": width}
    if kind in OURS:
        config, build = (
            tiny_config(num_experts=experts, num_experts_per_tok=1, **sizes, **OURS[kind], **fields),
            MoEExperts,
        )
    else:
        build, model_type = THEIRS[kind]
        name = "n_routed_experts" if kind == "deepseek_v3" else "num_local_experts"
        config = AutoConfig.for_model(
            model_type, **sizes, **{name: experts, "num_experts": experts}, **LIMITS.get(kind, {}), **fields
        )
    config._experts_implementation = implementation
    torch.manual_seed(1)
    module = build(config).to(dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, dtype=torch.float64) * 0.5)
    module.register_forward_pre_hook(assert_backend)
    return module.to(device)


def draw(tokens, experts, top_k, dtype=torch.float64, hidden=HIDDEN, device: str = "cpu"):
    """Draws tokens, ids of distinct experts, weights and the gradient of the output, equal on every device."""
    states = torch.randn(tokens, hidden, dtype=dtype)
    index = torch.stack([torch.randperm(experts)[:top_k] for _ in range(tokens)])
    weight, direction = torch.rand(tokens, top_k, dtype=dtype), torch.randn(tokens, hidden, dtype=dtype)
    return tuple(tensor.to(device) for tensor in (states, index, weight, direction))


def run(module, states, index, weight, direction):
    """Returns the output, and the gradients of tokens, weights and parameters."""
    states, weight = states.detach().requires_grad_(), weight.detach().requires_grad_()
    output = module(states, index, weight)
    return [output, *torch.autograd.grad((output * direction).sum(), [states, weight, *module.parameters()])]


def oracle(module, states, index, weight, direction):
    """Returns what `run` does, computed in float64 by the class's own loop over the experts."""
    module = copy.deepcopy(module).double()
    module.config._experts_implementation = "eager"
    return run(module, states.double(), index, weight.double(), direction.double())


def assert_close(got, expected, tolerance):
    """Asserts that each tensor is right to `tolerance` of its largest value."""
    for mine, theirs in zip(got, expected, strict=True):
        assert not mine.isnan().any()
        scale = max(theirs.abs().max().item(), 1e-30)
        torch.testing.assert_close(mine.double(), theirs, atol=tolerance * scale, rtol=0)


SHAPES = {
    "several": {"tokens": 9, "experts": 5, "top_k": 3},
    "one token": {"tokens": 1, "experts": 5, "top_k": 3},
    "one expert": {"tokens": 7, "experts": 1, "top_k": 1},
    "all experts": {"tokens": 6, "experts": 4, "top_k": 4},
    "more rows than a chunk": {"tokens": 23, "experts": 2, "top_k": 1},
    "mostly idle": {"tokens": 3, "experts": 16, "top_k": 2},
}
