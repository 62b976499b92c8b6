"""These tests compare the figures of a watch with counts by hand."""

import math
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode

import modeling_moe
from modeling_moe import watch
from modeling_moe.monitoring import RoutingWatch, observe, routing_metrics
from modeling_moe.monitoring.layer_sums import add_pass, new_sums
from modeling_moe.router import Routing
from tests.builders import tiny_model
from tests.monitoring.moe_families import sharpen
from tests.training.families import tiny


IDS = torch.arange(3, 59).view(4, 14)
MASK = torch.ones_like(IDS)
MASK[0, :5] = MASK[2, :1] = 0
REAL = MASK.flatten().bool()


def mixtral():
    model = tiny("mixtral")
    sharpen(model)
    return model


def sigmoid():
    model = tiny("glm4_moe")
    sharpen(model)
    return model


BUILD = pytest.mark.parametrize("build", [tiny_model, mixtral, sigmoid])


def routings(model, **inputs) -> list[Routing]:
    """Returns the routing of each layer, of real tokens alone, without a watch."""
    seen = []
    with observe(model, seen.append), torch.no_grad():
        model(**inputs)
    score = torch.sigmoid if model.config.model_type == "glm4_moe" else lambda logits: logits.softmax(dim=-1)
    found = []
    for event in seen:
        probs = score(event.logits.double())
        found.append(Routing(event.logits, event.weight, event.index, probs / probs.sum(dim=-1, keepdim=True)))
    return found


@BUILD
def test_figures_are_those_of_the_metrics(build):
    model = build().eval()
    with watch(model) as routing:
        model(input_ids=IDS, attention_mask=MASK)
    figures = routing.read()
    for layer, expected in zip(figures.layers, routings(model, input_ids=IDS, attention_mask=MASK), strict=True):
        metrics = {name: value.item() for name, value in routing_metrics.summary(expected, REAL).items()}
        assert {name: getattr(layer, name) for name in metrics} == pytest.approx(metrics, rel=1e-5, abs=1e-7)
        chosen = expected.index[REAL].flatten().tolist()
        assert layer.load.tolist() == [chosen.count(expert) for expert in range(layer.num_experts)]
        assert layer.load.dtype == torch.float64
        assert layer.tokens == REAL.sum()
        assert (layer.empty_share, layer.dropped_share) == (0, 0)
        together = routing_metrics.co_activation(expected, REAL)
        torch.testing.assert_close(layer.co_activation, together.double(), atol=1e-6, rtol=0)
        assert 0 <= layer.token_entropy <= layer.marginal_entropy <= math.log(layer.num_experts)


