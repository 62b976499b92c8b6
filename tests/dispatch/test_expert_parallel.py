"""These tests compare experts on two gloo processes, under both exchanges of transformers, with one process."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import modeling_moe.dispatch.interface as interface
from modeling_moe import MoEForCausalLM
from tests.builders import tiny_config
from tests.ranks import needs_transformers, run_ranks


pytestmark = needs_transformers("5.19", "expert parallelism")
# before 5.23 there was one exchange
CHOOSES = hasattr(DistributedConfig(), "ep_implementation")
RANKS = 2
IDS = torch.arange(3, 39).view(4, 9)

OURS = {
    "moe": {},
    # null experts give empty assignments, copy experts need no exchange
    "moe_with_empty_assignments": {"num_null_experts": 2, "num_copy_experts": 1},
    "moe_with_latent_experts": {"moe_latent_size": 12, "router_input_norm": True, "router_expert_scale": True},
    "moe_with_gated_attention": {
        "attn_output_gate": True,
        "qk_norm": "head",
        "qk_norm_after_rope": True,
        "lm_head_bias": True,
        "norm_placement": "parallel_shared",
    },
}
KINDS = [*OURS, "mixtral"]


def build(kind: str, num_experts: int = 6):
    torch.manual_seed(0)
    if kind in OURS:
        return MoEForCausalLM(
            tiny_config(
                vocab_size=100, num_experts=num_experts, router_aux_loss_coef=0.0, router_z_loss_coef=0.0, **OURS[kind]
            )
        )
    config = AutoConfig.for_model(
        "mixtral", hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=num_experts, vocab_size=100, num_experts_per_tok=3,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, experts_implementation="moe")


def logits_and_gradients(model) -> dict[str, torch.Tensor]:
    output = model(IDS, labels=IDS)
    output.loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"logits": output.logits.detach()} | {
        name: grad.full_tensor() if hasattr(grad, "full_tensor") else grad for name, grad in gradients.items()
    }


def rank_main(rank: int, folder: str, implementation: str | None) -> None:
    chosen = {"ep_implementation": implementation} if CHOOSES else {}
    plan = DistributedConfig(tp_size=RANKS, ep_size=RANKS, **chosen)
    operator = interface.experts
    for kind in KINDS:
        model = AutoModelForCausalLM.from_pretrained(
            f"{folder}/{kind}", distributed_config=plan, experts_implementation="moe"
        )
        calls = []

        def spy(*arguments, calls=calls):
            tensors, layout = arguments[:2]
            calls.append(len(tensors[layout.split().index("up")]))
            return operator(*arguments)

        interface.experts = spy
        result = logits_and_gradients(model)
        # the operator ran, on this rank's half of the experts
        assert calls
        assert set(calls) == {3}, calls
        torch.save(result, f"{folder}/{kind}{rank}.pt")


@pytest.fixture(scope="module", params=["all_reduce", "all_to_all"] if CHOOSES else [None])
def folder(request, tmp_path_factory):
    """Returns a folder with a model of each kind, and each rank's results under one exchange."""
    folder = tmp_path_factory.mktemp("experts")
    for kind in KINDS:
        build(kind).save_pretrained(folder / kind)
    run_ranks(rank_main, RANKS, str(folder), request.param)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_equal_one(kind, folder):
    expected = logits_and_gradients(
        AutoModelForCausalLM.from_pretrained(folder / kind, experts_implementation="eager")
    )
    for rank in range(RANKS):
        got = torch.load(folder / f"{kind}{rank}.pt")
        assert got.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(got[name], tensor, atol=1e-5, rtol=1e-4, msg=name)
