"""Shared by all tests: the device, tiny models, one seed, and buffers that show when they are read too early."""

import os
from pathlib import Path

import pytest
import torch

from tests.interpreter import interpreter_fault


# a test that starts another process finds the packages in scripts/ there too
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(Path(__file__).parents[1] / "scripts"), *filter(None, [os.environ.get("PYTHONPATH")])]
)

if torch.cuda.is_available():
    # cuBLAS reads it before the first product; without it deterministic algorithms warn of each
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
elif interpreter_fault() is None:
    # Triton reads it when it defines a function, so before anything imports Triton
    os.environ.setdefault("TRITON_INTERPRET", "1")

from modeling_moe import MoEConfig
from modeling_moe.dispatch.backends import BACKENDS
from modeling_moe.modeling_moe import MoEBlock
from modeling_moe.router_catalogue import router_class


def triton_serves(device: str) -> bool:
    """Whether the Triton back end runs on `device`, compiled or interpreted."""
    device, dtype = torch.device(device), torch.float32
    return "triton" in BACKENDS and BACKENDS["triton"].reason_unavailable(device, dtype) is None


# where the tests run that are marked `gpu`
DEVICE = "cuda" if torch.cuda.is_available() and triton_serves("cuda") else "cpu"


def _without_triton() -> str | None:
    if "triton" not in BACKENDS:
        return "Triton is not installed"
    if DEVICE == "cpu" and interpreter_fault() is not None:
        return interpreter_fault()
    return None if triton_serves(DEVICE) else "Triton serves no GPU here, and TRITON_INTERPRET=1 is not set"


# why no test can run the Triton back end, or None
WITHOUT_TRITON = _without_triton()
NEEDS_TRITON = pytest.mark.skipif(WITHOUT_TRITON is not None, reason=str(WITHOUT_TRITON))
NEEDS_GPU = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU that Triton serves")


def pytest_terminal_summary(terminalreporter) -> None:
    """Says in one line why the Triton back end was not tested."""
    if WITHOUT_TRITON is not None:
        terminalreporter.write_line(f"The Triton back end was not tested: {WITHOUT_TRITON}")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items) -> None:
    """Marks the tests that use the GPU, before `-m gpu` selects them."""
    for item in items:
        if "device" in item.fixturenames and not _tests_native(item):
            item.add_marker("gpu")


def _tests_native(item) -> bool:
    return hasattr(item, "callspec") and item.callspec.params.get("backend") == "moe_native"


@pytest.fixture
def device(request) -> str:
    """`DEVICE`, or "cpu" where the test's parameter `backend` is "moe_native", which serves no GPU."""
    return "cpu" if _tests_native(request.node) else DEVICE


def tiny_config(**fields) -> MoEConfig:
    """A model small enough for float64 and finite differences, with odd sizes: 5 experts, 3 per token, wide heads."""
    defaults = {
        "vocab_size": 99,
        "hidden_size": 32,
        "intermediate_size": 40,
        "moe_intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "num_experts": 5,
        "num_experts_per_tok": 3,
        "mlp_layer_types": ["sparse", "dense", "sparse"],
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.2,
    }
    return MoEConfig(**(defaults | fields))


def router_of_logits(num_experts: int, **fields):
    """A float64 router whose logits are the tokens (T, E) themselves."""
    config = tiny_config(
        **({"num_experts": num_experts, "hidden_size": num_experts, "num_experts_per_tok": 2} | fields)
    )
    router = router_class(config)(config)
    router.init_weights(0.0)
    with torch.no_grad():
        router.weight.copy_(torch.eye(num_experts))
    return router.double()


def eager_block(**fields) -> MoEBlock:
    """A float64 sparse block with the eager loop over its experts, all its weights random."""
    config = tiny_config(**fields)
    config._experts_implementation = "eager"
    block = MoEBlock(config)
    block.gate.init_weights(0.5)
    for parameter in block.experts.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return block.double()


@pytest.fixture(autouse=True)
def seed():
    """The same random numbers in every test, whatever ran before."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fills what `torch.empty` returns with NaN."""
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
