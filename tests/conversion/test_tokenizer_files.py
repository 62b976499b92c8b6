"""A converted folder has the source's tokenizer, whatever its files are and however transformers treats the model type."""

import json
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPTNeoXConfig
from transformers.models import gemma2, granite, llama, mistral, olmo2, phi3, qwen2, qwen2_moe
from transformers.testing_utils import CaptureLogger

from modeling_moe.conversion import convert_checkpoint
from modeling_moe.conversion.tokenizer_files import logger
from modeling_moe.upcycling import UpcyclingOptions, upcycle_checkpoint


TEXT = ["The quick brown fox isn't 12345. Ünïcode 漢字 😀 " * 3, "A router sends each token to an expert."] * 20
PROBE = "The fox  isn't lazy, 漢字 😀\n\n<|im_start|>user\nhi<|im_end|> <tool> 123 <|endoftext|></s><eos>"
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
END = "<|endoftext|>"
SIZE = {
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2}
SOURCES = {
    "gpt2": GPT2Config(vocab_size=512, n_embd=32, n_layer=2, n_head=4, n_positions=64, **TOKENS),
    "gpt_neox": GPTNeoXConfig(
        vocab_size=512, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, **TOKENS
    ),
    "llama": llama.LlamaConfig(**SIZE),
    "mistral": mistral.MistralConfig(**SIZE),
    "qwen2": qwen2.Qwen2Config(**SIZE),
    "gemma2": gemma2.Gemma2Config(**SIZE, head_dim=8),
    "phi3": phi3.Phi3Config(**SIZE),
    "olmo2": olmo2.Olmo2Config(**SIZE),
    "granite": granite.GraniteConfig(**SIZE),
    "qwen2_moe": qwen2_moe.Qwen2MoeConfig(**SIZE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24),
}


