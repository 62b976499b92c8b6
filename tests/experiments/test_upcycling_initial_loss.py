"""These tests check the table of initial losses: exact methods are exact, others differ, and a broken claim is an
error.
"""

import json
from dataclasses import asdict

import pytest
import torch
from experiments.files import write_json
from experiments.upcycling_initial_loss import (
    METHODS,
    InitialLoss,
    TableArguments,
    chosen_methods,
    compare_logits,
    initial_loss_table,
    refuse_broken_claims,
    with_own_rows,
)
from transformers import AutoModelForCausalLM, LlamaConfig

from modeling_moe.conversion import load_state, open_checkpoint
from modeling_moe.upcycling import UpcyclingOptions, assemble, sparse_config
from modeling_moe.utils.errors import UserError
from tests.builders import sample_text, train_tokenizer


SIZE = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}
INEXACT = {
    "copy, pre-softmax, unscaled",
    "copy, pre-softmax, Megatron",
    "copy, pre-softmax, std .02",
    "copy, pre-softmax, std .002",
    "virtual groups, Megatron",
    "virtual groups, unscaled",
    "virtual groups, pre-softmax, Megatron",
    "virtual groups, pre-softmax, std .02",
    "virtual groups, pre-softmax, std .002",
    "virtual groups, broken",
    "fine-grained, no virtual groups",
    "copy, 5% noise",
    "attention experts, 5% noise",
    "copy, noise of .01",
    "drop .5",
    "drop .1",
    "split, 4 of 8",
    "split, 6 of 8",
    "clustered split, 4 of 8",
    "clustered split, 6 of 8",
}
# methods that keep whole dense networks and change them only a little
SMALL = {
    "copy, pre-softmax, std .02",
    "copy, pre-softmax, std .002",
    "copy, 5% noise",
    "copy, noise of .01",
    "attention experts, 5% noise",
}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("dense")
    AutoModelForCausalLM.from_config(LlamaConfig(**SIZE)).save_pretrained(folder)
    train_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def arguments(dense, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    texts = {"words": sample_text(), "code": "def f(x):\n    return x + 1\n" * 1000}
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    return {
        "model_name_or_path": str(dense),
        "data": [f"{name}={folder / name}.txt" for name in texts],
        "tokens": 32,
        "calibration_tokens": 300,
    }


@pytest.fixture(scope="module")
def table(arguments):
    return initial_loss_table(TableArguments(**arguments))


def test_all_methods_and_their_claims(table):
    results = {result.name: result for result in table.results}
    assert list(results) == [method.name for method in METHODS]
    assert {name for name, result in results.items() if result.reason_not_exact} == INEXACT
    for name, result in results.items():
        if name not in INEXACT:
            assert result.largest_difference < 1e-4, name
            assert abs(result.delta_loss) < 1e-5, name


def test_what_is_not_exact_is_seen(table):
    for result in table.results:
        if result.name in INEXACT - SMALL:
            assert result.largest_difference > 0.05, result.name
            assert result.delta_loss != 0, result.name
    differences = {result.name: result.largest_difference for result in table.results}
    assert differences["copy, pre-softmax, std .002"] < differences["copy, pre-softmax, std .02"]
    assert differences["drop .1"] < differences["drop .5"]
    assert differences["virtual groups"] < 1e-3 * differences["virtual groups, Megatron"]


def test_the_same_seed_gives_the_same_table(arguments, table):
    names = ["drop .5", "clustered split, 4 of 8"]
    again = initial_loss_table(TableArguments(**arguments, only=names)).results
    assert again == [result for result in table.results if result.name in names]
    other = initial_loss_table(TableArguments(**arguments, only=["drop .5"], seed=1)).results
    assert other[0].delta_loss != again[0].delta_loss


def test_compare_logits():
    class Fixed(torch.nn.Module):
        def forward(self, input_ids, use_cache):
            return type("Output", (), {"logits": torch.tensor([[[0.0, 3.0], [9.0, 9.0]]])})

    delta, difference = compare_logits(Fixed(), torch.tensor([[0, 1]]), torch.tensor([[[0.0, 0.0], [9.0, 9.5]]]))
    assert delta == pytest.approx(torch.log1p(torch.exp(torch.tensor(-3.0))).item() - 0.6931472, abs=1e-6)
    assert difference == 3


def result(reason_not_exact: str | None, difference: float) -> InitialLoss:
    return InitialLoss("a", "b", "", reason_not_exact, 0.0, difference)


@pytest.mark.parametrize("difference", [2e-3, float("nan")])
def test_a_broken_claim_is_an_error(difference):
    refuse_broken_claims([result(None, 9e-4), result("drop", difference)])
    with pytest.raises(UserError, match=r"a \((2\.0e-03|nan)\)"):
        refuse_broken_claims([result(None, 9e-4), result(None, difference)])


def test_own_rows_part_the_shards(dense):
    checkpoint = open_checkpoint(str(dense), dtype="float32")
    options = UpcyclingOptions(num_experts=8, granularity=4, num_experts_per_tok=4)
    config = sparse_config(checkpoint.config, options, torch.float32)
    tied = assemble([checkpoint.state], config, options, {})
    parted = with_own_rows(tied, config, options)
    name = "model.layers.1.mlp.gate.weight"
    assert len(tied[name].read().unique(dim=0)) == 2
    assert len(parted[name].read().unique(dim=0)) == 8
    assert load_state(config, parted).config.num_experts == 8


def test_refusals(arguments, tmp_path):
    with pytest.raises(UserError, match="only 'coyp' is unknown"):
        chosen_methods(["coyp"])
    with pytest.raises(UserError, match="tokens is 1"):
        TableArguments(**arguments | {"tokens": 1})
    with pytest.raises(UserError, match="make the folder"):
        TableArguments(**arguments, output_json=str(tmp_path / "no" / "t.json"))
    with pytest.raises(UserError, match=r"tokens is 99999, but domain 'words' has \d+ held-out tokens"):
        initial_loss_table(TableArguments(**arguments | {"tokens": 99999}))


def test_json(arguments, tmp_path):
    write_json(str(tmp_path / "t.json"), asdict(TableArguments(**arguments)), {"rows": [1]})
    record = json.loads((tmp_path / "t.json").read_text())
    assert record["rows"] == [1]
    assert record["arguments"]["tokens"] == 32
    assert record["torch"] == torch.__version__
    assert [path.name for path in tmp_path.iterdir()] == ["t.json"]
