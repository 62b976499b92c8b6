"""These tests watch tiny models of the MoE families of transformers and compare with what their routers and experts get."""

from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version

from modeling_moe.monitoring import observe, watch
from modeling_moe.monitoring.probabilities import GIVEN, probabilities
from tests.monitoring.moe_families import (
    experts_families,
    family_row,
    other_families,
    page,
    rows,
    tiny_family,
    unreachable,
)


PAGE = Path(__file__).parents[2] / "docs" / "routing-families.md"
IDS = torch.arange(3, 39).view(2, 18)
# one for each kind: softmax, sigmoid, groups, selection bias, biases, several experts modules, given probabilities, transposed
# experts, a router with state, hash layers, experts without a gate, weights that nothing explains
QUICK = ["mixtral", "glm4_moe", "deepseek_v2", "deepseek_v3", "ernie4_5_moe", "gpt_oss", "ernie4_5_vl_moe", "gemma4", "aria",
         "zaya", "deepseek_v4", "nemotron_h", "phimoe"]  # fmt: skip
ALL = [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in experts_families()]


@pytest.mark.parametrize("family", ALL)
def test_counts_are_those_of_the_experts_and_probabilities_explain_the_weights(family):
    model = tiny_family(family)
    # a counter of its own: what the experts are called with
    called = {}

    def count(name):
        return lambda module, args: called.setdefault(name, []).append([value.detach().clone() for value in args[1:3]])

    seen = {}
    with (
        watch(model) as routing,
        observe(model, lambda event: seen.update({event.layer.name: event})),
        torch.no_grad(),
    ):
        for name, module in model.named_modules():
            if "is_transposed" in vars(module):
                module.register_forward_pre_hook(count(name))
        model(input_ids=IDS, use_cache=False)
    figures = routing.read()
    assert any(layer.tokens for layer in figures.layers)
    for layer in figures.layers:
        if layer.name not in called:
            assert layer.tokens == 0
            continue
        ((index, weight),) = called[layer.name]
        index, weight = (value.reshape(-1, layer.top_k) for value in (index, weight))
        assert layer.tokens == len(index)
        assert layer.load.tolist() == [(index == expert).sum().item() for expert in range(layer.num_experts)]
        used = torch.stack([(index == expert).any(dim=-1) for expert in range(layer.num_experts)]).double()
        torch.testing.assert_close(layer.co_activation, used @ used.T / len(index))
        if layer.scoring is None:
            continue
        probs = probabilities(seen[layer.name].logits, layer.scoring).double()
        assert layer.token_entropy == pytest.approx(torch.special.entr(probs).sum(dim=-1).mean().item(), rel=1e-5)
        assert layer.marginal_entropy == pytest.approx(torch.special.entr(probs.mean(dim=0)).sum().item(), rel=1e-5)
        torch.testing.assert_close(probs.sum(dim=-1), torch.ones(len(probs), dtype=torch.float64), atol=1e-5, rtol=0)
        if layer.scoring != GIVEN:
            chosen = probs.gather(-1, index.clamp(max=probs.shape[-1] - 1))
            share = weight.double() / weight.double().sum(dim=-1, keepdim=True)
            torch.testing.assert_close(chosen / chosen.sum(dim=-1, keepdim=True), share, atol=2e-3, rtol=0)


def test_families_beside_the_interface_are_named():
    assert {"llama4", "jetmoe", "longcat_flash"} <= set(other_families())
    assert unreachable("llama4").startswith(
        "Llama4ForCausalLM computes its experts in Llama4TextMoe, which does not follow"
    )


needs_pinned = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.24"), reason="the page is that of the newest release"
)


@needs_pinned
def test_the_page_names_each_family():
    lines = PAGE.read_text("utf-8").splitlines()
    names = [line.split(" | ")[0].removeprefix("| ") for line in lines if line.startswith("| ") and "---" not in line][
        1:
    ]
    assert names == [*experts_families(), *other_families()]
    row = family_row("mixtral")
    assert f"| {row.family} | {row.load} | {row.scoring} | {row.why} |" in lines


@needs_pinned
@pytest.mark.slow
def test_the_page_is_current():
    assert PAGE.read_text("utf-8") == page(rows()), "run python -m tests.monitoring.moe_families"
