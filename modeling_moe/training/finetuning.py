# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""Fine-tuning by transformers' `Trainer`: all weights, or LoRA by PEFT."""

import math
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from ..cli import UserError
from ..files import load_source, load_tokenizer
from ..routing import Router
from .callbacks import MoECallback
from .data import DataArguments, load_and_pack


EXPERT_PARAMETERS = ("gate_up_proj", "up_proj", "down_proj")
REPLACED = ("*.safetensors", "*.safetensors.index.json", "config.json", "adapter_config.json")


@dataclass
class ModelArguments:
    """What to train."""

    model_name_or_path: str = field(metadata={"help": "folder or Hub name of a causal LM, sparse or dense"})
    method: str = field(default="full", metadata={"help": "full or lora"})
    dtype: str | None = field(
        default=None,
        metadata={"help": "float32, bfloat16, float16 or auto (the checkpoint's); float32 for full, auto for lora"},
    )
    eval_fraction: float = field(default=0.05, metadata={"help": "part of each domain held out for the eval loss"})
    overwrite: bool = field(default=False, metadata={"help": "write into an output_dir that is not empty"})

    def __post_init__(self):
        if self.dtype is None:
            # an update is often smaller than the last bit of a 16-bit weight
            self.dtype = "float32" if self.method == "full" else "auto"
        if self.method not in ("full", "lora"):
            raise UserError(f"method is {self.method!r}: choose full or lora")
        if not 0 <= self.eval_fraction < 1:
            raise UserError(f"eval_fraction is {self.eval_fraction}: choose a number from 0 (none) to below 1")


@dataclass
class LoraArguments:
    """Which weights get a low-rank update, for `--method lora`."""

    lora_r: int = field(default=16, metadata={"help": "rank; of each expert on its own"})
    lora_alpha: int = field(default=32, metadata={"help": "the update is scaled by lora_alpha / lora_r"})
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj"], metadata={"help": "linear layers"}
    )
    lora_experts: bool = field(default=True, metadata={"help": "update the routed experts"})
    lora_router: bool = field(default=True, metadata={"help": "train the routers, in full: they are small"})
    merge_lora: bool = field(default=True, metadata={"help": "save the merged model rather than the adapter"})

    def __post_init__(self):
        if self.lora_r < 1:
            raise UserError(f"lora_r is {self.lora_r}: it must be at least 1")


@dataclass
class FinetuneArguments(TrainingArguments):
    """transformers' [`~transformers.TrainingArguments`] that log early."""

    logging_first_step: bool = field(default=True, metadata={"help": "log the first step's loss"})
    logging_steps: float = field(default=10, metadata={"help": "steps between two log lines"})


@dataclass(frozen=True)
class FinetuneResult:
    """What a run did.

    Attributes:
        steps: optimizer steps, those before a resumption included.
        trained_params: parameters that were trained.
        first_loss: mean of the first quarter of the training losses logged, nats per token, router losses included;
            NaN if none was.
        last_loss: mean of the last quarter.
        eval_loss: cross entropy on each domain's held-out text.
        seconds: wall time of the training.
        tokens_per_second: tokens of all ranks over that time.
    """

    steps: int
    trained_params: int
    first_loss: float
    last_loss: float
    eval_loss: dict[str, float]
    seconds: float
    tokens_per_second: float


def moe_lora_config(model: nn.Module, args: LoraArguments) -> LoraConfig:
    """PEFT's own configuration: LoRA on linear layers and expert tensors, and the routers as modules to save.

    Args:
        model: any causal LM; experts and routers are looked for by transformers' names.
        args: what to update.

    Raises:
        UserError: if the model has none of `lora_target_modules`.
    """
    names = [name for name, _ in model.named_modules()]
    if not any(name.endswith(tuple(f".{target}" for target in args.lora_target_modules)) for name in names):
        raise UserError(f"lora_target_modules {' '.join(args.lora_target_modules)} match no layer: name linear layers")
    parameters = {name for name, _ in model.named_parameters()}
    experts = [f"mlp.experts.{name}" for name in EXPERT_PARAMETERS]
    experts = [target for target in experts if any(name.endswith(f".{target}") for name in parameters)]
    has_router = any(name.endswith(".mlp.gate") for name in names)
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        target_modules=args.lora_target_modules,
        target_parameters=experts if experts and args.lora_experts else None,
        modules_to_save=["mlp.gate"] if has_router and args.lora_router else None,
    )