@BUILD
def test_figures_do_not_depend_on_the_batches(build):
    model = build().double().eval()
    model.set_experts_implementation("eager")
    with watch(model) as whole:
        model(input_ids=IDS, attention_mask=MASK)
    with watch(model) as parts:
        for row in range(4):
            model(input_ids=IDS[row : row + 1], attention_mask=MASK[row : row + 1])
    one, many = whole.read(), parts.read()
    for left, right in zip(one.layers, many.layers, strict=True):
        assert torch.equal(left.load, right.load)
        assert torch.equal(left.co_activation, right.co_activation)
        assert left.tokens == right.tokens
    assert one.overall == pytest.approx(many.overall, rel=1e-9, abs=1e-12)
    assert one.scalars() == pytest.approx(many.scalars(), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_repeated_pass_counts_once(use_reentrant):
    model = tiny_model().train()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    with watch(model, training_only=True) as routing:
        for _ in range(2):  # gradient accumulation
            model(input_ids=IDS, attention_mask=MASK, labels=IDS).loss.backward()
        with torch.no_grad():  # a reference model
            model(input_ids=IDS, attention_mask=MASK)
    assert [layer.tokens for layer in routing.read().layers] == [2 * REAL.sum()] * 2


@pytest.mark.parametrize("build", [tiny_model, mixtral])
@pytest.mark.parametrize(
    "options",
    [{}, {"cache_implementation": "static", "disable_compile": True}, {"num_beams": 2}],
    ids=["", "static", "beams"],
)
def test_tokens_of_generation_count_once(build, options):
    model = build().eval()
    with watch(model) as routing:
        model.generate(
            IDS, attention_mask=MASK, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0, **options
        )
    # the last token is never read
    expected = (REAL.sum() + 3 * 4) * options.get("num_beams", 1)
    figures = routing.read()
    assert figures.notes == []
    assert [layer.tokens for layer in figures.layers] == [expected] * len(figures.layers)


def test_dropped_and_empty_assignments():
    model = tiny_model(capacity_factor=0.5, num_null_experts=2).train()
    seen = []
    with watch(model) as routing, observe(model, seen.append):
        model(input_ids=IDS, attention_mask=MASK)
    for layer, event in zip(routing.read().layers, seen, strict=True):
        index, arrived = event.index[REAL], event.arrived[REAL]
        assert layer.dropped_share == pytest.approx((index != arrived).double().mean().item())
        assert layer.dropped_share > 0
        assert layer.empty_share == pytest.approx((index >= 5).double().mean().item())
        assert layer.mean_experts == pytest.approx(3 * (1 - layer.empty_share))
        assert layer.load.sum() == (index < 5).sum()


def test_counts_stay_exact_beyond_what_fp32_holds():
    model = mixtral().eval()
    with watch(model) as routing:
        model(input_ids=IDS)
        routing._sums["model.layers.0.mlp.experts"].counts += 2**30
        routing._sums["model.layers.0.mlp.experts"].tokens += 2**30
        model(input_ids=IDS)
    assert routing.read().layers[0].tokens == 2**30 + 2 * IDS.numel()


def test_a_layer_that_saw_no_tokens_counts_in_no_mean():
    model = tiny_model()
    routing = watch(model)
    figures = routing.read()
    assert figures.overall == figures.scalars() == {}
    assert [layer.tokens for layer in figures.layers] == [0, 0]
    assert "the layer saw no tokens" in figures.notes[0]


def test_scalars_are_named_for_a_tracker():
    model = tiny_model()
    with watch(model, co_activation=False) as routing:
        model(input_ids=IDS)
    figures = routing.read(reset=True)
    scalars = figures.scalars()
    assert all(type(value) is float for value in scalars.values())
    first, last = (layer.max_violation for layer in figures.layers)
    assert scalars["routing/layer_00/max_violation"] == first
    assert scalars["routing/layer_02/max_violation"] == last
    assert scalars["routing/max_violation"] == (first + last) / 2
    assert scalars["routing/max_violation_worst"] == max(first, last)
    assert "train/routing/dead_experts_worst" in figures.scalars("train/routing")
    assert figures.layers[0].co_activation is None
    assert routing.read().layers[0].tokens == 0


def test_bf16_routers_are_understood():
    for build in (mixtral, sigmoid):
        model = build().bfloat16().eval()
        with watch(model) as routing:
            model(input_ids=IDS)
        assert {layer.scoring for layer in routing.read().layers} == {"softmax" if build is mixtral else "sigmoid"}


def test_a_router_whose_weights_nothing_explains_says_so():
    model = tiny("phimoe").eval()
    sharpen(model)
    with watch(model) as routing:
        model(input_ids=IDS)
    figures = routing.read()
    assert "token_entropy" not in figures.overall
    assert "max_violation" in figures.overall
    assert "entropies and gate margin are unknown: neither softmax nor sigmoid" in figures.notes[0]


@pytest.mark.parametrize(
    ("build", "training"),
    [
        (mixtral, False),
        pytest.param(mixtral, True, marks=pytest.mark.slow),
        pytest.param(tiny_model, True, marks=pytest.mark.slow),
    ],
)
def test_a_compiled_model_is_watched(build, training):
    torch._dynamo.reset()
    model = build().train(training)
    expected = watch(model)
    logits = model(input_ids=IDS, attention_mask=MASK).logits
    expected.detach()
    with watch(model) as routing:
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager" if training else "eager")
        for _ in range(2):
            output = compiled(input_ids=IDS, attention_mask=MASK)
            if training:
                output.logits.sum().backward()
    torch.testing.assert_close(output.logits, logits)
    figures = routing.read()
    assert [layer.tokens for layer in figures.layers] == [2 * REAL.sum()] * 2
    assert figures.overall == pytest.approx(expected.read().overall, rel=1e-5, abs=1e-7)


def test_an_adapted_model_is_watched():
    model = get_peft_model(mixtral(), LoraConfig(target_modules=["q_proj"])).train()
    with watch(model, training_only=True) as routing:
        model(input_ids=IDS, attention_mask=MASK, labels=IDS).loss.backward()
        with torch.no_grad(), model.disable_adapter():
            model(input_ids=IDS, attention_mask=MASK)
    assert [layer.tokens for layer in routing.read().layers] == [REAL.sum()] * 2


def test_passes_in_inference_mode_and_others_add_up():
    model = mixtral().eval()
    with watch(model) as routing:
        with torch.inference_mode():
            model(input_ids=IDS)
        model(input_ids=IDS)
    assert routing.read().layers[0].tokens == 2 * IDS.numel()


class Operators(TorchDispatchMode):
    """Counts operators."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_a_pass_costs_few_operators_once_the_scoring_is_known():
    model = mixtral().eval()
    ids = IDS.repeat(3, 1)

    def run() -> int:
        with torch.no_grad(), Operators() as operators:
            model(input_ids=ids)
        return operators.count

    unwatched = run()
    with watch(model, co_activation=False) as routing:
        run()
        extra = (run() - unwatched) / 2
    assert extra < 40
    assert routing.read().layers[0].scoring == "softmax"


def test_a_failure_can_leave_the_model_alone(monkeypatch):
    model, failures = mixtral().eval(), []
    expected = model(input_ids=IDS).logits
    monkeypatch.setattr("modeling_moe.monitoring.watching.add_pass", lambda *_: 1 / 0)
    with RoutingWatch(model, on_failure=failures.append):
        assert torch.equal(model(input_ids=IDS).logits, expected)
    assert [type(failure) for failure in failures] == [ZeroDivisionError] * 2
    with watch(model), pytest.raises(ZeroDivisionError):
        model(input_ids=IDS)


def test_no_method_but_read_waits_for_the_device():
    """The meta device has no values: whatever reads one there fails."""
    for build in (mixtral, lambda: tiny_model(capacity_factor=0.5)):
        model, seen = build().to("meta"), []
        model.set_experts_implementation("batched_mm")
        with observe(model, seen.append):
            model.train()(input_ids=torch.zeros(2, 9, dtype=torch.long, device="meta"))
        for event in seen:
            sums = new_sums(event, co_activation=True)
            for mask in (None, torch.ones(18, dtype=torch.bool, device="meta")):
                add_pass(sums, event._replace(token_mask=mask))
            assert sums.counts.device.type == "meta"
        assert len(seen) == 2


@pytest.mark.slow
def test_the_package_imports_no_monitoring_until_it_is_used():
    code = "import sys, modeling_moe; assert 'modeling_moe.monitoring' not in sys.modules; modeling_moe.watch; assert 'modeling_moe.monitoring' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'wtach'"):
        getattr(modeling_moe, "wtach")  # noqa: B009
