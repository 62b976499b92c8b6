"""Tests of transformers' releases: both names of the cache, keywords that nothing reads, and an old checkpoint."""

import json
import logging
import shutil
import warnings
from dataclasses import make_dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.utils import TransformersKwargs
from transformers.utils import logging as transformers_logging

from modeling_moe import MoEForCausalLM, MoEModel, compatibility
from modeling_moe.compatibility import CACHE_NAME, CACHE_NAMES, KEYWORDS, GenerationInputs, cache_name
from modeling_moe.modeling_moe import MODELS
from tests.builders import tiny_config, train_tokenizer


IDS = torch.arange(3, 21).view(2, 9)
OLD = Path(__file__).parent / "golden" / "moe_0.1.0"
EACH_NAME = pytest.mark.parametrize("name", CACHE_NAMES)
EACH_MODEL = pytest.mark.parametrize("model_class", MODELS)


def make(model_class=MoEForCausalLM, **fields):
    return model_class(tiny_config(num_shared_experts=1, **fields)).eval()


@EACH_NAME
@EACH_MODEL
def test_a_cache_is_taken_by_each_name(model_class, name):
    model = make(model_class)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(IDS[:, :5], use_cache=True, **{name: cache})
    assert cache.get_seq_length() == 5


@EACH_NAME
@pytest.mark.parametrize("model_class", [MoEForCausalLM, MoEModel])
def test_a_cache_is_returned_by_each_name(model_class, name):
    outputs = make(model_class)(IDS, use_cache=True)
    assert getattr(outputs, name).get_seq_length() == 9
    assert outputs[CACHE_NAME] is getattr(outputs, name)


@EACH_NAME
def test_layers_and_attention_take_each_name(name):
    layer = make().model.layers[0]
    cache = DynamicCache()
    states = torch.randn(1, 4, 32)
    positions = torch.ones(1, 4, 12), torch.zeros(1, 4, 12)
    layer(states, position_embeddings=positions, **{name: cache})
    layer.self_attn(states, positions, None, **{name: cache})
    assert cache.get_seq_length() == 8


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_the_old_name_gives_a_warning_where_transformers_warns(name):
    model = make()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model(IDS, **{name: DynamicCache(config=model.config)})
    said = [str(each.message) for each in caught if issubclass(each.category, FutureWarning)]
    if name == CACHE_NAME or CACHE_NAME == "past_key_values":
        assert said == []
    else:
        assert said == ["`past_key_values` is deprecated in this transformers. MoEForCausalLM takes `cache` too."]


def test_two_caches_are_refused():
    model = make()
    first, second = DynamicCache(config=model.config), DynamicCache(config=model.config)
    with pytest.raises(TypeError, match=r"MoEForCausalLM got a cache as cache and as past_key_values"):
        model(IDS, cache=first, past_key_values=second)
    model(IDS, cache=first, past_key_values=None)


def test_a_release_with_another_name_is_refused():
    assert cache_name(make_dataclass("Old", ["past_key_values"])) == "past_key_values"
    assert cache_name(make_dataclass("New", ["cache"])) == "cache"
    with pytest.raises(ImportError, match="names the cache neither cache nor past_key_values"):
        cache_name(make_dataclass("Newer", ["state"]))


@EACH_MODEL
@pytest.mark.parametrize("keyword", ["past_kv", "cache_params", "attention_masks", "label", "token_type_ids"])
def test_a_keyword_that_nothing_reads_is_refused(model_class, keyword):
    model = make(model_class)
    with pytest.raises(TypeError, match=rf"forward\(\) got an unexpected keyword argument {keyword!r}, which nothing"):
        model(IDS, **{keyword: None})
    with pytest.raises(TypeError, match=keyword):
        model(IDS, **{keyword: torch.ones(2, 9)})


def test_a_misspelt_keyword_gets_the_right_one():
    with pytest.raises(TypeError, match=r"did you mean output_hidden_states\?"):
        make()(IDS, output_hidden_state=True)
    with pytest.raises(TypeError, match=r"did you mean attention_mask\?"):
        make()(IDS, attention_masks=torch.ones_like(IDS))
    with pytest.raises(TypeError, match="nothing would read: leave it out"):
        make()(IDS, banana=1)


def test_token_types_are_refused_with_the_remedy():
    with pytest.raises(TypeError, match=r"set tokenizer.model_input_names = \['input_ids', 'attention_mask'\]"):
        make()(IDS, token_type_ids=torch.zeros_like(IDS))
    with pytest.raises(TypeError, match="leave it out, or give position_ids"):
        make()(IDS, cache_position=torch.arange(9))


@EACH_MODEL
@pytest.mark.parametrize("keyword", sorted(KEYWORDS - {"position_ids", "output_router_logits", "logits_to_keep"}))
def test_keywords_of_known_callers_are_accepted(model_class, keyword):
    model = make(model_class)
    expected = model(IDS)[0]
    torch.testing.assert_close(model(IDS, **{keyword: None})[0], expected)


def test_the_decoder_ignores_what_a_head_keeps():
    model = make(MoEModel)
    torch.testing.assert_close(model(IDS, logits_to_keep=2)[0], model(IDS)[0])


def test_transformers_own_keywords_are_known():
    assert set(TransformersKwargs.__annotations__) <= KEYWORDS
    assert {"num_items_in_batch", "cu_seq_lens_q", "output_hidden_states"} <= KEYWORDS


