"""Shared by the tests of training: a tokenizer trained on a small text, tiny models, and `Trainer` arguments."""

import random
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, TrainerCallback, TrainingArguments

import modeling_moe.training
from modeling_moe import MoEForCausalLM
from tests.conftest import tiny_config


WORDS = ["der", "Weg", "führt", "über", "die", "Brücke", "to", "the", "old", "mill", "日本", "🙂"]


def sample_text(lines: int = 800) -> str:
    """Returns lines of random words whose characters have one to four UTF-8 bytes."""
    choice = random.Random(0).choices
    return "".join(" ".join(choice(WORDS, k=8)) + ".\n" for _ in range(lines))


def train_tokenizer(vocab_size: int = 300) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer like GPT-2's; a small one cuts characters into bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([sample_text()], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")


def tiny_model(**fields) -> MoEForCausalLM:
    """Returns a tiny model; equal fields give equal weights."""
    torch.manual_seed(0)
    return MoEForCausalLM(tiny_config(vocab_size=300, **fields))


def training_arguments(output_dir: Path, **fields) -> TrainingArguments:
    """Returns arguments for one plain SGD step on the CPU, without gradient clipping."""
    defaults = {
        "output_dir": str(output_dir),
        "use_cpu": True,
        "max_steps": 1,
        "max_grad_norm": 0.0,
        "optim": "sgd",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "per_device_train_batch_size": 8,
    }
    return TrainingArguments(**(defaults | fields))


class GradientRecorder(TrainerCallback):
    """Keeps the routers' gradients of the last optimizer step in `gradients`, by name."""

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        """Copies the gradients."""
        self.gradients = {
            name: parameter.grad.clone()
            for name, parameter in model.named_parameters()
            if name.endswith("mlp.gate.weight") and parameter.grad is not None
        }


@pytest.fixture(autouse=True)
def enabled():
    """Gives each `Trainer` of a test a MoECallback."""
    modeling_moe.training.enable()
    yield
    modeling_moe.training.disable()


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Returns a tokenizer of 300 tokens."""
    return train_tokenizer()


@pytest.fixture
def text_file(tmp_path) -> Path:
    """Returns a text file of 800 lines and 28 kB."""
    path = tmp_path / "sample.txt"
    path.write_text(sample_text(), encoding="utf-8")
    return path


@pytest.fixture
def checkpoint(tmp_path, tokenizer) -> Path:
    """Returns the folder of a tiny MoE with a tokenizer."""
    path = tmp_path / "checkpoint"
    tiny_model().save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path
