"""These tests compare `finetune` of a model that is split over two processes with one process, and resume it."""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import pytest
import torch
from accelerate import DistributedType, ParallelismConfig, PartialState
from accelerate.state import AcceleratorState
from peft import AutoPeftModelForCausalLM
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, TrainerCallback

from modeling_moe.training import (
    DataArguments,
    FinetuneArguments,
    LongRunArguments,
    LoraArguments,
    ModelArguments,
    NonFiniteError,
    finetune,
)
from modeling_moe.training.sharded import is_split
from modeling_moe.utils.errors import UserError
from tests.builders import sample_text, tiny_model, train_tokenizer
from tests.lora.checkpoints import fill
from tests.ranks import needs_transformers, run_ranks
from tests.selection import by_default, dashed, selected


pytestmark = needs_transformers("5.23", "a model split over processes")
IDS = torch.arange(3, 39).view(4, 9)
PLANS = {
    "fsdp": {"fsdp_size": 2, "batches": 2},
    "fsdp_ep": {"fsdp_size": 2, "ep_size": 2, "batches": 2},
    "tp_ep": {"tp_size": 2, "ep_size": 2},
    "ddp": {"batches": 2, "reentrant": True},
    "accelerate": {"accelerate": True, "batches": 2},
}
FSDP2 = {
    "fsdp": True,
    "fsdp_config": {
        "version": 2,
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "state_dict_type": "FULL_STATE_DICT",
        "reshard_after_forward": True,
        "cpu_ram_efficient_loading": False,
    },
}
CELLS = [("fsdp", "full"), ("fsdp", "router")]
CELLS += [(plan, method) for plan in ("fsdp_ep", "tp_ep", "ddp", "accelerate") for method in ("full", "lora")]
# each plan once, with methods in turn
FEW = [("fsdp", "router"), ("fsdp_ep", "lora"), ("tp_ep", "full"), ("ddp", "lora"), ("accelerate", "full")]
EACH_CELL = pytest.mark.parametrize("cell", by_default(FEW, CELLS), ids=dashed)


class SameFactors(TrainerCallback):
    """Fills the factors by formula, since a split model draws other random numbers."""

    def on_train_begin(self, args, state, control, model, **kwargs):
        """Fills the factors, unless they come from a checkpoint."""
        split = any(isinstance(parameter, DTensor) for parameter in model.parameters())
        assert split == (args.fsdp or is_split(model))
        if state.global_step == 0:
            fill(model, 0.2, only=".lora_A.")


class SpoilLayer(TrainerCallback):
    """Makes a layer's output NaN from the second step on."""

    layer = "model.layers.1.mlp"

    def on_train_begin(self, args, state, control, model, **kwargs):
        """Adds the hook."""

        def hook(module, inputs, output):
            return output * float("nan") if state.global_step == 1 else output

        model.get_submodule(self.layer).register_forward_hook(hook)


def run(
    folder: Path,
    output: Path,
    method: str,
    batches: int = 1,
    resume: str | None = None,
    accelerate: bool = False,
    reentrant: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
    run_args: LongRunArguments | None = None,
    **plan: int | str,
) -> None:
    """Trains four steps of eight blocks."""
    args = FinetuneArguments(
        output_dir=str(output),
        use_cpu=True,
        max_steps=4,
        save_steps=2,
        logging_steps=1,
        learning_rate=1e-2,
        per_device_train_batch_size=4 // batches,
        gradient_accumulation_steps=2,
        gradient_checkpointing=method == "lora",
        gradient_checkpointing_kwargs={"use_reentrant": reentrant},
        resume_from_checkpoint=resume,
        disable_tqdm=True,
        report_to="none",
        **(FSDP2 if accelerate else {}),
    )
    model_args = ModelArguments(str(folder / "model"), method=method, eval_fraction=0.1, **plan)
    data_args = DataArguments(data=[f"a={folder / 'text.txt'}"], max_length=32)
    lora_args, callbacks = LoraArguments(lora_r=2, merge_lora=False), [SameFactors(), *callbacks]
    # Accelerate tells the next run of the process of FSDP by the environment
    with mock.patch.dict(os.environ):
        finetune(model_args, data_args, lora_args, args, callbacks, run_args=run_args)


def let_accelerate_split_on_cpus() -> None:
    """Makes Accelerate use FSDP2 on CPUs, where it would use DDP, by the name of another device."""
    init = AcceleratorState.__init__

    def of_gpus(state, *args, fsdp_plugin=None, **kwargs) -> None:
        if fsdp_plugin is not None and not AcceleratorState._shared_state:
            PartialState(cpu=True)._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        init(state, *args, fsdp_plugin=fsdp_plugin, **kwargs)

    AcceleratorState.__init__ = of_gpus


