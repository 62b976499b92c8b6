"""The comparison of Mixture-of-Depths with all layers runs at the smallest size."""

import benchmark_depth
import pytest
import torch
from benchmark_depth import DepthArguments, make_model, ratios

from modeling_moe.utils.errors import UserError


SMALLEST = {"hidden_size": 32, "layers": 4, "length": 16, "new_tokens": 2, "rounds": 1, "capacities": [0.5, 0.25]}


def test_all_work_has_a_ratio_for_each_capacity():
    found = ratios(DepthArguments(**SMALLEST))
    assert set(found) == set(benchmark_depth.WORK)
    assert all(set(values) == {0.5, 0.25} and min(values.values()) > 0 for values in found.values())


def test_the_thresholds_let_the_share_through():
    args, ids = DepthArguments(**SMALLEST), torch.randint(3, 1000, (2, 16), generator=torch.Generator().manual_seed(0))
    load = make_model(0.25, ids, args)(ids, output_router_logits=True).depth_load
    assert load.tolist() == [[8], [8]]


@pytest.mark.parametrize("name", ["layers", "rounds"])
def test_sizes_out_of_range_are_refused(name):
    with pytest.raises(UserError, match=f"{name} is 0: it must be at least"):
        DepthArguments(**{name: 0})
