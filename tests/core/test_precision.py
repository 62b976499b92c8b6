"""Routers keep their weights in fp32 whatever the model's dtype: loaded, made, cast, trained, saved and split."""

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

from modeling_moe import MoEConfig, MoEForCausalLM
from tests.conftest import tiny_config
from tests.ranks import run_ranks


HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
SHARED = {"num_shared_experts": 1, "shared_expert_gate": True}
IDS = torch.arange(3, 39).view(4, 9)


def is_router(name: str) -> bool:
    return ".mlp.gate." in name


def check(model, dtype: torch.dtype) -> None:
    """Routers in fp32, all else in `dtype`, the gate of the shared expert too."""
    dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    assert {dtypes[name] for name in dtypes if is_router(name)} == {torch.float32}
    assert {dtypes[name] for name in dtypes if not is_router(name)} == {dtype}
    assert dtypes["model.layers.0.mlp.shared_expert_gate.weight"] == dtype


@HALVES
def test_loaded_made_and_cast(dtype, tmp_path):
    MoEForCausalLM(tiny_config(**SHARED)).save_pretrained(tmp_path)
    check(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype), dtype)
    check(AutoModelForCausalLM.from_config(tiny_config(**SHARED), dtype=dtype), dtype)
    for cast in (lambda model: model.to(dtype), lambda model: model.type(dtype)):
        check(cast(MoEForCausalLM(tiny_config(**SHARED))), dtype)
    check(getattr(MoEForCausalLM(tiny_config(**SHARED)), "half" if dtype == torch.float16 else "bfloat16")(), dtype)


def test_casts_upwards_and_back():
    model = MoEForCausalLM(tiny_config(**SHARED))
    weight = model.model.layers[0].mlp.gate.weight.detach().clone()
    assert {tensor.dtype for tensor in model.double().state_dict().values()} == {torch.float64}
    assert {tensor.dtype for tensor in model.float().state_dict().values()} == {torch.float32}
    assert torch.equal(model.bfloat16().float().model.layers[0].mlp.gate.weight, weight)  # no bit was lost


def test_on_the_meta_device():
    with torch.device("meta"):
        model = MoEForCausalLM(tiny_config(**SHARED)).to(torch.bfloat16)
    check(model, torch.bfloat16)
    check(model.to_empty(device="cpu"), torch.bfloat16)


@HALVES
def test_saved_and_loaded_bit_for_bit(dtype, tmp_path):
    model = MoEForCausalLM(tiny_config(**SHARED)).to(dtype)
    model.save_pretrained(tmp_path / "first")
    stored = load_file(tmp_path / "first" / "model.safetensors")
    assert stored["model.layers.0.mlp.gate.weight"].dtype == torch.float32
    assert stored["model.layers.0.mlp.experts.0.up_proj.weight"].dtype == dtype
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "first", dtype="auto")
    before, after = model.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype, name
        assert torch.equal(tensor, after[name]), name
    loaded.save_pretrained(tmp_path / "second")
    assert (tmp_path / "first" / "model.safetensors").read_bytes() == (
        tmp_path / "second" / "model.safetensors"
    ).read_bytes()


def test_a_small_update_is_kept():
    """1e-3 of a weight is less than the last bit of bf16, and Adam takes many such steps."""
    model = MoEForCausalLM(tiny_config()).to(torch.bfloat16).train()
    weight, expert = model.model.layers[0].mlp.gate.weight, model.model.layers[0].mlp.experts.down_proj
    with torch.no_grad():
        weight.fill_(0.5)
        expert.fill_(0.5)
        for _ in range(10):
            weight.mul_(1.001)
            expert.mul_(1.001)
    torch.testing.assert_close(weight, torch.full_like(weight, 0.5 * 1.001**10))
    assert (expert == 0.5).all()
    model(IDS, labels=IDS).loss.backward()
    assert weight.grad.dtype == torch.float32
    assert weight.grad.any()


def build(dtype=torch.bfloat16) -> MoEForCausalLM:
    torch.manual_seed(0)
    config: MoEConfig = tiny_config(num_experts=4, num_experts_per_tok=2, router_aux_loss_coef=0.0)
    return MoEForCausalLM(config).to(dtype).train()


def sharded(rank: int, folder: str) -> None:
    """One step of half the batch under FSDP2, in which a group of parameters has one dtype: routers are groups."""
    mesh, model = init_device_mesh("cpu", (2,)), build()
    for layer in model.model.layers:
        if layer.is_sparse:
            fully_shard(layer.mlp.gate, mesh=mesh)
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    rows = IDS[2 * rank : 2 * rank + 2]
    model(rows, labels=rows).loss.backward()
    gradients = {name: parameter.grad.full_tensor() for name, parameter in model.named_parameters()}
    if rank == 0:
        torch.save(gradients, f"{folder}/gradients.pt")


def test_split_by_fsdp2_in_bf16(tmp_path):
    run_ranks(sharded, 2, str(tmp_path))
    gradients = torch.load(tmp_path / "gradients.pt")
    model = build()
    for rows in (IDS[:2], IDS[2:]):
        (model(rows, labels=rows).loss / 2).backward()
    for name, parameter in model.named_parameters():
        assert gradients[name].dtype == parameter.dtype, name
        # bf16 sums in another order
        error = (gradients[name].float() - parameter.grad.float()).norm() / parameter.grad.float().norm()
        assert error < 0.03, name
