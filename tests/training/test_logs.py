"""These tests show what a fine-tuning logs of the routing, and what its progress bar shows."""

import json
import logging
import re

import pytest
from transformers import TrainerCallback

from modeling_moe.monitoring import RoutingCallback
from modeling_moe.training import DataArguments, FinetuneArguments, LoraArguments, ModelArguments, finetune
from modeling_moe.utils.errors import UserError
from tests.builders import save_llama, tiny_model


KEY = "routing/layer_02/max_violation"


class Fails(TrainerCallback):
    """Ends a run at its second step, and counts the hooks of the model then."""

    def on_step_begin(self, args, state, control, model, **kwargs):
        """Fails."""
        self.model = model
        if state.global_step == 1:
            self.hooks = count_hooks(model)
            raise RuntimeError("the disk is full")


def count_hooks(model) -> int:
    """Returns the number of hooks on a model."""
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())


def run(source, text_file, output_dir, *callbacks, **fields) -> list[dict]:
    """Fine-tunes for four steps, and returns the log of the last checkpoint."""
    settings = {"max_steps": 4, "logging_steps": 2, "save_steps": 4, "disable_tqdm": True, "use_cpu": True}
    finetune(
        ModelArguments(str(source), eval_fraction=0.0),
        DataArguments([f"wiki={text_file}"], max_length=32),
        LoraArguments(),
        FinetuneArguments(str(output_dir), report_to="none", **(settings | fields)),
        callbacks,
    )
    return json.loads((output_dir / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]


@pytest.fixture
def source(tokenizer, tmp_path):
    """A folder with a tiny model and its tokenizer."""
    tiny_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_the_routing_is_logged_with_the_loss_and_the_bar_shows_it(source, text_file, tmp_path, capsys):
    log = run(source, text_file, tmp_path / "out", disable_tqdm=False)
    assert [row["step"] for row in log if KEY in row] == [1, 2, 4]
    shown = capsys.readouterr()
    bars = re.findall(r"loss=([\d.]+), MaxVio=([\d.]+)", shown.err)
    assert bars[-1] == (f"{log[-1]['loss']:.4g}", f"{log[-1]['routing/max_violation']:.4g}")
    assert "routing/max_violation" in shown.out + shown.err
    assert "routing/router_grad_norm" not in shown.out + shown.err


@pytest.mark.parametrize(("steps", "logged"), [(0, []), (3, [3, 4])])
def test_routing_steps_sets_the_interval_and_the_last_step_is_read(steps, logged, source, text_file, tmp_path):
    log = run(source, text_file, tmp_path / "out", routing_steps=steps)
    assert [row["step"] for row in log if KEY in row] == logged


def test_the_callers_own_callback_is_the_only_one(source, text_file, tmp_path):
    log = run(source, text_file, tmp_path / "out", RoutingCallback(every=3))
    assert [row["step"] for row in log if KEY in row] == [3, 4]


def test_a_dense_model_is_no_reason_to_warn_unless_the_routing_is_asked_for(text_file, tmp_path, caplog):
    dense = save_llama(tmp_path / "dense")
    with caplog.at_level(logging.WARNING):
        run(dense, text_file, tmp_path / "out")
        assert "dense model" not in caplog.text
        run(dense, text_file, tmp_path / "asked", routing_steps=2)
    assert "LlamaForCausalLM is a dense model" in caplog.text


def test_a_negative_interval_is_refused(tmp_path):
    with pytest.raises(UserError, match="routing_steps is -1"):
        FinetuneArguments(str(tmp_path), routing_steps=-1)


def test_an_exception_leaves_no_hook_on_the_model(source, text_file, tmp_path):
    fails = Fails()
    with pytest.raises(RuntimeError, match="disk is full"):
        run(source, text_file, tmp_path / "out", fails)
    assert count_hooks(fails.model) == 0 < fails.hooks
