"""LoRA on experts that are split over two gloo processes, against one process that holds them all."""

import socket

import pytest
import torch
import torch.distributed as dist
from peft import get_peft_model
from torch import multiprocessing
from transformers import AutoModelForCausalLM

import modeling_moe.lora.layers as layers
from modeling_moe.lora import MoELoraConfig
from tests.dispatch.test_expert_parallel import build
from tests.lora.checkpoints import TARGETS, fill


RANKS = 2
IDS = torch.arange(3, 39).view(4, 9)


def adapt(model):
    model = get_peft_model(model, MoELoraConfig(r=2, lora_alpha=3, target_modules=[], target_parameters=TARGETS))
    fill(model, 0.2, only="lora_")
    return model


def logits_and_gradients(model, ids) -> dict[str, torch.Tensor]:
    output = model(ids, labels=ids)
    output.loss.backward()
    gradients = {name: each.grad for name, each in model.named_parameters() if "lora_" in name}
    return {"logits": output.logits.detach()} | gradients


def rank_main(rank: int, port: int, folder: str, plan: dict) -> None:
    from transformers.distributed import DistributedConfig

    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS)
    model = AutoModelForCausalLM.from_pretrained(
        folder, distributed_config=DistributedConfig(**plan), experts_implementation="moe"
    )
    model = adapt(model)
    sliced = []
    low_rank = layers.low_rank

    def spy(*arguments):
        sliced.append(low_rank(*arguments))
        return sliced[-1]

    layers.low_rank = spy
    ids = IDS if plan.get("tp_size") else IDS.chunk(RANKS)[rank]
    result = logits_and_gradients(model, ids)
    assert sliced
    assert {len(update.a) for update in sliced} == {3}
    torch.save(result, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("plan", [{"fsdp_size": 2, "ep_size": 2}, {"tp_size": 2, "ep_size": 2}], ids=["fsdp", "tp"])
@pytest.mark.parametrize("kind", ["moe", "mixtral"])
def test_two_ranks_equal_one(kind, plan, tmp_path):
    build(kind).save_pretrained(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(rank_main, args=(port, str(tmp_path), plan), nprocs=RANKS)
    model = adapt(AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="moe"))
    expected = logits_and_gradients(model, IDS)
    got = [torch.load(tmp_path / f"{rank}.pt") for rank in range(RANKS)]
    shares_batch = "tp_size" in plan
    logits = got[0]["logits"] if shares_batch else torch.cat([each["logits"] for each in got])
    torch.testing.assert_close(logits, expected.pop("logits"), atol=1e-5, rtol=1e-4)
    for name, tensor in expected.items():
        # each rank has the gradient of its own experts' factors; of its own loss, unless the batch is one
        total = sum(each[name] for each in got) / (1 if shares_batch else RANKS)
        assert got[0][name].any()
        torch.testing.assert_close(total, tensor, atol=1e-5, rtol=1e-4, msg=name)
