"""This module compares the caches of offloaded models with the simulator, and prefetches into them."""

import itertools
import math
import threading

import pytest
import torch

from modeling_moe.monitoring import sparse_layers
from modeling_moe.offload import compare_policies, offload_experts, prefetch_experts, record_trace
from modeling_moe.offload.policies import POLICIES
from modeling_moe.offload.prediction import RouterTwin
from modeling_moe.offload.simulation import belady, simulate
from tests.builders import tiny_model
from tests.offload.models import EXPERTS, MODELS, TOP_K, build, copy_of, outputs
from tests.offload.test_cache import make


def wait_in_each_layer(model, prefetcher) -> None:
    """Lets each layer wait until the thread has loaded for the next one."""
    for layer in sparse_layers(model):
        layer.experts.register_forward_pre_hook(lambda *_: prefetcher.wait())


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("slots", [TOP_K, TOP_K + 2])
def test_a_cache_hits_and_misses_as_the_simulator_says(policy, slots):
    model = build("ours")
    statistics = offload_experts(model, slots=slots, policy=policy)
    with record_trace(model) as trace:
        outputs(model)
    for layer in trace.layers:
        found, bound = statistics.layers[layer.name], belady(layer.passes, slots)
        assert simulate(layer.passes, policy, slots, EXPERTS) == (found.hits, found.misses)
        assert any(len(needed) > slots for needed in layer.passes)
        assert bound.misses <= found.misses
    total = statistics.total
    assert compare_policies(trace, (slots,)).counts[slots][policy] == (total.hits, total.misses)


@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_outputs_are_bitwise_those_of_the_resident_model_with_prefetch(name, waits):
    resident = build(name)
    model = copy_of(resident)
    statistics = offload_experts(model, slots=TOP_K + 1, policy="lfru")
    prefetcher = prefetch_experts(model, extra=1)
    if waits:
        wait_in_each_layer(model, prefetcher)
    expected, found = outputs(resident), outputs(model)
    prefetcher.close()
    assert prefetcher.reasons == {}
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    if waits:
        assert (statistics.total.prefetched > 0) == (len(sparse_layers(model)) > 1)


def test_prefetched_experts_are_hits_and_the_precision_is_that_of_the_routers():
    """The oracle replays the passes of one token: what is loaded ahead, what of it is used, and what still misses."""
    model = tiny_model(num_experts=8, num_experts_per_tok=2, mlp_layer_types=["sparse"] * 3).eval()
    layers, states = sparse_layers(model), {}
    for layer in layers:
        layer.router.register_forward_hook(
            lambda m, args, out, n=layer.name: states.setdefault(n, []).append((args[0], out))
        )
    statistics = offload_experts(model, slots=2)
    prefetcher = prefetch_experts(model)
    wait_in_each_layer(model, prefetcher)
    with torch.no_grad():
        for token in range(4, 44):
            model(torch.tensor([[token]]), use_cache=False)
    prefetcher.close()
    for before, layer in itertools.pairwise(layers):
        twin, resident = RouterTwin(layer), set()
        loaded = used = misses = 0
        for (state, _), (_, routing) in zip(states[before.name], states[layer.name], strict=True):
            ahead, needed = set(twin.predict(state, 2, 0, 2)), {*routing.index.flatten().tolist()}
            loaded += len(ahead - resident)
            used += len((ahead - resident) & needed)
            misses += len(needed - ahead)
            # two slots hold what the pass used
            resident = needed
        found = statistics.layers[layer.name]
        assert (found.prefetched, found.prefetched_used, found.misses) == (loaded, used, misses)
        assert found.prefetch_precision == used / loaded
        assert found.hits + found.misses == 2 * 40
    first = statistics.layers[layers[0].name]
    assert first.prefetched == 0
    assert math.isnan(first.prefetch_precision)


def test_a_model_that_is_not_offloaded_has_nothing_to_prefetch():
    with pytest.raises(ValueError, match="MoEForCausalLM is not offloaded: call offload_experts first"):
        prefetch_experts(tiny_model())


@pytest.mark.parametrize(("needed", "read"), [([1, 6], [0, 1, 6]), ([5], [0, 5])])
def test_a_pass_that_begins_ends_the_prefetch_of_what_it_does_not_need(needed, read):
    cache = make(slots=5)
    cache.store.hold(0)
    prefetch = threading.Thread(target=cache.prefetch, args=([0, 1, 2, 3],))
    prefetch.start()
    assert cache.store.started[0].wait(10)
    begun, go_on = threading.Event(), threading.Event()

    def run_pass():
        with cache.running(needed) as rounds:
            begun.set()
            assert go_on.wait(10)
            list(rounds)

    running = threading.Thread(target=run_pass)
    running.start()
    assert begun.wait(10)
    cache.store.held[0].set()
    prefetch.join(10)
    go_on.set()
    running.join(10)
    assert sorted(cache.store.reads) == read
    assert cache.statistics.prefetched == (2 if 1 in needed else 1)