def _check_output_dir(args: TrainingArguments, overwrite: bool) -> str | None:
    """Checkpoint to resume from, if any."""
    folder = Path(args.output_dir)
    resume = args.resume_from_checkpoint
    if resume is not None and resume.lower() == "true":
        resume = get_last_checkpoint(args.output_dir) if folder.is_dir() else None
        if resume is None:
            raise UserError(f"resume_from_checkpoint: {folder} holds no checkpoint, leave the flag away to start anew")
    if resume is not None and not Path(resume).is_dir():
        raise UserError(
            f"resume_from_checkpoint {resume} is not a folder: name a checkpoint, or true for the last one"
        )
    occupied = folder.is_file() or (folder.is_dir() and any(folder.iterdir()))
    if occupied and resume is None and not overwrite:
        raise UserError(
            f"output_dir {folder} is not empty: choose another, or pass --overwrite or --resume_from_checkpoint true"
        )
    return resume


def _save(trainer: Trainer, tokenizer: PreTrainedTokenizerBase, merge: bool) -> None:
    """Saves model and tokenizer in `output_dir`, beside the checkpoints: each file is whole or not there."""
    output_dir = Path(trainer.args.output_dir)
    partial = output_dir / ".partial"
    try:
        if not merge:
            trainer.save_model(str(partial))
        elif trainer.args.should_save:
            model = trainer.accelerator.unwrap_model(trainer.model).merge_and_unload()
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
        if trainer.args.should_save:
            for pattern in REPLACED:
                for stale in output_dir.glob(pattern):
                    stale.unlink()
            for file in partial.iterdir():
                os.replace(file, output_dir / file.name)
    finally:
        if trainer.args.should_save:
            shutil.rmtree(partial, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()


def _load_for_training(
    model_args: ModelArguments, lora_args: LoraArguments, checkpointing: bool
) -> PreTrainedModel | PeftModel:
    model = load_source(model_args.model_name_or_path, dtype=model_args.dtype or "auto")
    if model_args.method == "full":
        return model
    moves_buffers = getattr(model.config, "controller", None)
    if moves_buffers and not (lora_args.lora_router or lora_args.merge_lora):
        raise UserError(
            "merge_lora false would lose what the routers' controller moves in training: set lora_router true"
        )
    for module in model.modules():
        if isinstance(module, Router):
            module.float()  # PEFT does so for its own weights only
    model = get_peft_model(model, moe_lora_config(model, lora_args))
    if checkpointing:
        # reentrant checkpointing needs an input with a gradient, and the embedding is frozen
        model.enable_input_require_grads()
    return model


def finetune(
    model_args: ModelArguments, data_args: DataArguments, lora_args: LoraArguments, args: TrainingArguments
) -> FinetuneResult:
    """Trains, and saves the model with its tokenizer in `args.output_dir`; the same result for the same seed.

    Raises:
        UserError: for an argument that cannot work, before anything is written.
    """
    resume = _check_output_dir(args, model_args.overwrite)
    tokenizer = load_tokenizer(model_args.model_name_or_path)
    with args.main_process_first(desc="data"):
        train, held_out = load_and_pack(data_args, tokenizer, model_args.eval_fraction, args.data_seed or args.seed)
    set_seed(args.seed)
    model = _load_for_training(model_args, lora_args, bool(args.gradient_checkpointing))
    if len(tokenizer) > model.config.vocab_size:
        raise UserError(
            f"the tokenizer has {len(tokenizer)} tokens and the model {model.config.vocab_size}: match them"
        )
    merge = model_args.method == "lora" and lora_args.merge_lora
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=held_out or None,
        processing_class=tokenizer,
        data_collator=default_data_collator,
        callbacks=[MoECallback()],
    )
    if merge and (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        raise UserError("merge_lora true cannot merge a model that is split over ranks: set merge_lora false")
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    metrics = trainer.train(resume_from_checkpoint=resume).metrics
    eval_loss = {}
    for name, blocks in held_out.items():
        eval_loss[name] = trainer.evaluate(blocks, metric_key_prefix=f"eval_{name}")[f"eval_{name}_loss"]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry] or [math.nan]
    quarter = max(1, len(losses) // 4)
    _save(trainer, tokenizer, merge)
    return FinetuneResult(
        steps=trainer.state.global_step,
        trained_params=trained,
        first_loss=fmean(losses[:quarter]),
        last_loss=fmean(losses[-quarter:]),
        eval_loss=eval_loss,
        seconds=metrics["train_runtime"],
        tokens_per_second=metrics["train_samples_per_second"] * data_args.max_length,
    )
