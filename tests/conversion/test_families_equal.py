"""Each sparse family, in all variants of the other files here, is imported with equal logits and text, and read lazily."""

import pytest

from tests.conversion import harness
from tests.conversion import test_families_attention as attention
from tests.conversion import test_families_bias_routed as bias_routed
from tests.conversion import test_families_router as router
from tests.conversion import test_families_softmax as softmax
from tests.conversion import test_families_sparse as sparse


# name of a family and variant -> the function that makes a random source and the configuration
SOURCES = {
    name: module.random_source
    for module in (attention, bias_routed, router, softmax, sparse)
    for name in module.CONFIGS
}
# one variant of each family; DBRX's experts are read one by one in a test of their own
READ = ["mixtral-tied", "qwen2_moe", "deepseek", "deepseek_v2-groups", "deepseek_v3", "gpt_oss"]
READ += [name for name in SOURCES if "-" not in name and name not in {*sparse.CONFIGS, "dbrx"}]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", SOURCES)
def test_same_logits(name, side):
    harness.check_logits(*SOURCES[name](name), side)


@pytest.mark.parametrize("name", SOURCES)
def test_same_text_and_cached_decode(name):
    harness.check_text(*SOURCES[name](name))


@pytest.mark.parametrize("name", READ)
def test_nothing_is_read_before_it_is_asked_for(name):
    harness.check_reading(*SOURCES[name](name))
