"""These tests check that frozen experts stay equal bit for bit, while everything else trains."""

import pytest
import torch
import torch.distributed as dist
from datasets import Dataset
from peft import get_peft_model
from torch.distributed.tensor import Shard, distribute_tensor
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Trainer,
    default_data_collator,
)

from modeling_moe import MoEForCausalLM
from modeling_moe.lora import moe_lora_config
from modeling_moe.training import MoECallback
from modeling_moe.training.freezing import FreezeExpertsCallback, freeze_experts
from modeling_moe.utils.errors import UserError
from tests.builders import tiny_config, tiny_model, training_arguments


IDS = torch.randint(3, 300, (8, 11), generator=torch.Generator().manual_seed(3))
FROZEN = [0, 1, 3]
OPTIMIZERS = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.5),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adafactor": lambda parameters: torch.optim.Adafactor(parameters, lr=0.1, weight_decay=0.1),
}


def snapshot(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def moved(model, before) -> tuple[set[str], set[str]]:
    """Returns the names of parameters in which a frozen expert moved, and of those in which all others moved.

    An expert's rows are those of the experts' matrices and of the router, in feed-forward networks.
    """
    frozen, free = set(), set()
    for name, parameter in model.named_parameters():
        changed = parameter.detach() != before[name]
        if any(part in name for part in (".mlp.experts.", ".mlp.gate.", ".mlp.router.")):
            rows = changed.view(len(changed), -1).any(dim=-1)
            frozen |= {name} if rows[FROZEN].any() else set()
            free |= {name} if rows[[2, 4]].all() else set()
        elif changed.any():
            free.add(name)
    return frozen, free


def step(model, optimizer, frozen=None) -> None:
    model(IDS, labels=IDS).loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    if frozen is not None:
        frozen.restore()
    optimizer.zero_grad()


@pytest.mark.parametrize("router", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_stays_under_decay_and_old_momentum(optimizer, dtype, router):
    model = tiny_model(mlp_bias=True).to(dtype)
    optimizer = OPTIMIZERS[optimizer](model.parameters())
    for _ in range(3):
        step(model, optimizer)
    before = snapshot(model)
    frozen = freeze_experts(model, FROZEN, router)
    for _ in range(5):
        step(model, optimizer, frozen)
    rows, free = moved(model, before)
    gates = {f"model.layers.{i}.mlp.gate.weight" for i in (0, 2)}
    assert rows == (set() if router else gates)
    assert free == set(before)
    frozen.release()
    step(model, optimizer)
    experts = {name for name in before if ".mlp.experts." in name}
    assert moved(model, before)[0] == experts | gates


def test_frozen_rows_do_not_count_in_the_gradient():
    model = tiny_model()
    model(IDS, labels=IDS).loss.backward()
    free = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    freeze_experts(model, FROZEN)
    for rows in IDS.chunk(2):
        # accumulates the two halves of the mean
        (model(rows, labels=rows).loss / 2).backward()
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            assert not parameter.grad[FROZEN].any()
            assert free[name][FROZEN].any()
            assert parameter.grad[[2, 4]].any()


def trainer_of(model, folder, callbacks, **fields) -> Trainer:
    rows = Dataset.from_dict({"input_ids": IDS.tolist(), "labels": IDS.tolist()})
    fields = {"optim": "adamw_torch", "learning_rate": 0.01, "weight_decay": 0.5, "max_grad_norm": 1.0} | fields
    args = training_arguments(
        folder, per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=5, **fields
    )
    return Trainer(
        model=model, args=args, train_dataset=rows, data_collator=default_data_collator, callbacks=callbacks
    )


def test_trainer_keeps_them_and_resumes(tmp_path):
    model = tiny_model(router_selection_bias=True, router_bias_update_rate=0.01)
    before = snapshot(model)
    callbacks = [MoECallback(), FreezeExpertsCallback(FROZEN, router=True)]
    trainer_of(model, tmp_path, callbacks, save_strategy="steps", save_steps=3).train()
    assert moved(model, before) == (set(), set(before))
    assert model.model.layers[0].mlp.gate.e_score_correction_bias.any()

    saved = MoEForCausalLM.from_pretrained(tmp_path / "checkpoint-3")
    assert moved(saved, before)[0] == set()
    # a model with other weights, which the checkpoint replaces
    torch.manual_seed(1)
    resumed = MoEForCausalLM(model.config)
    callbacks = [MoECallback(), FreezeExpertsCallback(FROZEN, router=True)]
    trainer_of(resumed, tmp_path, callbacks).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert moved(resumed, before) == (set(), set(before))
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(resumed.get_parameter(name), parameter)


def test_trainer_lets_them_go_at_the_end(tmp_path):
    model = tiny_model()
    trainer_of(model, tmp_path, [FreezeExpertsCallback(FROZEN)]).train()
    model(IDS, labels=IDS).loss.backward()
    assert model.model.layers[0].mlp.experts.down_proj.grad[FROZEN].any()


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_experts_of_other_models(family):
    sizes = {"hidden_size": 32, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"vocab_size": 300, "num_hidden_layers": 2, "num_local_experts": 5, "num_experts_per_tok": 3}
    if family == "mixtral":
        model = MixtralForCausalLM(MixtralConfig(**sizes))
    else:
        model = GptOssForCausalLM(GptOssConfig(**sizes, head_dim=8))
    before = snapshot(model)
    frozen = freeze_experts(model, FROZEN, router=True)
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    step(model, optimizer, frozen)
    assert moved(model, before) == (set(), set(before))


ROUTED_ATTENTION = {
    "moa": {},
    "switch_head": {"num_key_value_heads": 4},
    "moh": {},
    "routing_transformer": {"attention_experts_per_tok": 1},
}


@pytest.mark.parametrize("router", [False, True])
@pytest.mark.parametrize("variant", ROUTED_ATTENTION)
def test_experts_of_attention_train_on(variant, router):
    """Attention has 3 experts, or heads, or clusters: fewer than the networks' ids name."""
    fields = {"attention_experts": 3, **ROUTED_ATTENTION[variant]}
    model = tiny_model(routed_attention=variant, router_aux_loss_coef=0.1, **fields)
    before = snapshot(model)
    frozen = freeze_experts(model, FROZEN, router)
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    for _ in range(3):
        step(model, optimizer, frozen)
    gates = {f"model.layers.{i}.mlp.gate.weight" for i in (0, 2)}
    inside = {name for name in before if ".self_attn." in name}
    rows, free = moved(model, before)
    assert rows == (set() if router else gates)
    assert free == set(before)
    for name in inside:
        parameter = model.get_parameter(name).detach()
        assert (parameter != before[name]).flatten(1).any(dim=-1).all(), name


@pytest.fixture
def one_process():
    """Makes a process group of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_under_ddp(one_process):
    model = tiny_model()
    wrapped = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    before = snapshot(model)
    frozen = freeze_experts(wrapped, FROZEN, router=True)
    step(wrapped, OPTIMIZERS["adamw"](model.parameters()), frozen)
    assert moved(model, before) == (set(), set(before))


def test_experts_that_are_split_are_refused(one_process):
    model = tiny_model()
    experts = model.model.layers[0].mlp.experts
    mesh = dist.init_device_mesh("cpu", (1,))
    experts.down_proj = torch.nn.Parameter(distribute_tensor(experts.down_proj.detach(), mesh, [Shard(0)]))
    with pytest.raises(UserError, match="train with DDP"):
        freeze_experts(model, FROZEN)


@pytest.mark.parametrize(
    ("fields", "experts", "router", "message"),
    [
        ({}, [5], False, "name some of the 5"),
        ({}, [-1], False, "name some of the 5"),
        ({}, [], False, "name some of the 5"),
        ({"mlp_layer_types": ["dense"] * 3}, [0], False, "no experts to freeze: MoEForCausalLM is a dense model"),
        (
            {"mlp_layer_types": ["dense"] * 3, "routed_attention": "moa"},
            [0],
            False,
            "no experts to freeze: freeze_experts needs sparse feed-forward networks",
        ),
        ({"router_type": "mmoe", "num_tasks": 2}, [0], True, "set router=False"),
        ({"router_type": "hash"}, [0], True, "set router=False"),
    ],
    ids=str,
)
def test_what_cannot_be_frozen(fields, experts, router, message):
    with pytest.raises(UserError, match=message):
        freeze_experts(MoEForCausalLM(tiny_config(**fields)), experts, router)


def test_experts_inside_an_adapter_are_refused():
    model = tiny_model()
    adapted = get_peft_model(model, moe_lora_config(model, r=2))
    with pytest.raises(UserError, match="merge the adapter first"):
        freeze_experts(adapted, FROZEN)
