"""LoRA on a model that `DistributedConfig` has split over two processes, against one process that holds it all."""

from functools import cache

import pytest
import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from modeling_moe.cli import UserError
from modeling_moe.lora import moe_lora_config
from modeling_moe.lora.sharding import synchronize_adapters
from tests.dispatch.test_expert_parallel import build
from tests.lora.checkpoints import fill
from tests.ranks import run_ranks


IDS = torch.arange(3, 39).view(4, 9)
PLANS = {
    "fsdp": {"fsdp_size": 2},
    "fsdp_ep": {"fsdp_size": 2, "ep_size": 2},
    "tp_ep": {"tp_size": 2, "ep_size": 2},
    "tp_ep_all_reduce": {"tp_size": 2, "ep_size": 2, "ep_implementation": "all_reduce"},
}
FOUR = {
    "experts_split_twice": {"fsdp_size": 4, "ep_size": 2},
    "replicas": {"dp_replicate_size": 2, "fsdp_size": 2, "ep_size": 2},
    "all_three": {"fsdp_size": 2, "tp_size": 2, "ep_size": 4},
    "tp_inside_ep": {"fsdp_size": 2, "tp_size": 2, "ep_size": 2},
}
KINDS = ("moe", "mixtral")


def adapter_of(plan: DistributedConfig) -> str:
    """PEFT's factors of attention are right with one kind of splitting alone, those of the experts with all."""
    return "no_attention" if plan.fsdp_size > 1 and (plan.tp_size > 1 or plan.dp_replicate_size > 1) else "adapter"


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def learn(model, rows: torch.Tensor, folder: str, writes: bool = True) -> dict:
    """What two steps of training show, and what they leave behind in `folder`."""
    model.train()
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], 0.05, foreach=False)
    result = {}
    for _ in range(2):
        output = model(rows, labels=rows)
        optimizer.zero_grad()
        output.loss.backward()
        result.setdefault("logits", whole(output.logits))
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                result.setdefault(name, whole(parameter.grad))
        optimizer.step()
    model.eval()
    model.save_pretrained(folder, is_main_process=writes)
    with torch.no_grad():
        result["trained_logits"] = whole(model(IDS).logits)
    result["generated"] = model.generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=0)
    return result


def rank_main(rank: int, folder: str, plans: dict) -> None:
    """All plans, one after the other."""
    for kind in KINDS:
        for name, plan in plans.items():
            plan = DistributedConfig(**plan)
            model = AutoModelForCausalLM.from_pretrained(f"{folder}/{kind}", distributed_config=plan)
            model = PeftModel.from_pretrained(model, f"{folder}/{kind}_{adapter_of(plan)}", is_trainable=True)
            synchronize_adapters(model)
            rows = IDS.chunk(plan.dp_size)[rank // plan.tp_size]
            result = learn(model, rows, f"{folder}/{kind}_{name}_trained", rank == 0)
            torch.save(result, f"{folder}/{kind}_{name}_{rank}.pt")


def run_plans(folder, plans: dict, ranks: int, num_experts: int) -> None:
    """Writes checkpoints with adapters, and what the processes make of them under each plan."""
    for kind in KINDS:
        model = build(kind, num_experts)
        model.save_pretrained(folder / kind)
        for adapter, attention in (("adapter", True), ("no_attention", False)):
            adapted = get_peft_model(model, moe_lora_config(model, r=2, attention=attention))
            fill(adapted, 0.2, only="lora_")
            adapted.save_pretrained(folder / f"{kind}_{adapter}")
            model = adapted.unload()
    run_ranks(rank_main, ranks, str(folder), plans)


@pytest.fixture(scope="module")
def of_two(tmp_path_factory):
    """The folder of two processes' results."""
    folder = tmp_path_factory.mktemp("two")
    run_plans(folder, PLANS, 2, 6)
    return folder


@pytest.fixture(scope="module")
def of_four(tmp_path_factory):
    """The folder of four processes' results."""
    folder = tmp_path_factory.mktemp("four")
    run_plans(folder, FOUR, 4, 8)
    return folder


@cache
def of_one_process(folder, kind: str, adapter: str) -> dict:
    model = AutoModelForCausalLM.from_pretrained(folder / kind)
    model = PeftModel.from_pretrained(model, folder / f"{kind}_{adapter}", is_trainable=True)
    return learn(model, IDS, str(folder / f"{kind}_{adapter}_trained"))


def check(folder, kind: str, name: str, plan: dict, ranks: int) -> None:
    """Logits, gradients and the trained model of each process, and the adapter that they saved together."""
    plan = DistributedConfig(**plan)
    expected = of_one_process(folder, kind, adapter_of(plan))
    got = [torch.load(folder / f"{kind}_{name}_{rank}.pt") for rank in range(ranks)]
    for rank, result in enumerate(got):
        rows = torch.arange(len(IDS)).chunk(plan.dp_size)[rank // plan.tp_size]
        assert result.keys() == expected.keys()
        for key, tensor in expected.items():
            tensor = tensor[rows] if key == "logits" else tensor
            torch.testing.assert_close(
                result[key], tensor, atol=1e-5, rtol=1e-4, msg=lambda text, key=key: f"{key} {text}"
            )
    saved = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(folder / kind), folder / f"{kind}_{name}_trained"
    ).eval()
    with torch.no_grad():
        torch.testing.assert_close(saved(IDS).logits, expected["trained_logits"], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_equal_one(kind, name, of_two):
    check(of_two, kind, name, PLANS[name], 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", FOUR)
@pytest.mark.parametrize("kind", KINDS)
def test_four_processes_equal_one(kind, name, of_four):
    check(of_four, kind, name, FOUR[name], 4)


def test_experts_of_which_a_process_holds_parts(tmp_path):
    model = build("moe")
    config = moe_lora_config(model, r=2)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        experts = model.model.layers[0].mlp.experts
        part = distribute_tensor(experts.down_proj.detach(), init_device_mesh("cpu", (1,)), [Shard(2)])
        experts.down_proj = torch.nn.Parameter(part)
        with pytest.raises(UserError, match="tp_size splits each of them, set ep_size"):
            get_peft_model(model, config)
    finally:
        dist.destroy_process_group()


def test_linear_layers_under_two_kinds_of_splitting():
    model = build("moe")
    model.config.distributed_config = DistributedConfig(fsdp_size=2, tp_size=2, ep_size=2)
    with pytest.raises(UserError, match="set one of the sizes to 1"):
        moe_lora_config(model, r=2)
    assert moe_lora_config(model, r=2, attention=False).target_parameters
