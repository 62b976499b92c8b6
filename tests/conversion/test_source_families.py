"""Every MoE family of the installed transformers can be converted, or a reason is given, in the error and on a page."""

import pytest
import transformers
from packaging.version import Version
from transformers import CONFIG_MAPPING
from transformers.models.auto.configuration_auto import model_type_to_module_name

from modeling_moe.conversion import moe_config
from modeling_moe.conversion.families.unread import follows_interface, reasons
from modeling_moe.utils.errors import UserError
from tests.conversion import source_families
from tests.conversion.source_families import COUNT, PAGE, ROOT
from tests.monitoring.moe_families import experts_families, other_families


REMEDY = "run python -m tests.conversion.source_families"


@pytest.mark.parametrize("family", source_families.source_families(), ids=lambda family: family.folder)
def test_each_family_is_read_or_has_a_reason(family):
    assert family.read or family.reason, f"{family.folder} has no conversion: write what a MoE lacks into unread.json"
    assert not (family.read and family.reason), f"{family.folder} has a conversion and a reason: {REMEDY}"


def test_folders_with_experts_are_found():
    assert len(experts_families()) > 50
    assert len(other_families()) > 5
    # Sarvam's configurations, which transformers 5.17 does not have yet, use the classes of other folders
    expected = {"mixtral", "dbrx", *({"sarvam_moe"} & {*CONFIG_MAPPING})}
    assert expected <= {*source_families.folders()}
    assert all(follows_interface(folder) for folder in experts_families())
    assert not any(follows_interface(folder) for folder in other_families())


def test_reasons_are_about_families_with_experts():
    known = {*source_families.folders()}
    if known.isdisjoint({"inkling2_loop"}):
        pytest.skip("an older transformers lacks some of the families")
    assert {*reasons()} <= known
    assert list(reasons()) == sorted(reasons())


def test_page_is_up_to_date():
    written = PAGE.read_text("utf-8")
    if f"transformers {transformers.__version__} " not in written:
        assert Version(transformers.__version__) < Version("5.24"), REMEDY
        pytest.skip("the page shows another release of transformers")
    assert written == source_families.page(), REMEDY


def test_readme_counts_the_families():
    found = COUNT.findall((ROOT / "README.md").read_text("utf-8"))
    assert found
    assert set(found) == {source_families.count()}, REMEDY


@pytest.mark.parametrize("model_type", ["qwen3_next", "qwen3_5_moe_text", "nllb-moe", "jamba"])
def test_error_gives_the_reason_and_the_tools(model_type):
    folder = model_type_to_module_name(model_type)
    with pytest.raises(UserError) as error:
        moe_config(CONFIG_MAPPING[model_type]())
    message = str(error.value)
    assert message.startswith(
        f"model_type {model_type!r} has no conversion: {reasons()[folder]}, which a MoE cannot hold"
    )
    assert ("modeling_moe.watch" in message) == (folder in experts_families())


def test_wrapper_that_nobody_compared_is_refused():
    with pytest.raises(UserError, match="'paligemma' has no conversion: its text model is of the family gemma2"):
        moe_config(CONFIG_MAPPING["paligemma"](text_config={"model_type": "gemma2"}))


def test_unknown_family_lists_the_known_ones():
    with pytest.raises(UserError, match="'bert' has no conversion: it must be one of afmoe, aria, aria_text,"):
        moe_config(CONFIG_MAPPING["bert"]())
