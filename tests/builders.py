"""This module builds the tiny models, configurations, tokenizers and texts that several tests use."""

import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, TrainerCallback, TrainingArguments

from modeling_moe import MoEConfig, MoEForCausalLM
from modeling_moe.modeling_moe import MoEBlock
from modeling_moe.router_catalogue import router_class


# fields that transformers' configurations of decoders share
SHAPE = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZE = SHAPE | TOKENS
SMALLEST = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
WORDS = ["der", "Weg", "führt", "über", "die", "Brücke", "to", "the", "old", "mill", "日本", "🙂"]


def tiny_config(**fields) -> MoEConfig:
    """Returns the configuration of a model small enough for float64 and finite differences, with odd sizes: 5 experts, 3 per token, wide heads."""
    defaults = {
        "vocab_size": 99,
        "hidden_size": 32,
        "intermediate_size": 40,
        "moe_intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "num_experts": 5,
        "num_experts_per_tok": 3,
        "mlp_layer_types": ["sparse", "dense", "sparse"],
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.2,
    }
    return MoEConfig(**(defaults | fields))


def router_of_logits(num_experts: int, **fields):
    """Returns a float64 router whose logits are the tokens (T, E) themselves."""
    config = tiny_config(
        **({"num_experts": num_experts, "hidden_size": num_experts, "num_experts_per_tok": 2} | fields)
    )
    router = router_class(config)(config)
    router.init_weights(0.0)
    with torch.no_grad():
        router.weight.copy_(torch.eye(num_experts))
    return router.double()


def eager_block(**fields) -> MoEBlock:
    """Returns a float64 sparse block with the eager loop over its experts, all its weights random."""
    config = tiny_config(**fields)
    config._experts_implementation = "eager"
    block = MoEBlock(config)
    block.gate.init_weights(0.5)
    for parameter in block.experts.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return block.double()


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


def save_llama(folder: Path, **fields) -> Path:
    """Saves a random Llama and the tokenizer of [`train_tokenizer`] in a folder, and returns the folder."""
    torch.manual_seed(0)
    config = LlamaConfig(**(SHAPE | {"vocab_size": 300, "max_position_embeddings": 2048} | fields))
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    train_tokenizer().save_pretrained(folder)
    return folder


def folder_contents(folder: Path) -> dict[str, bytes]:
    """Returns the bytes of every file below a folder, by the path in the folder."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def add_small_files(folder: Path) -> None:
    """Writes the small files that stand beside the weights of a checkpoint."""
    (folder / "config.json").write_text("{}")
    (folder / "templates").mkdir()
    (folder / "templates" / "chat.jinja").write_text("hello")
