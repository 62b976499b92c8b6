"""These tests compare the gradient of one optimizer step between splits of its batch, in transformers' `Trainer`.

Each cell of the table is one step on the same 16 sequences of unequal lengths, prompts and label counts, with one
number of accumulated micro-batches, one number of processes and one kind of checkpointing. Only
`modeling_moe.training.enable()` prepares the Trainer.
"""

import gc
from contextlib import ExitStack
from itertools import product
from pathlib import Path
from unittest import mock

import pytest
import torch
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence
from transformers import DataCollatorWithFlattening, Trainer, TrainerCallback, default_data_collator

import modeling_moe.training
from modeling_moe import MoEForCausalLM
from modeling_moe.router_balancing import exact_global_balance
from modeling_moe.router_topk import NoisyTopKRouter
from tests.builders import tiny_model, training_arguments
from tests.ranks import run_ranks
from tests.selection import by_default, dashed, selected


SEQUENCES, RANKS = 16, (1, 2)
SPLITS = (1, 2, 4, 8)  # numbers of micro-batches; with 2 processes they have 8, 4, 2 and 1 sequences
CHECKPOINTING = {
    "none": {},
    "non_reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
}
BIAS = {"router_selection_bias": True, "router_bias_update_rate": 0.125}
SUMS = {
    "router_z_loss_coef": 0.3,
    "router_entropy_loss_coef": 2.0,
    "router_seq_aux_loss_coef": 4.0,
    "router_aux_loss_coef": 4.0,
    "router_aux_loss_scope": "sequence",
} | BIAS
GLOBAL = {"router_aux_loss_coef": 8.0, "router_aux_loss_scope": "global"}
BATCH = {"router_aux_loss_coef": 100.0, "router_aux_loss_scope": "batch"}
# the gradient of each of these losses is about 25 times that of the cross entropy
IMPORTANCE = {"router_type": "noisy_topk", "router_importance_loss_coef": 25.0, "router_load_loss_coef": 100.0}
# kind of batch -> router losses, how the sequences are batched, fields of TrainingArguments
KINDS = {
    "padded": (SUMS, "padded", {}),
    "padding_free": (SUMS, "padding_free", {}),
    "packed": (SUMS, "packed", {}),
    "label_smoothing": (SUMS, "padded", {"label_smoothing_factor": 0.1}),
    "label_smoothing_padding_free": (SUMS, "padding_free", {"label_smoothing_factor": 0.1}),
    "global": (GLOBAL, "padded", {}),
    "batch": (BATCH, "padded", {}),
    "batch_importance": (IMPORTANCE, "padded", {}),
    "same_importance": (IMPORTANCE, "same", {}),
    "same_importance_label_smoothing": (IMPORTANCE, "same", {"label_smoothing_factor": 0.1}),
}
OWN_SIZE = ("batch", "batch_importance")  # kinds whose router losses are not additive over micro-batches
CELLS = [("padded", *cell) for cell in product(SPLITS, CHECKPOINTING)]
CELLS += [(kind, split, "none") for kind in KINDS if kind != "padded" for split in (1, 8)]
CELLS += [(kind, 4, "reentrant") for kind in KINDS if kind not in ("padded", *OWN_SIZE)]
# each kind whole and in eight micro-batches, and each checkpointing of padded batches
FEW = [(kind, split, "none") for kind in KINDS for split in (1, 8)]
FEW += [("padded", 2, "none"), ("padded", 8, "non_reentrant"), ("padded", 4, "reentrant")]


def sequences() -> list[dict]:
    """Returns sequences with labels after a prompt; the last sequence is only a prompt."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for i in range(SEQUENCES):
        length = 6 + int(torch.randint(16, (), generator=generator))
        prompt = length if i == SEQUENCES - 1 else int(torch.randint(1, length - 1, (), generator=generator))
        ids = torch.randint(3, 300, (length,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return rows


def same() -> list[dict]:
    """Returns copies of one sequence."""
    return sequences()[:1] * SEQUENCES


def packed() -> list[dict]:
    """Returns rows of 40 tokens, each packed from three sequences."""
    rows = []
    for first, second in zip(sequences(), reversed(sequences()), strict=True):
        rest = [5] * (43 - len(first["input_ids"]) - len(second["input_ids"]))
        parts = [first, second, {"input_ids": rest, "labels": [-100, *rest[1:]]}]
        row = {name: [x for part in parts for x in part[name]] for name in ("input_ids", "labels")}
        rows.append(row | {"position_ids": [i for part in parts for i in range(len(part["labels"]))]})
    return rows


def pad(rows: list[dict]) -> dict[str, torch.Tensor]:
    """Pads on the right to the longest sequence of the micro-batch."""
    columns = {name: [torch.tensor(row[name]) for row in rows] for name in ("input_ids", "labels")}
    columns["attention_mask"] = [torch.ones_like(ids) for ids in columns["input_ids"]]
    values = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    return {name: pad_sequence(columns[name], True, value) for name, value in values.items()}


BATCHINGS = {
    "padded": (sequences, pad),
    "padding_free": (sequences, DataCollatorWithFlattening(return_tensors="pt")),
    "packed": (packed, default_data_collator),
    "same": (same, pad),
}


class Recorder(TrainerCallback):
    """Keeps all gradients of the step, and the buffers that the step moved."""

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        """Copies the gradients."""
        self.step = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    def on_step_end(self, args, state, control, model, **kwargs):
        """Copies the selection biases."""
        self.step |= {name: x.clone() for name, x in model.named_buffers() if name.endswith("correction_bias")}


class ExactTrainer(Trainer):
    """Counts the load of the step's micro-batches before the first of them."""

    def get_batch_samples(self, *args):
        """Enters [`exact_global_balance`] until training ends, after one step."""
        batches, items = super().get_batch_samples(*args)
        self.model.train()
        self.stack.enter_context(exact_global_balance(self.model, [self._prepare_inputs(dict(b)) for b in batches]))
        return batches, items


