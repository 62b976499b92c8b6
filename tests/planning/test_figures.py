"""These tests compare memory per process, exchange, time, limits and advice with numbers computed by hand."""

from typing import Any

import pytest
import torch
from transformers import MixtralConfig

from modeling_moe.planning import Device, Parallelism, Request, device_named, devices, make_plan, measure_device
from modeling_moe.planning.communication import all_to_all_bytes, collectives
from modeling_moe.planning.fitting import largest
from modeling_moe.planning.memory import training_memory
from modeling_moe.planning.operators import expected_experts
from modeling_moe.planning.parallelism import rounds
from modeling_moe.planning.recording import OperatorCost, RunCost
from modeling_moe.planning.sizes import Sizes, Tensors
from modeling_moe.planning.timing import PassTime, bound_by, optimizer_seconds, run_seconds
from modeling_moe.utils.errors import UserError
from tests.planning.families import CONFIGS, SHAPE


DEVICE = Device("test", 1e9, 100.0, {torch.float32: 10.0, torch.bfloat16: 20.0}, 50.0, 0.5, 0.25, (), "by hand")
# 800 bytes of experts and 400 of other weights, of which a half can be split by layers; all of them train
SIZES = Sizes(
    groups={
        "routed experts": Tensors(200, 800, 200, 800, 800, 2),
        "attention and others": Tensors(100, 400, 100, 400, 200, 3),
    },
    active=150,
    buffers=16,
    largest_layer=600,
    expert_layer=400,
    num_experts=8,
    top_k=2,
    sparse_layers=2,
    layers=2,
    hidden_size=16,
)
COST = RunCost([OperatorCost("a", 100, 50), OperatorCost("b", 0, 300)], peak=5000, activation_peak=4200)


def test_time_is_the_sum_of_rooflines_and_starts():
    # 100 FLOPs at 10 a second take longer than 50 bytes at 100 a second
    assert run_seconds(COST, DEVICE, torch.float32) == 10 + 3 + 2 * 0.25
    assert run_seconds(COST, DEVICE, torch.bfloat16) == 5 + 3 + 2 * 0.25
    assert bound_by(COST, DEVICE, torch.float32) == "arithmetic"
    assert optimizer_seconds(1200, DEVICE) == 7 * 12
    assert PassTime(2.0, 3.0, 20).tokens_per_second == 4


@pytest.mark.parametrize(
    ("parallelism", "expected"),
    [
        (Parallelism(), (1216, 1200, 2420, 3800, 0)),
        # DDP copies gradients into buckets
        (Parallelism(ddp_size=4), (1216, 1200, 2420, 4200, 1200)),
        # two gathered layers
        (Parallelism(fsdp_size=4), (316, 300, 620, 4200, 1200)),
        (Parallelism(ep_size=4), (616, 600, 1220, 4200, 600)),
        # half of the others is split, and all experts
        (Parallelism(tp_size=2), (716, 700, 1420, 4200, 0)),
        # each process has two whole experts, and gathers two layers of 200 bytes beside them
        (Parallelism(fsdp_size=4, ep_size=4), (316, 300, 620, 4200, 400)),
        # two processes split an expert, so that a quarter of each layer is gathered
        (Parallelism(fsdp_size=8, ep_size=4), (166, 150, 320, 4200, 600)),
    ],
)
def test_memory_of_a_process(parallelism, expected):
    memory = training_memory(SIZES, COST, parallelism)
    parts = (memory.weights, memory.gradients, memory.optimizer, memory.activations, memory.exchange)
    assert parts == expected
    assert memory.total == sum(expected)


def test_experts_in_4_bits_are_dequantised_one_layer_at_a_time():
    plain, quantised = (training_memory(SIZES, COST, Parallelism(), in_4_bits) for in_4_bits in (False, True))
    assert quantised.activations - plain.activations == SIZES.expert_layer


def by_name(parallelism: Parallelism, training: bool = True):
    """Returns the collectives of a pass over 64 tokens in 4 bytes, by the word in brackets."""
    found = collectives(SIZES, parallelism, DEVICE, 64, 4, training)
    return {each.name: each for each in found}


