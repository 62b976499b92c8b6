"""This module tests that the trace of a running model lists the experts of each pass, and that its file is checked."""

import pytest
import torch

from modeling_moe.monitoring import UnreachableRouting
from modeling_moe.offload.recording import LayerTrace, Trace, record_trace
from tests.builders import save_llama, tiny_model
from tests.monitoring.moe_families import tiny_family


def called_with(model) -> dict[str, list[list[int]]]:
    """Notes what each experts module is called with from now on: the ids that name an expert, by the module's name."""
    noted = {}
    for name, module in model.named_modules():
        if "is_transposed" in vars(module):
            noted[name] = []

            def note(module, args, kwargs, own=noted[name]):
                index = next(v for v in (*args, *kwargs.values()) if v is not None and not v.is_floating_point())
                own.append(sorted({i for i in index.flatten().tolist() if 0 <= i < module.num_experts}))

            module.register_forward_pre_hook(note, with_kwargs=True)
    return noted


def check(trace: Trace, noted: dict[str, list[list[int]]], num_experts: int) -> None:
    assert {layer.name: layer.passes for layer in trace.layers} == noted
    assert all(layer.num_experts == num_experts for layer in trace.layers)


def test_generation_is_recorded_pass_by_pass():
    model = tiny_model().eval()
    noted = called_with(model)
    with record_trace(model) as trace:
        model.generate(torch.tensor([[5, 9, 11, 20]]), max_new_tokens=6, min_new_tokens=6, do_sample=False)
    model(torch.tensor([[5, 9]]))  # after the block nothing is recorded
    check(trace, {name: passes[:-1] for name, passes in noted.items()}, 5)
    prefill, *decode = trace.layers[0].passes
    assert len(trace.layers) == 2
    assert len(prefill) >= 3
    assert [len(needed) for needed in decode] == [3] * 5


def test_dropped_assignments_and_null_experts_are_left_out():
    model = tiny_model(num_null_experts=3, eval_capacity_factor=0.5).eval()
    noted = called_with(model)
    with record_trace(model) as trace, torch.no_grad():
        for token in range(4, 24):
            model(torch.full((1, 3), token))
    check(trace, noted, 5)
    assert any(len(needed) < 3 for layer in trace.layers for needed in layer.passes)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_models_of_transformers_are_recorded(family):
    model = tiny_family(family)
    noted = called_with(model)
    with record_trace(model) as trace, torch.no_grad():
        model(input_ids=torch.arange(3, 39).view(2, 18), use_cache=False)
    check(trace, noted, trace.layers[0].num_experts)
    assert all(len(layer.passes) == 1 and layer.passes[0] for layer in trace.layers)


def test_a_dense_model_is_refused(tmp_path):
    from transformers import AutoModelForCausalLM

    dense = AutoModelForCausalLM.from_pretrained(save_llama(tmp_path))
    with pytest.raises(UnreachableRouting, match="LlamaForCausalLM is a dense model"), record_trace(dense):
        pass


def test_a_saved_trace_reads_back_equal(tmp_path):
    trace = Trace([LayerTrace("a.experts", 4, [[0, 3], [], [1]]), LayerTrace("b.experts", 2, [])])
    trace.save(tmp_path / "trace.json")
    assert Trace.load(str(tmp_path / "trace.json")) == trace
    assert [file.name for file in tmp_path.iterdir()] == ["trace.json"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is damaged"),
        ("{}", "is no trace of experts: record one with record_trace"),
        ('{"layers": [{"name": "a"}]}', "is no trace of experts"),
        ('{"layers": [{"name": "a", "num_experts": "4", "passes": [[0]]}]}', "is no trace of experts"),
        ('{"layers": [{"name": "a", "num_experts": 4, "passes": [[1, 0]]}]}', r"a has the pass \[1, 0\]"),
        (
            '{"layers": [{"name": "a", "num_experts": 4, "passes": [[2, 4]]}]}',
            "distinct ids below 4 in ascending order",
        ),
        ('{"layers": [{"name": "a", "num_experts": 4, "passes": [[-1]]}]}', r"a has the pass \[-1\]"),
        ('{"layers": [{"name": "a", "num_experts": 4, "passes": [["x"]]}]}', "is no trace of experts"),
        ('{"layers": [{"name": "a", "num_experts": 4, "passes": [3]}]}', "is no trace of experts"),
    ],
)
def test_a_damaged_trace_is_refused_with_the_file(tmp_path, text, message):
    (tmp_path / "trace.json").write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        Trace.load(tmp_path / "trace.json")
    assert str(tmp_path / "trace.json") in str(caught.value)
