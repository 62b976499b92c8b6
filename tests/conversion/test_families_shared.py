"""What several sparse families share is read alike: shared experts of width 0, and the coefficient of the balance loss."""

import copy
import inspect

import pytest
import torch

from modeling_moe.conversion import to_moe
from tests.conversion import harness
from tests.conversion import test_families_attention as attention_variants
from tests.conversion import test_families_bias_routed as bias_routed
from tests.conversion import test_families_router as router
from tests.conversion import test_families_softmax as softmax
from tests.conversion import test_families_sparse as sparse
from tests.conversion.harness import moe_config


# model type -> a tiny configuration; transformers has no class for DeepSeek's first family
CONFIGS = {
    config.model_type: config
    for configs in (
        sparse.CONFIGS,
        bias_routed.CONFIGS,
        attention_variants.CONFIGS,
        softmax.CONFIGS,
        router.CONFIGS,
    )
    for name, config in configs.items()
    if "-" not in name and name != "deepseek"
}
SHARED = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "shared_expert_intermediate_size")
WITH_SHARED = [
    (name, field)
    for name, config in CONFIGS.items()
    for field in SHARED
    if isinstance(getattr(config, field, None), int) and name not in ("qwen3_moe", "mistral4")
]


@pytest.mark.parametrize(("name", "field"), WITH_SHARED)
def test_no_shared_experts(name, field):
    """transformers builds empty shared experts, none, or in Hunyuan-3 one of the width of dense layers."""
    config = copy.deepcopy(CONFIGS[name])
    setattr(config, field, 0)
    source = harness.random_source(config)
    model = to_moe(source)
    assert model.config.num_shared_experts == (name == "hy_v3")
    ids = torch.randint(3, 99, (2, 9))
    torch.testing.assert_close(model(ids).logits, source(ids).logits, **harness.TOLERANCE)


@pytest.mark.parametrize("name", CONFIGS)
def test_coefficient_of_the_balance_loss_is_kept_where_transformers_computes_the_loss(name):
    config = copy.deepcopy(CONFIGS[name])
    if not hasattr(config, "router_aux_loss_coef"):
        pytest.skip("the family has no such field")
    config.router_aux_loss_coef = 0.02
    computed = hasattr(inspect.getmodule(type(harness.random_source(config))), "load_balancing_loss_func")
    assert moe_config(config).router_aux_loss_coef == (0.02 if computed else 0.0)
