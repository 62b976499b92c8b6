"""These tests train steps without any label, which must not make parameters NaN by 0 / 0."""

import pytest
import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from modeling_moe import MoEForCausalLM
from modeling_moe.router import SCORING_FUNCS
from modeling_moe.router_losses import loss_share, masked_mean
from tests.builders import tiny_config


KINDS = {
    "losses": {"router_aux_loss_coef": 0.1, "router_z_loss_coef": 0.1, "router_seq_aux_loss_coef": 0.1,
               "router_entropy_loss_coef": 0.1},
    "sums": {"router_type": "noisy_topk", "router_importance_loss_coef": 0.1, "router_load_loss_coef": 0.1},
    "global": {"router_aux_loss_coef": 0.1, "router_aux_loss_scope": "global"},
    "remoe": {"router_type": "remoe", "router_sparsity_coef": 0.01},
    "capacity": {"capacity_factor": 0.5, "router_aux_loss_coef": 0.1},
}  # fmt: skip


class Rows(Dataset):
    """A dataset of rows of eight tokens; `labelled` says which rows have labels."""

    def __init__(self, labelled: list[bool]):
        self.labelled = labelled

    def __len__(self):
        return len(self.labelled)

    def __getitem__(self, i):
        ids = (torch.arange(8) * (i + 3)) % 90 + 3
        return {"input_ids": ids, "labels": ids if self.labelled[i] else torch.full((8,), -100)}


def train(kind: str, labelled: list[bool], tmp_path, accumulation: int = 1) -> tuple[dict, dict]:
    """Returns the parameters before and after one optimizer step."""
    torch.manual_seed(0)
    model = MoEForCausalLM(tiny_config(**KINDS[kind]))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    arguments = TrainingArguments(
        str(tmp_path), max_steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=accumulation,
        weight_decay=0.0, learning_rate=0.01, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    Trainer(model=model, args=arguments, train_dataset=Rows(labelled)).train()
    return before, {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_without_labels_leaves_every_parameter_as_it_was(kind, accumulation, tmp_path):
    before, after = train(kind, [False] * 2 * accumulation, tmp_path, accumulation)
    for name, parameter in after.items():
        assert torch.equal(parameter, before[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_micro_batch_without_labels_leaves_the_step_finite(kind, tmp_path):
    before, after = train(kind, [True, True, False, False], tmp_path, accumulation=2)
    assert all(parameter.isfinite().all() for parameter in after.values())
    assert any(not torch.equal(parameter, before[name]) for name, parameter in after.items())


def test_the_share_of_a_step_without_labels_is_zero():
    labels = torch.full((2, 5), -100)
    assert loss_share(labels, num_items_in_batch=torch.tensor(0)) == 0
    assert loss_share(labels, num_items_in_batch=0) == 0
    assert loss_share(torch.ones(2, 5).long(), num_items_in_batch=16) == 0.5


def test_a_mean_of_no_token_is_zero_and_padding_may_hold_anything():
    assert masked_mean(torch.zeros(0, 3), None).tolist() == [0, 0, 0]
    values = torch.tensor([1.0, float("nan"), 3.0, float("inf")], requires_grad=True)
    mean = masked_mean(values, torch.tensor([1, 0, 1, 0]))
    mean.backward()
    assert mean.item() == 2
    assert values.grad.tolist() == [0.5, 0, 0.5, 0]


@pytest.mark.parametrize("scoring_func", SCORING_FUNCS)
def test_scores_that_underflow_have_finite_probabilities(scoring_func):
    logits = torch.full((2, 4), -1000.0, requires_grad=True)
    scores, probs = SCORING_FUNCS[scoring_func](logits)
    assert scores.isfinite().all()
    assert probs.isfinite().all()