def test_exchange_by_hand():
    (reduced,) = by_name(Parallelism(ddp_size=4)).values()
    assert (reduced.calls, reduced.nbytes) == (1, 2 * 1200 * 3 // 4)
    assert reduced.seconds == 0.5 * 2 + 1800 / 50
    fsdp = by_name(Parallelism(fsdp_size=4))
    assert fsdp["all-gather of weights (FSDP)"].nbytes == 2 * 1200 * 3 // 4
    assert fsdp["reduce-scatter of gradients (FSDP)"].nbytes == 1200 * 3 // 4
    (summed,) = by_name(Parallelism(tp_size=2), training=False).values()
    assert (summed.calls, summed.nbytes) == (4, 4 * 2 * 64 * 16 * 4 // 2)
    tokens = by_name(Parallelism(ep_size=4))["all-to-all of tokens (EP)"]
    # there and back, forward and backward, in two layers
    assert (tokens.calls, tokens.nbytes) == (8, 8 * 64 * 2 * 16 * 4 * 3 // 4)
    assert tokens.seconds == 8 * 0.5 * 2 + tokens.nbytes / 50
    # experts lie whole on one process: only the other weights are gathered, reduced and scattered
    both = by_name(Parallelism(fsdp_size=4, ep_size=4))
    assert both["all-gather of weights (FSDP)"].nbytes == 2 * 400 * 3 // 4
    assert both["reduce-scatter of gradients (FSDP)"].nbytes == 400 * 3 // 4
    half = by_name(Parallelism(fsdp_size=8, ep_size=4))
    assert half["all-gather of weights (FSDP)"].nbytes == 2 * (200 // 2 + 400 * 7 // 8)
    assert by_name(Parallelism(ep_size=4))["all-reduce of gradients (DDP)"].nbytes == 2 * 400 * 3 // 4
    assert all_to_all_bytes(64, 2, 16, 4, 1) == 0
    assert not by_name(Parallelism())
    assert [rounds(size) for size in (1, 2, 3, 8)] == [0, 1, 2, 3]


def test_groups_of_processes():
    assert Parallelism(ddp_size=2, fsdp_size=4, tp_size=2, ep_size=4).processes == 16
    assert Parallelism(ddp_size=2, fsdp_size=4, tp_size=2, ep_size=4).batches == 8
    assert Parallelism(ep_size=4).batches == 4
    with pytest.raises(UserError, match="tp_size is 0"):
        Parallelism(tp_size=0)
    with pytest.raises(UserError, match=r"ep_size \(3\) does not divide"):
        Parallelism(fsdp_size=4, ep_size=3)
    with pytest.raises(UserError, match=r"ep_size \(3\) is no multiple of tp_size \(2\)"):
        Parallelism(fsdp_size=3, tp_size=2, ep_size=3)
    with pytest.raises(UserError, match="must divide the number of experts"):
        Parallelism(ep_size=3).check(8)
    with pytest.raises(UserError, match="the model has no sparse feed-forward networks"):
        Parallelism(ep_size=2).check(0)


def test_expected_experts():
    assert expected_experts(8, 2, 1) == 2
    assert expected_experts(4, 2, 2) == 3
    assert expected_experts(4, 8, 1) == 4


@pytest.mark.parametrize(
    ("memory", "limit", "start", "expected"),
    [(1000, 10**6, 1, 128), (1000, 10**6, 50, 128), (100, 10**6, 1, 0), (10**9, 64, 4, 64), (150, 100, 90, 7)],
)
def test_the_largest_number_that_fits(memory, limit, start, expected):
    assert largest(lambda n: 100 + 7 * n, memory, limit, start) == expected


def test_devices():
    known = devices()
    assert {"H100", "H200", "B200", "A100-80", "A100-40", "L40S", "RTX-4090", "CPU"} <= set(known)
    assert all(device.source and torch.bfloat16 in device.flops for device in known.values())
    h100 = device_named("h100")
    # a plan counts on a part of the maker's peak
    assert h100.bandwidth < 3.35e12
    assert h100.rate(torch.bfloat16) < 989e12
    assert "link_latency" in h100.assumed
    with pytest.raises(UserError, match=r"device 'H900' is unknown: .*H100, H200"):
        device_named("H900")
    with pytest.raises(UserError, match="throughputs for bfloat16, float16, float32 alone"):
        h100.rate(torch.float64)
    mine = device_named("CPU").with_numbers(64, 100, 2, [torch.float32])
    assert (mine.memory, mine.bandwidth, mine.rate(torch.float32)) == (64e9, 100e9, 2e12)
    assert not {"memory_gb", "bandwidth", "tflops"} & set(mine.assumed)
    with pytest.raises(UserError, match="device_memory is -1"):
        h100.with_numbers(-1, None, None, [])


def test_the_probe_measures_this_machine(monkeypatch):
    monkeypatch.setattr("modeling_moe.planning.probe.PRODUCT", 64)
    monkeypatch.setattr("modeling_moe.planning.probe.STREAM", 1 << 16)
    device = measure_device([torch.float32, torch.bfloat16], torch.device("cpu"))
    assert device.memory > 1e8
    assert min(device.bandwidth, device.operator_seconds, *device.flops.values()) > 0
    assert set(device.assumed) == {"link_bandwidth", "link_latency"}


def request(**fields) -> Request:
    """Returns a request with a small device."""
    defaults: dict[str, Any] = {"device": device_named("CPU"), "dtype": torch.float32, "train_dtype": torch.float32}
    return Request(**(defaults | {"sequence_length": 16, "train": ["full"], "recompute": ["none"]} | fields))


def test_limits_fit_and_one_more_does_not():
    plan = make_plan(CONFIGS["llama"], request())
    memory = plan.training[0].memory.total + 3 * (plan.training[0].memory.total - plan.training[0].memory.weights)
    small = device_named("CPU").with_numbers(memory / 1e9, None, None, [])
    limited = make_plan(CONFIGS["llama"], request(device=small))
    (generation, training) = limited.limits
    assert generation.batch_size > training.batch_size > 1
    totals = [
        make_plan(CONFIGS["llama"], request(batch_size=training.batch_size + more, limits=False))
        .training[0]
        .memory.total
        for more in (0, 1)
    ]
    assert totals[0] <= memory
    assert totals[0] >= 0.98 * memory or totals[1] > memory


def test_a_token_sent_to_more_experts_than_there_are():
    config = MixtralConfig(**SHAPE, num_local_experts=2, num_experts_per_tok=4)
    with pytest.raises(UserError, match="sends each token to 4 experts, and the model has 2"):
        make_plan(config, request())


def test_a_sequence_beyond_the_positions_and_one_reason_for_several_methods():
    plan = make_plan(CONFIGS["llama"], request(sequence_length=65, train=["qlora", "router"], limits=False))
    assert plan.notes[0] == "sequence_length is 65, and the model has 64 positions"
    split = request(train=["qlora"], parallelism=Parallelism(fsdp_size=3, ep_size=3), limits=False)
    (note,) = make_plan(CONFIGS["qwen3_moe"], split).notes
    assert note.startswith("not planned: train qlora: tp_size and ep_size split experts")


def test_experts_outside_the_memory_are_planned_with_the_budget():
    plan = make_plan(CONFIGS["qwen3_moe"], request(dtype=torch.bfloat16, limits=False))
    assert plan.inference is not None
    experts = plan.sizes.groups["routed experts"].nbytes
    total = plan.inference.memory.total
    tight = device_named("CPU").with_numbers((total - experts / 2) / 1e9, None, None, [])
    advised = make_plan(CONFIGS["qwen3_moe"], request(dtype=torch.bfloat16, device=tight, train=[], limits=False))
    change = advised.changes["generation"][0]
    assert "moe generate --budget" in change.text
    assert change.total == int(tight.memory)
    assert change.fits


def test_advice_goes_from_cheap_to_dear_until_it_fits():
    plan = make_plan(CONFIGS["moe"], request())
    total = plan.training[0].memory.total
    tight = device_named("CPU").with_numbers(total * 0.4 / 1e9, None, None, [])
    advised = make_plan(CONFIGS["moe"], request(device=tight, limits=False))
    assert not advised.training[0].fits
    changes = advised.changes["training, full, recompute none"]
    assert changes[0].text.startswith("weights in 16 bits")
    assert all(change.text.startswith("and ") for change in changes[1:])
    assert [change.fits for change in changes] == [False] * (len(changes) - 1) + [True]
    assert all(change.total > tight.memory for change in changes[:-1])
    tiny = device_named("CPU").with_numbers(1e-6, None, None, [])
    hopeless = make_plan(CONFIGS["moe"], request(device=tiny, limits=False))
    assert "no number of devices is enough" in hopeless.changes["training, full, recompute none"][-1].text
    assert hopeless.changes["generation"][0].text.startswith("weights in 16 bits")


@pytest.mark.parametrize("fields", [{"batch_size": 0}, {"sequence_length": 0}, {"lora_r": 0}, {"batch_size": 10**6}])
def test_numbers_out_of_range(fields):
    with pytest.raises(UserError, match=next(iter(fields))):
        request(**fields)
