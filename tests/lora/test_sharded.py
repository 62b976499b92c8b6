"""These tests compare a model that `DistributedConfig` has split with a whole one, with and without LoRA."""

from functools import cache

import pytest
import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from modeling_moe.lora import enable, moe_lora_config, synchronize_adapters
from modeling_moe.utils.errors import UserError
from tests.dispatch.test_expert_parallel import build
from tests.lora.checkpoints import fill
from tests.ranks import needs_transformers, run_ranks
from tests.selection import by_default, dashed, selected


pytestmark = needs_transformers("5.23", "a model split over processes")
IDS = torch.arange(3, 39).view(4, 9)
PLANS = {
    "fsdp": {"fsdp_size": 2},
    "tp": {"tp_size": 2},
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
# PEFT's factors in the attention are right under one kind of splitting only; factors of experts under all
TRAINED = [(plan, "adapter") for plan in PLANS if plan != "tp"] + [(plan, "all_weights") for plan in PLANS]
KINDS = ("moe", "mixtral")
TWO_CELLS = [(kind, *trained) for kind in KINDS for trained in TRAINED]
# adapters of this package's model under each plan; all weights, and adapters of another model, under two plans each
FEW = [("moe", plan, "adapter") for plan in PLANS if plan != "tp"] + [("moe", "tp", "all_weights")]
FEW += [("moe", "fsdp_ep", "all_weights"), ("mixtral", "fsdp_ep", "adapter"), ("mixtral", "tp_ep", "adapter")]
FOUR_CELLS = [
    (kind, plan, "adapter" if plan == "experts_split_twice" else "no_attention") for kind in KINDS for plan in FOUR
]


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def learn(model, rows: torch.Tensor, folder: str, writes: bool = True) -> dict:
    """Trains two steps and saves the model in `folder`; returns logits, gradients and generated tokens."""
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


def load(folder, kind: str, trained: str, plan: DistributedConfig | None = None):
    """Loads the model, with an adapter to train unless all weights are trained."""
    model = AutoModelForCausalLM.from_pretrained(
        f"{folder}/{kind}", **({"distributed_config": plan} if plan is not None else {})
    )
    if trained == "all_weights":
        return model
    return PeftModel.from_pretrained(model, f"{folder}/{kind}_{trained}", is_trainable=True)


def rank_main(rank: int, folder: str, cells: list[tuple[str, str, str]]) -> None:
    """Runs the cells in this process."""
    enable()
    for kind, name, trained in cells:
        plan = DistributedConfig(**(PLANS | FOUR)[name])
        model = load(folder, kind, trained, plan)
        if trained != "all_weights":
            synchronize_adapters(model)
        rows = IDS.chunk(plan.dp_size)[rank // plan.tp_size]
        result = learn(model, rows, f"{folder}/{kind}_{name}_{trained}", rank == 0)
        torch.save(result, f"{folder}/{kind}_{name}_{trained}_{rank}.pt")


def run_cells(folder, cells: list[tuple[str, str, str]], ranks: int, num_experts: int) -> None:
    """Saves models and adapters, and runs the cells in `ranks` processes."""
    for kind in KINDS:
        model = build(kind, num_experts)
        model.save_pretrained(folder / kind)
        for adapter, attention in (("adapter", True), ("no_attention", False)):
            adapted = get_peft_model(model, moe_lora_config(model, r=2, attention=attention))
            fill(adapted, 0.2, only="lora_")
            adapted.save_pretrained(folder / f"{kind}_{adapter}")
            model = adapted.unload()
    run_ranks(rank_main, ranks, str(folder), cells)


@pytest.fixture(scope="module")
def of_two(request, tmp_path_factory):
    """Runs the cells in two processes and returns the folder of the results."""
    folder = tmp_path_factory.mktemp("two")
    run_cells(folder, selected(request, "cell"), 2, 6)
    return folder


@pytest.fixture(scope="module")
def of_four(request, tmp_path_factory):
    """Runs the cells in four processes and returns the folder of the results."""
    folder = tmp_path_factory.mktemp("four")
    run_cells(folder, selected(request, "cell"), 4, 8)
    return folder


@cache
def of_one_process(folder, kind: str, trained: str) -> dict:
    return learn(load(folder, kind, trained), IDS, str(folder / f"{kind}_one_{trained}"))


def check(folder, kind: str, name: str, trained: str, ranks: int) -> None:
    """Compares logits, gradients and the trained model of each process, and the saved checkpoint, with one process."""
    plan, expected = DistributedConfig(**(PLANS | FOUR)[name]), of_one_process(folder, kind, trained)
    for rank in range(ranks):
        result = torch.load(folder / f"{kind}_{name}_{trained}_{rank}.pt")
        rows = torch.arange(len(IDS)).chunk(plan.dp_size)[rank // plan.tp_size]
        assert result.keys() == expected.keys()
        for key, tensor in expected.items():
            tensor = tensor[rows] if key == "logits" else tensor
            torch.testing.assert_close(
                result[key], tensor, atol=1e-5, rtol=1e-4, msg=lambda text, key=key: f"{key} {text}"
            )
    saved = folder / f"{kind}_{name}_{trained}"
    if trained == "all_weights":
        model = AutoModelForCausalLM.from_pretrained(saved)
    else:
        model = PeftModel.from_pretrained(load(folder, kind, "all_weights"), saved)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(IDS).logits, expected["trained_logits"], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("cell", by_default(FEW, TWO_CELLS), ids=dashed)
def test_two_processes_equal_one(cell, of_two):
    check(of_two, *cell, 2)


@pytest.mark.slow
@pytest.mark.parametrize("cell", FOUR_CELLS, ids=dashed)
def test_four_processes_equal_one(cell, of_four):
    check(of_four, *cell, 4)


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


@pytest.mark.parametrize("second", ["tp_size", "dp_replicate_size"])
def test_linear_layers_split_in_two_ways(second):
    model = build("moe")
    model.config.distributed_config = DistributedConfig(fsdp_size=2, ep_size=2, **{second: 2})
    with pytest.raises(UserError, match="leave one of fsdp_size, tp_size, dp_replicate_size above 1"):
        moe_lora_config(model, r=2)
    assert moe_lora_config(model, r=2, attention=False).target_parameters
