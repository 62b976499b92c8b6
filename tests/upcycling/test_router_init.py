"""These tests check the routers of an upcycled model: shape, dtype, seeds, and one row for all shards of a replica."""

import pytest
import torch

from modeling_moe.upcycling.options import UpcyclingOptions
from modeling_moe.upcycling.request import LayerRequest
from modeling_moe.upcycling.router_init import ROUTER_INITS, router_weight
from modeling_moe.utils.seeds import generator_for
from tests.builders import tiny_config


def weight(layer: int = 1, dtype=torch.float32, measured=None, **options) -> torch.Tensor:
    options = UpcyclingOptions(num_experts=6, **options)
    config = tiny_config(num_experts=6, dtype=dtype)
    lazy = router_weight(LayerRequest([], layer, config, options, measured or {}))
    read = lazy.read()
    assert (lazy.shape, lazy.dtype) == (tuple(read.shape), read.dtype)
    return read


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_random_rows_are_seeded_by_layer(dtype):
    normal = torch.randn(6, 32, generator=generator_for(3, 1, "router"))
    got = weight(dtype=dtype, seed=3, router_std=0.5)
    assert torch.equal(got, (0.5 * normal).to(dtype))
    assert not torch.equal(got, weight(layer=2, dtype=dtype, seed=3, router_std=0.5))
    assert not torch.equal(got, weight(dtype=dtype, seed=4, router_std=0.5))


def test_shards_of_a_replica_have_one_row():
    rows = torch.randn(3, 32)
    for init in ROUTER_INITS:
        got = weight(router_init=init, granularity=2, measured={"layers.1.router": rows}).view(3, 2, 32)
        assert torch.equal(got[:, 0], got[:, 1])
        assert (init == "zero") == torch.equal(got[0], got[1])


def test_zero_is_zero():
    assert torch.equal(weight(router_init="zero"), torch.zeros(6, 32))


@pytest.mark.parametrize("init", ["text", "kmeans", "ridge"])
def test_measured_rows_are_taken_as_they_are(init):
    rows = torch.randn(6, 32)
    got = weight(router_init=init, dtype=torch.bfloat16, measured={"layers.0.router": -rows, "layers.1.router": rows})
    assert torch.equal(got, rows.bfloat16())


def test_a_part_can_be_read_alone():
    options = UpcyclingOptions(num_experts=6)
    lazy = router_weight(LayerRequest([], 0, tiny_config(num_experts=6), options, {}))
    assert lazy.dtype == torch.float32
    assert torch.equal(lazy[2:4].read(), lazy.read()[2:4])
