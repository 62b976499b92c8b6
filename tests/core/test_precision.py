"""These tests check that routers stay fp32 in a model of any dtype: made, loaded, cast, trained, saved and sharded."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from modeling_moe import MoEForCausalLM
from modeling_moe import router as routing
from modeling_moe.lora import moe_lora_config
from tests.builders import tiny_config
from tests.ranks import needs_transformers, run_ranks


HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
SHARED = {"num_shared_experts": 1, "shared_expert_gate": True}
IDS = torch.arange(3, 39).view(4, 9)


def is_router(name: str) -> bool:
    return ".mlp.gate." in name


def check(model, dtype: torch.dtype) -> None:
    """Checks that routers are fp32 and all other parameters have `dtype`, the shared expert's gate included."""
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


def test_under_deepspeed_routers_have_the_models_dtype(tmp_path, monkeypatch):
    """Under DeepSpeed routers have the model's dtype, because DeepSpeed refuses weights of two dtypes."""
    MoEForCausalLM(tiny_config(**SHARED)).save_pretrained(tmp_path)
    monkeypatch.setattr(routing, "deepspeed_config", lambda: {"bf16": {"enabled": True}})
    for model in (
        AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16),
        AutoModelForCausalLM.from_config(tiny_config(**SHARED), dtype=torch.bfloat16),
        MoEForCausalLM(tiny_config(**SHARED)).bfloat16(),
    ):
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


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
    """Small steps add up in fp32: 1e-3 of a weight is less than the last bit of bf16."""
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


def build() -> MoEForCausalLM:
    """Returns a bf16 model without the balance loss, so that the split of a batch has no effect."""
    torch.manual_seed(0)
    return MoEForCausalLM(tiny_config(num_experts=4, router_aux_loss_coef=0.0)).to(torch.bfloat16).train()


def routers_as_groups(folder: str, mesh: DeviceMesh):
    """Shards a model by FSDP2, in which a group of parameters has one dtype."""
    model = build()
    for layer in model.model.layers:
        if layer.is_sparse:
            fully_shard(layer.mlp.gate, mesh=mesh)
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def by_transformers(**sizes: int):
    def load(folder: str, mesh: DeviceMesh):
        plan = DistributedConfig(**sizes)
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, distributed_config=plan).train()

    return load


# engine -> function that wraps a model, and whether each process has a part of the batch
ENGINES = {
    "routers as groups": (routers_as_groups, True),
    "fsdp": (by_transformers(fsdp_size=2), True),
    "tp and ep": (by_transformers(tp_size=2, ep_size=2), False),
    "ddp": (lambda folder, mesh: DistributedDataParallel(build()), True),
}


def split(rank: int, folder: str) -> None:
    """Runs one backward pass under each engine."""
    mesh = init_device_mesh("cpu", (2,))
    for engine, (load, divides) in ENGINES.items():
        model = load(folder, mesh)
        rows = IDS[2 * rank : 2 * rank + 2] if divides else IDS
        model(input_ids=rows, labels=rows).loss.backward()
        gradients = {name.removeprefix("module."): p.grad for name, p in model.named_parameters()}
        gradients = {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in gradients.items()}
        torch.save(gradients, f"{folder}/{engine}{rank}.pt")


@pytest.fixture(scope="module")
def gradients(tmp_path_factory):
    """Returns the folder with the gradients of two processes and of one process."""
    folder = tmp_path_factory.mktemp("split")
    build().save_pretrained(folder)
    run_ranks(split, 2, str(folder))
    model = build()
    for rows in (IDS[:2], IDS[2:]):
        (model(rows, labels=rows).loss / 2).backward()
    return folder, {name: parameter.grad for name, parameter in model.named_parameters()}


@needs_transformers("5.23", "a model split over processes")
@pytest.mark.parametrize("engine", ENGINES)
def test_split_over_processes(engine, gradients):
    folder, expected = gradients
    got = torch.load(folder / f"{engine}0.pt")
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        assert got[name].dtype == gradient.dtype == (torch.float32 if is_router(name) else torch.bfloat16), name
        # bf16 rounds sums in another order differently
        error = (got[name].float() - gradient.float()).norm() / gradient.float().norm()
        assert error < 0.05, (name, error)


def test_lora_trains_the_router_in_fp32(tmp_path):
    model = build()
    adapted = get_peft_model(model, moe_lora_config(model, r=2, experts=True, router=True))
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad and ".gate." in name}
    assert {parameter.dtype for parameter in trained.values()} == {torch.float32}
    with torch.no_grad():
        for parameter in trained.values():
            parameter.mul_(1.001)  # less than the last bit of bf16
    adapted.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(), tmp_path)
    logits = adapted.eval()(IDS).logits
    assert torch.equal(loaded.eval()(IDS).logits, logits)
    merged = loaded.merge_and_unload()
    routers = {name: tensor for name, tensor in merged.state_dict().items() if is_router(name)}
    fresh = build().state_dict()
    for name, tensor in routers.items():
        torch.testing.assert_close(tensor, fresh[name] * 1.001)
