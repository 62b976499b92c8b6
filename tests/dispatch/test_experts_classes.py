"""Every experts class of the installed transformers computes what its own loop computes, with and without LoRA."""

import copy

import pytest
import torch
import transformers
from moe_benchmark.experts_classes import build, experts_classes, page, sources
from peft import LoraConfig, get_peft_model
from torch import nn

from modeling_moe import lora
from modeling_moe.dispatch import backend_of
from tests.dispatch.kinds import assert_close, draw, oracle, run
from tests.docs.blocks import ROOT


SOURCES = sources()
MODELS = SOURCES.decorated
PAGE = (ROOT / "docs" / "experts-classes.md").read_text(encoding="utf-8")
PINNED = pytest.mark.skipif(
    f"class of transformers {transformers.__version__} " not in PAGE, reason="the page is about another release"
)


def inputs_for(module):
    """Draws inputs of which each third of the tokens is small, near the limits of gates, or beyond them."""
    hidden = module.down_proj.shape[2 if module.is_transposed else 1]
    states, index, weight, direction = draw(18, module.num_experts, 2, torch.float32, hidden)
    states *= torch.tensor([0.3, 2.0, 8.0]).repeat(6)[:, None]
    return states, index, weight, direction


def test_classes_are_found_by_what_the_decorator_leaves():
    assert len(SOURCES.decorated) > 50
    assert "llama4.Llama4TextExperts" in SOURCES.others
    assert [kind.__name__ for kind in experts_classes("qwen3_omni_moe")] == [
        "Qwen3OmniMoeThinkerTextExperts",
        "Qwen3OmniMoeTalkerTextExperts",
    ]


@pytest.mark.parametrize("model", MODELS)
def test_outputs_and_gradients_are_those_of_the_own_loop(model):
    for kind in experts_classes(model):
        module = build(model, kind)
        inputs = inputs_for(module)
        module.config._experts_implementation = "moe"
        assert_close(run(module, *inputs), oracle(module, *inputs), 3e-5)


class Holder(nn.Module):
    """A Holder gives experts a name, which PEFT asks for."""

    def __init__(self, experts):
        super().__init__()
        self.experts = experts

    def forward(self, states, index, weight):
        return self.experts(states, index, weight)


def run_adapted(model, states, index, weight, direction):
    """Returns the output, and the gradients of tokens, weights and low-rank factors."""
    states, weight = states.detach().requires_grad_(), weight.detach().requires_grad_()
    factors = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(factors) == 4
    output = model(states, index, weight)
    return [output, *torch.autograd.grad((output * direction).sum(), [states, weight, *factors])]


@pytest.mark.parametrize("model", MODELS)
def test_lora_on_experts_is_peft_on_the_own_loop(model):
    for kind in experts_classes(model):
        module = build(model, kind)
        states, index, weight, direction = inputs_for(module)
        up = "gate_up_proj" if module.has_gate else "up_proj"
        config = LoraConfig(
            r=2, target_parameters=[f"experts.{up}", "experts.down_proj"], init_lora_weights=False, lora_alpha=2
        )
        adapted = get_peft_model(Holder(module), config)
        reference = copy.deepcopy(adapted).double()
        with lora.peft_alone():
            expected = run_adapted(reference, states.double(), index, weight.double(), direction.double())
        module.config._experts_implementation = "moe"
        lora.enable()
        try:
            assert_close(run_adapted(adapted, states, index, weight, direction), expected, 3e-5)
        finally:
            lora.disable()


def test_experts_without_act_fn_are_served():
    """Their gate was taken for an activation that is missing."""
    served = 0
    for model in MODELS:
        for kind in experts_classes(model):
            module = build(model, kind)
            if not hasattr(module, "act_fn"):
                served += 1
                backend = backend_of(module, *inputs_for(module)[:2], backend="loop")
                assert backend == "loop", f"{kind.__name__}: {backend}"
    assert served > 0


@PINNED
def test_the_page_is_current():
    assert page() == PAGE, (
        "docs/experts-classes.md is out of date: run python -m moe_benchmark.experts_classes docs/experts-classes.md"
    )
