"""Offloaded models compute the bits of resident ones, in inference."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from moe_benchmark.experts_classes import build as build_experts
from moe_benchmark.experts_classes import experts_classes, sources

from modeling_moe.dispatch import backend_of, reason_unsupported
from modeling_moe.monitoring import experts_per_token
from modeling_moe.offload import offload_experts, offload_statistics
from modeling_moe.offload.policies import POLICIES
from tests.conftest import NEEDS_TRITON
from tests.dispatch.kinds import NEEDS_NATIVE, OURS, assert_close, draw, make
from tests.dispatch.kinds import THEIRS as CLASSES
from tests.offload.models import EXPERTS, MODELS, TOP_K, build, copy_of, fill_slots_with_nan, outputs


def assert_bits(model, expected):
    for name, got in outputs(model).items():
        assert torch.equal(got, expected[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_outputs_have_the_bits_of_the_resident_model(name, dtype):
    resident = build(name, dtype)
    expected = outputs(resident)
    for slots in (TOP_K, TOP_K + 1, EXPERTS):
        model = copy_of(resident)
        statistics = offload_experts(model, slots=slots)
        fill_slots_with_nan(model)
        assert_bits(model, expected)
        total = statistics.total
        assert min(total.hits, total.misses, total.bytes_read) > 0
        if slots == EXPERTS:  # each expert is read once
            assert total.misses <= EXPERTS * len(statistics.layers)
    assert_bits(resident, expected)


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_leaves_the_bits(policy):
    resident = build("ours")
    model = copy_of(resident)
    offload_experts(model, slots=TOP_K, policy=policy)
    assert_bits(model, outputs(resident))


@pytest.mark.parametrize(
    "implementation", [pytest.param("moe_native", marks=NEEDS_NATIVE), "moe_loop", "moe_grouped_mm"]
)
def test_the_back_end_stays_that_of_the_resident_model(implementation):
    resident = build("qwen3_moe", implementation=implementation)
    model = copy_of(resident)
    offload_experts(model, slots=TOP_K)
    for layer in model.model.layers:
        assert f"moe_{layer.mlp.experts.offloaded.backend}" == implementation
    assert_bits(model, outputs(resident))


# transformers keeps a static cache in the model, so one thread at a time may use it
@pytest.mark.parametrize(
    ("settings", "threads"), [({"num_beams": 3}, 3), ({"cache_implementation": "static"}, 1)], ids=["beams", "static"]
)
def test_generating_with_beams_in_several_threads_and_with_a_static_cache(settings, threads):
    resident = build("ours")
    model = copy_of(resident)
    offload_experts(model, slots=TOP_K, prefetch=1)
    prompts = [torch.randint(3, 99, (2, 6), generator=torch.Generator().manual_seed(n)) for n in range(3)]

    def write(writer, prompt):
        return writer.generate(prompt, max_new_tokens=6, do_sample=False, **settings)

    expected = [write(resident, prompt) for prompt in prompts]
    with ThreadPoolExecutor(threads) as pool:
        found = list(pool.map(lambda prompt: write(model, prompt), prompts, timeout=60))
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_transformers_own_grouped_mm_asks_for_no_back_end():
    model = build("qwen3_moe", implementation="grouped_mm")
    expected = outputs(build("qwen3_moe"))
    offload_experts(model, slots=TOP_K)
    assert {layer.mlp.experts.offloaded.backend for layer in model.model.layers} == {None}
    assert_bits(model, expected)


# with 33 and 23 an expert's matrix is no multiple of 64 bytes, so the matrices of a resident model are not aligned as those in
# slots are, and only `native` has bits that do not depend on that
SIZES = {"even": (32, 24), "odd": (33, 23)}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", [*OURS, *CLASSES])
def test_kinds_of_experts(kind, size):
    hidden, width = SIZES[size]
    for implementation in ("moe", "moe_loop"):
        if size == "odd" and (implementation == "moe_loop" or kind == "gelu"):
            continue
        for dtype in (torch.float32, torch.bfloat16):
            experts = make(kind, implementation, EXPERTS, hidden, width, dtype)
            experts._forward_pre_hooks.clear()
            experts.config.num_experts_per_tok = TOP_K
            # decoding one token and several, and more rows than the loop's chunk
            inputs = [draw(tokens, EXPERTS, TOP_K, dtype, hidden)[:3] for tokens in (1, 4, 40)]
            inputs[2][1][5:20] = EXPERTS  # empty assignments
            with torch.no_grad():
                expected = [experts(*each) for each in inputs]
                holder = torch.nn.ModuleDict({"experts": experts})
                offload_experts(holder, slots=TOP_K)
                fill_slots_with_nan(holder)
                for each, output in zip(inputs, expected, strict=True):
                    assert torch.equal(experts(*each), output), (implementation, dtype, len(each[0]))


@NEEDS_TRITON
@pytest.mark.parametrize(
    ("kind", "slots", "tokens"),
    [
        ("gated-bias", TOP_K, 5),
        *(
            pytest.param(kind, slots, 40, marks=pytest.mark.slow)
            for kind in ("gated-bias", "gpt_oss")
            for slots in (TOP_K, EXPERTS)
        ),
    ],
)
def test_triton_computes_with_slots_in_the_place_of_experts(kind, slots, tokens):
    """Triton adds up in the order of the choices, so several rounds are combined at the end, by another kernel."""
    experts = make(kind, "moe_triton", EXPERTS, dtype=torch.float32)
    experts._forward_pre_hooks.clear()
    experts.config.num_experts_per_tok = TOP_K
    inputs = draw(tokens, EXPERTS, TOP_K, torch.float32)[:3]
    with torch.no_grad():
        expected = experts(*inputs)
        holder = torch.nn.ModuleDict({"experts": experts})
        offload_experts(holder, slots=slots)
        fill_slots_with_nan(holder)
        assert experts.offloaded.backend == "triton"
        got = experts(*inputs)
    if slots == EXPERTS:
        assert torch.equal(got, expected)
    assert_close([got], [expected.double()], 1e-6)


def test_a_token_may_have_more_experts_than_there_are_slots():
    """A configuration need not say how many experts a token has."""
    experts = make("mixtral", "moe", EXPERTS, dtype=torch.float32)
    experts._forward_pre_hooks.clear()
    experts.config.num_experts_per_tok = 1
    inputs = draw(4, EXPERTS, TOP_K, torch.float32)[:3]
    with torch.no_grad():
        expected = experts(*inputs), experts(*(each[:1] for each in inputs))
        offload_experts(torch.nn.ModuleDict({"experts": experts}), slots=1)
        assert torch.equal(experts(*inputs), expected[0])
        assert torch.equal(experts(*(each[:1] for each in inputs)), expected[1])


def test_assignments_may_all_be_empty():
    experts = make("mixtral", "moe", EXPERTS, dtype=torch.float32)
    experts._forward_pre_hooks.clear()
    offload_experts(torch.nn.ModuleDict({"experts": experts}), slots=TOP_K)
    states, index, weight, _ = draw(4, EXPERTS, TOP_K, torch.float32)
    output = experts(states, torch.full_like(index, EXPERTS), weight)
    assert torch.equal(output, torch.zeros_like(states))


def test_autocast_computes_in_its_dtype():
    resident = build("ours")
    model = copy_of(resident)
    offload_experts(model, slots=TOP_K)
    with torch.autocast("cpu", torch.bfloat16):
        assert_bits(model, outputs(resident))


def test_the_models_memory_holds_no_experts():
    model = build("mixtral")
    offload_experts(model, slots=TOP_K)
    experts = model.model.layers[0].mlp.experts
    assert experts.gate_up_proj.is_meta
    assert not experts.gate_up_proj.requires_grad
    assert experts.gate_up_proj.shape == (EXPERTS, 80, 32)
    assert {len(tensor) for tensor in experts.offloaded.cache.slots.tensors.values()} == {TOP_K}
    assert backend_of(experts, torch.zeros(40, 32), torch.zeros(40, TOP_K, dtype=torch.long)) in ("native", "loop")


def test_statistics_count_each_expert_once_in_a_pass():
    model = build("mixtral", num_hidden_layers=1)
    statistics = offload_experts(model, slots=EXPERTS)
    tokens = torch.arange(3, 99)[None].repeat(3, 1)
    with torch.no_grad():
        model(tokens)
        assert (statistics.total.hits, statistics.total.misses) == (0, EXPERTS)
        model(tokens)
    assert (statistics.total.hits, statistics.total.misses) == (EXPERTS, EXPERTS)
    experts = model.model.layers[0].mlp.experts
    assert statistics.total.bytes_read == experts.gate_up_proj.nbytes + experts.down_proj.nbytes
    assert offload_statistics(model).total == statistics.total


@pytest.mark.slow
@pytest.mark.parametrize("model", sources().decorated)
def test_every_experts_class_of_transformers(model):
    for kind in experts_classes(model):
        experts = build_experts(model, kind)
        experts.config._experts_implementation = "moe"
        hidden = experts.down_proj.shape[2 if experts.is_transposed else 1]
        number = experts.num_experts
        inputs = [draw(tokens, number, 2, torch.float32, hidden)[:3] for tokens in (1, 3, 18)]
        with torch.no_grad():
            expected = [experts(*each) for each in inputs]
            holder = torch.nn.ModuleDict({"experts": experts})
            if reason_unsupported(experts):
                with pytest.raises(ValueError, match="cannot be offloaded"):
                    offload_experts(holder, slots=number)
                continue
            offload_experts(holder, slots=min(number, experts_per_token(experts.config) or 2))
            fill_slots_with_nan(holder)
            for each, output in zip(inputs, expected, strict=True):
                assert torch.equal(experts(*each), output)