@pytest.fixture(scope="module")
def byte_level() -> Tokenizer:
    """Returns a byte-level BPE tokenizer like GPT-2's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[END, "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer


@pytest.fixture(scope="module")
def pieces(tmp_path_factory) -> Path:
    """Returns a folder with two SentencePiece models, llama.model and gemma.model."""
    sentencepiece = pytest.importorskip("sentencepiece")
    folder = tmp_path_factory.mktemp("pieces")
    (folder / "text.txt").write_text("\n".join(TEXT), "utf-8")
    shared = {"input": str(folder / "text.txt"), "vocab_size": 350, "model_type": "bpe", "byte_fallback": True}
    gemma = {"pad_piece": "<pad>", "eos_piece": "<eos>", "bos_piece": "<bos>"}
    ids = {"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3}
    train = sentencepiece.SentencePieceTrainer.train
    train(**shared, minloglevel=2, model_prefix=str(folder / "llama"), unk_id=0, bos_id=1, eos_id=2)
    train(**shared, minloglevel=2, model_prefix=str(folder / "gemma"), **gemma, **ids)
    return folder


# each source has a model type, a vocabulary, a tokenizer_config.json, and other files
FILES = {
    "gpt2-vocab-and-merges-alone": ("gpt2", "vocab", None, {}),
    "gpt2-as-on-the-hub": ("gpt2", "vocab", {"model_max_length": 1024}, {}),
    "gpt2-json-alone": ("gpt2", "json", None, {}),
    "gpt2-added-tokens": (
        "gpt2",
        "vocab",
        {"additional_special_tokens": ["<tool>"]},
        {"added_tokens.json": {"<tool>": 400}},
    ),
    "gpt_neox-json-alone": ("gpt_neox", "json", None, {}),
    "gpt_neox-class": (
        "gpt_neox",
        "json",
        {"tokenizer_class": "GPTNeoXTokenizer", "eos_token": END, "bos_token": END},
        {},
    ),
    "qwen2-vocab": (
        "qwen2",
        "vocab",
        {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "chat_template": TEMPLATE},
        {},
    ),
    "qwen2-vocab-without-class": ("qwen2", "vocab", None, {}),
    "qwen2-fast": ("qwen2", "json", {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"}, {}),
    "qwen2_moe-map": (
        "qwen2_moe",
        "json",
        None,
        {"special_tokens_map.json": {"eos_token": END, "pad_token": "<|im_end|>"}},
    ),
    "llama-slow": (
        "llama",
        "llama",
        {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": True},
        {},
    ),
    "llama-slow-without-class": ("llama", "llama", None, {}),
    "mistral-slow": ("mistral", "llama", {"tokenizer_class": "LlamaTokenizer", "legacy": False}, {}),
    "phi3-slow": ("phi3", "llama", {"tokenizer_class": "LlamaTokenizer", "legacy": False}, {}),
    "olmo2-gpt2": (
        "olmo2",
        "json",
        {"tokenizer_class": "GPT2Tokenizer", "eos_token": END, "padding_side": "left"},
        {},
    ),
    "granite-gpt2": (
        "granite",
        "json",
        {"tokenizer_class": "GPT2Tokenizer", "eos_token": END, "model_max_length": 77},
        {},
    ),
    "gemma2-slow": ("gemma2", "gemma", {"tokenizer_class": "GemmaTokenizer"}, {}),
    "gemma2-slow-without-class": ("gemma2", "gemma", None, {}),
}


def save_source(name: str, folder: Path, byte_level: Tokenizer, pieces: Path) -> None:
    model_type, vocabulary, config, others = FILES[name]
    AutoModelForCausalLM.from_config(SOURCES[model_type]).save_pretrained(folder)
    if vocabulary == "vocab":
        byte_level.model.save(str(folder))
    elif vocabulary == "json":
        byte_level.save(str(folder / "tokenizer.json"))
    else:
        shutil.copy(pieces / f"{vocabulary}.model", folder / "tokenizer.model")
    files = others | ({} if config is None else {"tokenizer_config.json": config})
    for file, values in files.items():
        (folder / file).write_text(json.dumps(values), "utf-8")


def assert_equal_behaviour(folder: Path, source: Path) -> None:
    """Asserts equal ids, text, special tokens, template and settings by a list that the tested code does not use."""
    ours, theirs = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(source)
    assert ours(PROBE).input_ids == theirs(PROBE).input_ids
    assert ours(PROBE, add_special_tokens=False).input_ids == theirs(PROBE, add_special_tokens=False).input_ids
    assert ours.decode(theirs(PROBE).input_ids) == theirs.decode(theirs(PROBE).input_ids)
    assert ours.get_vocab() == theirs.get_vocab()
    assert (ours.bos_token_id, ours.eos_token_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert (ours.pad_token_id, ours.unk_token_id) == (theirs.pad_token_id, theirs.unk_token_id)
    assert set(ours.all_special_ids) == set(theirs.all_special_ids)
    assert ours.chat_template == theirs.chat_template
    settings = ("padding_side", "truncation_side", "model_max_length")
    assert [getattr(ours, name) for name in settings] == [getattr(theirs, name) for name in settings]


@pytest.mark.parametrize("name", FILES)
def test_a_converted_folder_does_not_lose_its_tokenizers_class(name, tmp_path, byte_level, pieces):
    save_source(name, tmp_path / "source", byte_level, pieces)
    convert_checkpoint(str(tmp_path / "source"), tmp_path / "moe")
    assert_equal_behaviour(tmp_path / "moe", tmp_path / "source")


def test_an_upcycled_gpt2_keeps_its_first_and_last_token(tmp_path, byte_level, pieces):
    save_source("gpt2-as-on-the-hub", tmp_path / "source", byte_level, pieces)
    upcycle_checkpoint(str(tmp_path / "source"), tmp_path / "moe", UpcyclingOptions(num_experts=4))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "moe")
    assert tokenizer.bos_token == tokenizer.eos_token == END
    assert tokenizer.bos_token_id == byte_level.token_to_id(END)
    assert_equal_behaviour(tmp_path / "moe", tmp_path / "source")


def test_files_that_load_as_the_sources_tokenizer_are_copied_byte_for_byte(tmp_path, byte_level, pieces):
    save_source("llama-slow", tmp_path / "source", byte_level, pieces)
    convert_checkpoint(str(tmp_path / "source"), tmp_path / "moe")
    for name in ("tokenizer.model", "tokenizer_config.json"):
        assert (tmp_path / "moe" / name).read_bytes() == (tmp_path / "source" / name).read_bytes()
    assert not (tmp_path / "moe" / "tokenizer.json").exists()


def test_a_tokenizer_that_does_not_load_is_copied_with_a_warning(tmp_path):
    AutoModelForCausalLM.from_config(SOURCES["llama"]).save_pretrained(tmp_path / "source")
    (tmp_path / "source" / "tokenizer.json").write_text("{}")
    with CaptureLogger(logger) as captured:
        convert_checkpoint(str(tmp_path / "source"), tmp_path / "moe")
    assert "were copied, but do not load" in captured.out
    assert (tmp_path / "moe" / "tokenizer.json").read_text() == "{}"
