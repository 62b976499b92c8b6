"""These tests make a loss, gradient or weight not finite, and check that the run stops and names the layer."""

import math
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from experiments.router_comparison import load_entries, router_config
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback, default_data_collator

from modeling_moe import MoEForCausalLM
from modeling_moe.training.nan_stop import NanStopMixin, NonFiniteError, watch_outputs
from tests.builders import tiny_model, training_arguments
from tests.ranks import run_ranks


IDS = torch.arange(3, 35).view(8, 4)
NAN = float("nan")


class NanStopTrainer(NanStopMixin, Trainer):
    """transformers' `Trainer` that stops."""


def train(model, tmp_path: Path, ids: torch.Tensor = IDS, callbacks=(), **fields) -> None:
    """Trains two steps of 8 rows."""
    rows = Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()})
    defaults = {"max_steps": 2, "max_grad_norm": 1.0, "learning_rate": 0.1, "train_sampling_strategy": "sequential"}
    NanStopTrainer(
        model=model,
        args=training_arguments(tmp_path, **(defaults | fields)),
        train_dataset=rows,
        data_collator=default_data_collator,
        callbacks=list(callbacks),
    ).train()


def weights(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def spoil_token(model, layer: str, token: int) -> None:
    """Makes a layer's output NaN for batches that hold a token."""
    batch = {}
    model.register_forward_pre_hook(lambda module, args, kwargs: batch.update(kwargs), with_kwargs=True)

    def hook(module, args, output):
        return output * NAN if (batch["input_ids"] == token).any() else output

    model.get_submodule(layer).register_forward_hook(hook)


def spoil_gradient(model, layer: str) -> None:
    """Makes the gradient of a layer's output NaN."""

    def hook(module, args, output):
        states = output[0] if isinstance(output, tuple) else output  # the statistics of a block's router follow
        if states.requires_grad:
            states.register_hook(lambda gradient: gradient * NAN)

    model.get_submodule(layer).register_forward_hook(hook)


@pytest.mark.parametrize("fields", [{}, {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 2}])
@pytest.mark.parametrize("layer", ["model.layers.0.self_attn.q_proj", "model.layers.2.mlp.experts", "lm_head"])
def test_names_the_first_bad_layer(layer, fields, tmp_path):
    model = tiny_model()
    before = weights(model)
    spoil_token(model, layer, token=10)  # in the first half of the batch
    with pytest.raises(
        NonFiniteError, match=rf"^step 1: the loss is .*, and the first output that is not finite is that of {layer};"
    ):
        train(model, tmp_path, **fields)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_the_step_is_the_one_that_fails(tmp_path):
    model = tiny_model()
    spoil_token(model, "model.layers.1.mlp", token=200)
    ids = torch.cat([IDS, IDS.clone().fill_(200)])
    with pytest.raises(NonFiniteError, match=r"^step 2: .* that of model\.layers\.1\.mlp;"):
        train(model, tmp_path, ids)


@pytest.mark.parametrize(
    ("layer", "parameter"),
    [
        ("model.layers.1.self_attn.o_proj", "model.layers.1.self_attn.o_proj.weight"),
        ("model.layers.2.mlp.experts", "model.layers.2.mlp.experts.down_proj"),
        ("model.layers.0.mlp", "model.layers.0.mlp.experts.down_proj"),
    ],
)
@pytest.mark.parametrize("tied", [False, True])
def test_names_the_parameter_nearest_to_a_bad_gradient(tied, layer, parameter, tmp_path):
    model = tiny_model(tie_word_embeddings=tied)
    spoil_gradient(model, layer)
    with pytest.raises(NonFiniteError, match=f"all outputs are finite, and the gradient of {parameter} is not;"):
        train(model, tmp_path)


def test_names_a_bad_weight(tmp_path):
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[2].mlp.experts.down_proj[3, 0, 0] = NAN
    with pytest.raises(NonFiniteError, match=r"the weight model\.layers\.2\.mlp\.experts\.down_proj is not finite;"):
        train(model, tmp_path)


class SpoilWeight(TrainerCallback):
    """Makes a weight NaN after an optimizer step, before the checkpoint of that step is saved."""

    name = "model.layers.2.mlp.experts.down_proj"

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, model, **kwargs):
        """Spoils the weight."""
        if state.global_step == self.step:
            with torch.no_grad():
                model.get_parameter(self.name)[0, 0, 0] = NAN


def test_weights_are_checked_before_a_checkpoint_is_saved(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 1}
    with pytest.raises(
        NonFiniteError, match=f"^step 2: the weight {SpoilWeight.name} is not finite; it was not saved:"
    ):
        train(tiny_model(), tmp_path, callbacks=[SpoilWeight(step=2)], **saving)
    saved = load_file(tmp_path / "checkpoint-1" / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in saved.values())
    assert not list((tmp_path / "checkpoint-2").glob("*.safetensors"))


def test_overflow_of_finite_weights(tmp_path):
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight.fill_(3e38)
    with pytest.raises(NonFiniteError, match=r"that of model\.layers\.0\.self_attn\.v_proj;"):
        train(model, tmp_path)


def test_noise_is_drawn_again(tmp_path):
    model = tiny_model()

    def hook(module, args, output):
        return output * NAN if torch.rand(()) < 0.3 else output

    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_hook(hook)
    with pytest.raises(NonFiniteError, match=r"that of model\.layers\.\d\.self_attn\.o_proj;"):
        train(model, tmp_path, max_steps=50, learning_rate=0.0)


def test_what_a_second_run_does_not_show(tmp_path):
    model, errors = tiny_model(), iter([math.inf, 0.0])

    def hook(module, args, output):
        output.loss = output.loss + next(errors)

    model.register_forward_hook(hook)
    with pytest.raises(
        NonFiniteError, match="a loss or gradient is not finite, although a second run of the batch is"
    ):
        train(model, tmp_path)


def test_a_finite_run_is_left_alone(tmp_path):
    one, two = tiny_model(attention_dropout=0.1), tiny_model(attention_dropout=0.1)
    train(one, tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NanStopMixin, "training_step", Trainer.training_step)
        train(two, tmp_path)
    assert all(torch.equal(parameter, two.get_parameter(name)) for name, parameter in one.named_parameters())


def test_no_router_is_taken_for_broken():
    fields, entries = load_entries(str(Path(__file__).parents[2] / "configuration" / "routers.yaml"))
    for entry in entries:
        model = MoEForCausalLM(router_config(fields, entry)).train()
        with watch_outputs(model) as record:
            model(input_ids=IDS, labels=IDS, task_ids=torch.zeros(8, dtype=torch.long))
        assert record.first_bad is None, entry.name


def rank_main(rank: int, folder: str) -> None:
    model = tiny_model()
    spoil_token(model, "model.layers.1.mlp", token=int(IDS[1, 0]))  # in one process only
    try:
        train(model, Path(folder), ids=IDS[:2], per_device_train_batch_size=1, ddp_find_unused_parameters=False)
    except NonFiniteError as error:
        (Path(folder) / f"{rank}.txt").write_text(str(error))


def test_two_ranks_stop_together(tmp_path):
    run_ranks(rank_main, 2, str(tmp_path))
    messages = {(tmp_path / f"{rank}.txt").read_text() for rank in (0, 1)}
    (message,) = messages
    assert "that of model.layers.1.mlp;" in message