def model_of(coefficients: dict[str, float | str | bool]) -> MoEForCausalLM:
    """Returns the tiny model with random routers, which `noisy_topk` would start at 0."""
    model = tiny_model(**({"router_aux_loss_coef": 0.0} | coefficients))
    for router in model.modules():
        if isinstance(router, NoisyTopKRouter):
            torch.nn.init.normal_(router.weight, std=0.2)
            torch.nn.init.normal_(router.noise_weight, std=0.2)
    return model


def run(kind: str, split: int, checkpointing: str, ranks: int, folder: Path) -> dict[str, torch.Tensor]:
    """Returns the gradients and biases of one step."""
    modeling_moe.training.enable()
    coefficients, batching, fields = KINDS[kind]
    rows, collator = BATCHINGS[batching]
    args = training_arguments(
        folder,
        per_device_train_batch_size=SEQUENCES // split // ranks,
        gradient_accumulation_steps=split,
        **fields,
        **CHECKPOINTING[checkpointing],
    )
    recorder = Recorder()
    trainer = (ExactTrainer if kind == "global" else Trainer)(
        model=model_of(coefficients),
        args=args,
        train_dataset=Dataset.from_list(rows()),
        data_collator=collator,
        callbacks=[recorder],
    )
    # another split would draw other noise for a token; the load loss has a gradient without noise too
    without_noise = mock.patch.object(torch, "randn_like", torch.zeros_like)
    with ExitStack() as trainer.stack, without_noise:
        trainer.train()
    return recorder.step


def rank_main(rank: int, folder: str, cells: list[tuple[str, int, str]]) -> None:
    """Runs cells in one of two processes."""
    gc.freeze()  # `Trainer` collects garbage after training, which would scan all imported modules
    steps = {cell: run(*cell, 2, Path(folder)) for cell in cells}
    torch.save(steps, f"{folder}/rank{rank}.pt")


@pytest.fixture(scope="module")
def table(request, tmp_path_factory):
    """Maps (kind, split, checkpointing, ranks) to gradients and biases of `FEW` and of the selected tests' cells."""
    folder = tmp_path_factory.mktemp("cells")
    cells = [*dict.fromkeys([*FEW, *selected(request, "cell")])]
    context = run_ranks(rank_main, 2, str(folder), cells, join=False)
    gc.freeze()
    steps = {(*cell, 1): run(*cell, 1, folder) for cell in cells}
    gc.unfreeze()
    while not context.join():
        pass
    for rank in range(2):
        of_rank = torch.load(folder / f"rank{rank}.pt")
        steps |= {(*cell, 2 if rank == 0 else "other rank"): step for cell, step in of_rank.items()}
    return steps


def assert_same_step(got: dict, expected: dict) -> None:
    """Compares tensors to 1e-5 of the largest entry, and biases exactly."""
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        limit = 0.0 if name.endswith("bias") else 1e-5 * tensor.abs().max().item()
        torch.testing.assert_close(got[name], tensor, rtol=0, atol=limit, msg=lambda text, name=name: f"{name} {text}")


def routers(step: dict) -> torch.Tensor:
    """Returns the routers' gradients as one vector."""
    return torch.cat([gradient.flatten() for name, gradient in step.items() if name.endswith("gate.weight")])


@pytest.mark.parametrize("ranks", [*RANKS, "other rank"])
@pytest.mark.parametrize(
    "cell",
    by_default(*([cell for cell in cells if cell[0] not in OWN_SIZE] for cells in (FEW, CELLS))),
    ids=dashed,
)
def test_gradient_of_a_step_is_that_of_the_whole_batch(cell, ranks, table):
    assert_same_step(table[(*cell, ranks)], table[cell[0], 1, "none", 1])


@pytest.mark.parametrize("prefix", ["", "label_smoothing_"], ids=["labels", "label_smoothing"])
def test_padding_free_is_padded(prefix, table):
    padded = "label_smoothing" if prefix else "padded"
    assert_same_step(table[f"{prefix}padding_free", 1, "none", 1], table[padded, 1, "none", 1])


@pytest.mark.parametrize("size", [(1, 2), (8, 1), (8, 2)], ids=str)
@pytest.mark.parametrize("kind", OWN_SIZE)
def test_losses_of_the_batch_keep_their_size(kind, size, table):
    """The mean of the micro-batches' losses is compared with the loss of the whole batch.

    Losses of a few short sequences differ from the loss of the batch: along the gradient of the batch, their mean is
    0.2 to 1.4 of it, depending on the router's noise. A sum over processes or micro-batches would be 1.8 of it or
    more.
    """
    whole, got = (routers(table[kind, split, "none", ranks]) for split, ranks in ((1, 1), size))
    assert 0.1 < (got @ whole / (whole @ whole)).item() < 1.6