def test_outputs_that_a_server_adds_to_the_recorded_ones_are_known():
    model = make(MoEModel)
    with pytest.raises(TypeError, match="output_aux"):
        model(IDS, output_aux=True)
    model._can_record_outputs = model._can_record_outputs | {"aux": model._can_record_outputs["hidden_states"]}
    model(IDS, output_aux=True)


@EACH_NAME
def test_generate_takes_each_name(name):
    model = make()
    length = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    cache = DynamicCache(config=model.config)
    text = model.generate(IDS, **length, **{name: cache})
    assert torch.equal(text, model.generate(IDS, **length, use_cache=False))
    assert cache.get_seq_length() == 12
    with pytest.raises(TypeError, match=r"generate\(\) got a cache as cache and as past_key_values"):
        model.generate(IDS, **length, cache=cache, past_key_values=cache)


class Proxy:
    """A cache that delegates every call to another cache, and is not an instance of a class of transformers."""

    def __init__(self, cache):
        self.cache = cache

    def __getattr__(self, name):
        return getattr(self.__dict__["cache"], name)


@EACH_NAME
@pytest.mark.parametrize("fields", [{}, {"router_type": "lory", "segment_length": 3}], ids=str)
def test_a_cache_of_another_class_is_used(name, fields):
    model = make(**fields)
    cache, whole = Proxy(DynamicCache(config=model.config)), model(IDS).logits
    model(IDS[:, :5], **{name: cache})
    torch.testing.assert_close(model(IDS[:, 5:], **{name: cache}).logits, whole[:, 5:])


def test_inputs_of_generation_have_one_cache_by_both_names():
    inputs = GenerationInputs(input_ids=1, **{CACHE_NAME: 2})
    for name in CACHE_NAMES:
        assert name in inputs
        assert inputs[name] == inputs.get(name) == 2
        inputs[name] = 2
    assert dict(**inputs) == {"input_ids": 1, CACHE_NAME: 2}
    assert inputs.get("other", 3) == 3
    assert inputs.pop("past_key_values") == 2
    assert inputs.pop("cache", None) is None
    assert "cache" not in inputs


def test_generate_refuses_a_keyword_too():
    with pytest.raises(ValueError, match="past_kv"):
        make().generate(IDS, max_new_tokens=2, past_kv=3)


@pytest.fixture
def old_checkpoint(tmp_path):
    """Copies a checkpoint of version 0.1.0 whose code fails if it runs; this package must be used instead."""
    folder = tmp_path / "old"
    shutil.copytree(OLD, folder)
    for name in ("configuration_moe.py", "modeling_moe.py"):
        (folder / name).write_text("raise AssertionError('the code of the checkpoint ran')")
    return folder


@pytest.mark.parametrize("trust_remote_code", [False, True])
def test_an_old_checkpoint_writes_its_text(old_checkpoint, trust_remote_code, caplog, monkeypatch):
    transformers_logging.warning_once.cache_clear()
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    expected = json.loads((OLD / "expected.json").read_text())
    with caplog.at_level(logging.WARNING):
        model = AutoModelForCausalLM.from_pretrained(old_checkpoint, trust_remote_code=trust_remote_code)
    assert sum("was saved by modeling_moe 0.1.0" in record.message for record in caplog.records) == 1
    ids, length = torch.tensor([expected["text"]]), {"max_new_tokens": 12, "min_new_tokens": 12}
    torch.testing.assert_close(model(ids).logits[0, -1, :5], torch.tensor(expected["logits"]), atol=1e-5, rtol=1e-5)
    for use_cache in (True, False):
        text = model.generate(ids[:, :5], **length, do_sample=False, use_cache=use_cache)
        assert text.tolist() == [expected["text"]]


def test_a_checkpoint_saved_again_is_silent(old_checkpoint, tmp_path, caplog, monkeypatch):
    AutoModelForCausalLM.from_pretrained(old_checkpoint).save_pretrained(tmp_path / "new")
    assert json.loads((tmp_path / "new" / "config.json").read_text())["code_version"] == compatibility.__version__
    transformers_logging.warning_once.cache_clear()
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    assert not any("was saved by modeling_moe" in record.message for record in caplog.records)


def test_old_code_under_a_new_version_gives_a_warning(old_checkpoint, tmp_path, caplog, monkeypatch):
    """Version 0.1.0 keeps `code_version` when it loads and saves a checkpoint of a later version."""
    config = json.loads((old_checkpoint / "config.json").read_text()) | {"code_version": "0.2.0"}
    (old_checkpoint / "config.json").write_text(json.dumps(config))
    transformers_logging.warning_once.cache_clear()
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with caplog.at_level(logging.WARNING):
        AutoModelForCausalLM.from_pretrained(old_checkpoint)
    assert any("was saved by modeling_moe 0.1.0" in record.message for record in caplog.records)


def test_generate_takes_stop_strings():
    model, tokenizer = make(MoEForCausalLM), train_tokenizer()
    prompt = torch.tensor([[5, 6, 7]])
    plain = model.generate(prompt, max_new_tokens=6, do_sample=False)
    stop = tokenizer.decode(plain[0, 4:5])
    stopped = model.generate(prompt, max_new_tokens=6, do_sample=False, stop_strings=[stop], tokenizer=tokenizer)
    assert 4 <= stopped.shape[1] <= 5
    assert torch.equal(stopped, plain[:, : stopped.shape[1]])