def rank_main(rank: int, folder: str, cells: list[tuple[str, str]]) -> None:
    """Runs plans and methods, and resumes each from the second step."""
    # Accelerate refuses tensor parallelism without GPUs, and transformers does it alone
    ParallelismConfig._validate_accelerator = lambda *_: None
    let_accelerate_split_on_cpus()
    root = Path(folder)
    try:
        run(root, root / "nan", "full", callbacks=[SpoilLayer()], **PLANS["fsdp_ep"])
    except NonFiniteError as error:
        (root / f"nan_{rank}.txt").write_text(str(error))
    for name, method in cells:
        whole, resumed = root / f"{name}_{method}", root / f"{name}_{method}_resumed"
        run(root, whole, method, **PLANS[name])
        torch.distributed.barrier()
        if rank == 0:
            shutil.copytree(whole / "checkpoint-2", resumed / "checkpoint-2")
        torch.distributed.barrier()
        run(root, resumed, method, resume="true", **PLANS[name])
    try:
        run(root, root / "bf16", "full", dtype="bfloat16", **PLANS["accelerate"])
    except UserError as error:
        (root / f"bf16_{rank}.txt").write_text(str(error))


@pytest.fixture(scope="module")
def folder(request, tmp_path_factory):
    """Trains one checkpoint on one text with one process and with two."""
    cells = selected(request, "cell")
    folder = tmp_path_factory.mktemp("sharded_training")
    # two processes can share six experts; a loss of the batch would depend on the split
    model = tiny_model(
        num_experts=6, router_aux_loss_coef=0.0, router_z_loss_coef=0.1,
        scoring_func="sigmoid", router_selection_bias=True, router_bias_update_rate=0.125,
    )  # fmt: skip
    model.save_pretrained(folder / "model")
    train_tokenizer().save_pretrained(folder / "model")
    (folder / "text.txt").write_text(sample_text(), encoding="utf-8")
    run_ranks(rank_main, 2, str(folder), cells)
    for method in {method for _, method in cells}:
        run(folder, folder / f"one_{method}", method)
    return folder


def losses(output: Path, name: str = "loss") -> list[float]:
    log = json.loads((output / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
    return [row[name] for row in log if name in row]


@torch.no_grad()
def logits(output: Path, method: str) -> torch.Tensor:
    """Returns the logits of the saved model, loaded whole."""
    loader = AutoPeftModelForCausalLM if method == "lora" else AutoModelForCausalLM
    return loader.from_pretrained(output).eval()(IDS).logits


@EACH_CELL
def test_two_processes_equal_one(cell, folder):
    plan, method = cell
    got, expected = folder / f"{plan}_{method}", folder / f"one_{method}"
    assert len(losses(got)) == 4
    torch.testing.assert_close(losses(got), losses(expected), rtol=0, atol=1e-4)
    torch.testing.assert_close(losses(got, "grad_norm"), losses(expected, "grad_norm"), rtol=1e-3, atol=0)
    torch.testing.assert_close(logits(got, method), logits(expected, method), rtol=0, atol=1e-2)


@EACH_CELL
def test_resumes_exactly(cell, folder):
    plan, method = cell
    whole, resumed = folder / f"{plan}_{method}", folder / f"{plan}_{method}_resumed"
    assert losses(resumed) == losses(whole)
    assert torch.equal(logits(resumed, method), logits(whole, method))


def test_stops_at_nan(folder):
    (message,) = {(folder / f"nan_{rank}.txt").read_text() for rank in range(2)}
    assert message.startswith(
        "step 2: the loss is nan, and the first output that is not finite is that of model.layers.1.mlp;"
    )


def test_weights_of_two_dtypes_under_fsdp(folder):
    (message,) = {(folder / f"bf16_{rank}.txt").read_text() for rank in range(2)}
    assert message.startswith("dtype: FSDP trains the weights of a layer in one dtype, and routers stay in float32")
    assert not list((folder / "bf16").rglob("*.safetensors"))


def test_too_few_processes(folder, tmp_path):
    with pytest.raises(UserError, match=r"is 2 processes, and there are 1: start 2 with torchrun"):
        run(folder, tmp_path / "out", "full", fsdp_size=2)
    assert not (tmp_path / "out").exists()


def test_sizes_that_do_not_fit(folder):
    with pytest.raises(UserError, match=r"fsdp_size, tp_size, ep_size: .*ep_size"):
        ModelArguments("model", fsdp_size=2, ep_size=3)
