# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""Fine-tuning by transformers' `Trainer`: all weights, some of them, or LoRA by PEFT."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from peft import PeftModel, get_peft_model
from torch import nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.integrations import get_reporting_integration_callbacks

from ..cli import UserError
from ..lora.sharding import full_shape
from ..utils.loading import load_config, load_model, load_tokenizer
from .arguments import LoraArguments, ModelArguments
from .callbacks import CastOnceCallback
from .data import DataArguments, load_and_pack
from .freezing import FreezeExpertsCallback
from .nan_stop import NanStopMixin
from .resuming import WholeCheckpointsTrainer, checkpoint_to_resume, discard_checkpoints, save_result
from .sharded import ShardedResumeMixin, is_split


# part of a model -> names of its parameters
PARTS = {
    "router": re.compile(r"\.(gate|router)\."),
    "attention": re.compile(r"\.(self_attn|self_attention|attention|attn)\."),
    "experts": re.compile(r"\.experts\."),
}


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


class FinetuneTrainer(ShardedResumeMixin, NanStopMixin, WholeCheckpointsTrainer):
    """transformers' `Trainer` that stops at NaN, and whose checkpoints are enough to resume and tell whether they are
    whole."""


class LogAtCheckpoints(TrainerCallback):
    """Logs the loss whenever a checkpoint is saved, for the mean since the last log line is not in it."""

    def on_step_end(self, args, state, control, **kwargs):
        """Logs before the checkpoint is saved."""
        control.should_log = control.should_log or control.should_save

    def on_epoch_end(self, args, state, control, **kwargs):
        """Logs before the checkpoint is saved."""
        control.should_log = control.should_log or control.should_save


def trained_parameters(model: nn.Module) -> dict[str, tuple[int, int]]:
    """How many parameters are trained and how many there are, by the part of the model that they belong to."""
    counts = {}
    for name, parameter in model.named_parameters():
        group = next((part for part, pattern in PARTS.items() if pattern.search(name)), "others")
        trained, total = counts.get(group, (0, 0))
        size = full_shape(parameter).numel()
        counts[group] = (trained + size * parameter.requires_grad, total + size)
    return counts


def _train_only(model: nn.Module, part: str) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(PARTS[part].search(name) is not None)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(f"method {part} finds no {part} in this model: choose another")


def _add_lora(model: PreTrainedModel, args: LoraArguments) -> PeftModel:
    if getattr(model.config, "controller", None) and not args.lora_router:
        raise UserError(
            "lora_router false would lose what the routers' controller moves in training: set lora_router true"
        )
    return get_peft_model(model, args.config(model))


def _load_for_training(
    model_args: ModelArguments, lora_args: LoraArguments, checkpointing: bool, resume: str | None
) -> PreTrainedModel | PeftModel:
    source = model_args.model_name_or_path
    if resume is not None and (Path(resume) / "config.json").is_file():
        # `Trainer` looks for fused experts, and transformers' own models have one tensor for each in the checkpoint
        source = resume
    model = load_model(source, dtype=model_args.dtype or "auto", distributed_config=model_args.distributed_config())
    if model_args.method == "lora":
        model = _add_lora(model, lora_args)
    elif model_args.method != "full":
        _train_only(model, model_args.method)
    if checkpointing and model_args.method != "full":
        # reentrant checkpointing needs an input with a gradient, and the embedding is frozen
        model.enable_input_require_grads()
    return model


def _check_processes(args: TrainingArguments, model_args: ModelArguments) -> None:
    needed = model_args.fsdp_size * model_args.tp_size
    if needed not in (1, args.world_size):
        raise UserError(
            f"fsdp_size {model_args.fsdp_size} times tp_size {model_args.tp_size} is {needed} processes, and there are "
            f"{args.world_size}: start {needed} with torchrun --nproc_per_node"
        )


def _check_dtypes(trainer: Trainer, model: PreTrainedModel | PeftModel) -> None:
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}
    mixed_precision = trainer.args.bf16 or trainer.args.fp16
    if trainer.is_fsdp_enabled and len(dtypes) > 1 and not mixed_precision:
        raise UserError(
            "dtype: FSDP trains the weights of a layer in one dtype, and routers stay in float32: leave dtype away, or set "
            "bf16 true"
        )


def _check_report_to(args: TrainingArguments) -> None:
    try:
        for callback in get_reporting_integration_callbacks(args.report_to):
            callback()
    except (ValueError, RuntimeError, ImportError) as error:
        raise UserError(f"report_to: {error}") from error


def _check_vocabulary(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel | PeftModel) -> None:
    if len(tokenizer) > model.config.vocab_size:
        raise UserError(
            f"the tokenizer has {len(tokenizer)} tokens and the model {model.config.vocab_size}: match them"
        )


def _casts_once(trainer: Trainer, model: nn.Module) -> bool:
    """Whether the experts' copies under autocast can be shared by a whole step."""
    args = trainer.args
    splits = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled or is_split(model)
    return (args.bf16 or args.fp16) and args.device.type == "cuda" and not splits and not args.torch_compile


def _train(trainer: Trainer, model: nn.Module, resume: str | None) -> dict[str, float]:
    """Trains, and returns the metrics of that."""
    casting = CastOnceCallback()
    if _casts_once(trainer, model):
        trainer.add_callback(casting)
    try:
        return trainer.train(resume_from_checkpoint=resume).metrics
    finally:
        casting.close()


def _result(trainer: Trainer, trained: int, eval_loss: dict[str, float], max_length: int, metrics) -> FinetuneResult:
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry] or [math.nan]
    quarter = max(1, len(losses) // 4)
    return FinetuneResult(
        steps=trainer.state.global_step,
        trained_params=trained,
        first_loss=fmean(losses[:quarter]),
        last_loss=fmean(losses[-quarter:]),
        eval_loss=eval_loss,
        seconds=metrics["train_runtime"],
        tokens_per_second=metrics["train_samples_per_second"] * max_length,
    )


def finetune(
    model_args: ModelArguments,
    data_args: DataArguments,
    lora_args: LoraArguments,
    args: TrainingArguments,
    callbacks: Iterable[TrainerCallback] = (),
) -> FinetuneResult:
    """Trains, and saves the model with its tokenizer in `args.output_dir`; the same result for the same seed.

    A run that was cut short goes on from its last whole checkpoint as if it had not been: the same losses and weights, to
    the last bit where the device's kernels give the same result twice.

    Args:
        model_args: what to train.
        data_args: on what.
        lora_args: for `method="lora"`.
        args: how; `resume_from_checkpoint="true"` resumes from the last checkpoint.
        callbacks: more callbacks for the trainer.

    Raises:
        UserError: for an argument that cannot work, before anything is written.
        NonFiniteError: at the first loss or gradient that is not finite, a `UserError` too.
    """
    _check_processes(args, model_args)
    if args.gradient_checkpointing and args.ddp_find_unused_parameters is None:
        # as `Trainer` chooses for a model without an adapter: DDP cannot look for them in reentrant checkpointing
        args.ddp_find_unused_parameters = False
    resume = checkpoint_to_resume(args, model_args)
    _check_report_to(args)
    tokenizer = load_tokenizer(model_args.model_name_or_path)
    with args.main_process_first(desc="data"):
        train, held_out = load_and_pack(data_args, tokenizer, model_args.eval_fraction, args.data_seed or args.seed)
    set_seed(args.seed)
    model = _load_for_training(model_args, lora_args, bool(args.gradient_checkpointing), resume)
    _check_vocabulary(tokenizer, model)
    frozen = [FreezeExpertsCallback(model_args.frozen_experts())] if model_args.freeze_experts else []
    try:
        trainer = FinetuneTrainer(
            model=model,
            args=args,
            train_dataset=train,
            eval_dataset=held_out or None,
            processing_class=tokenizer,
            data_collator=default_data_collator,
            callbacks=[LogAtCheckpoints(), *callbacks, *frozen],
        )
    except ValueError as error:
        # arguments that do not go together; the message is transformers' own
        raise UserError(str(error)) from error
    _check_dtypes(trainer, model)
    merge = model_args.method == "lora" and lora_args.merge_lora
    if merge and (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled or is_split(model)):
        raise UserError(
            "merge_lora true cannot merge a model that is split over ranks: set merge_lora false, and merge the adapter "
            "into the whole model by PEFT's merge_and_unload"
        )
    if resume is None and args.should_save:
        discard_checkpoints(Path(args.output_dir))
    trained = sum(trained for trained, _ in trained_parameters(model).values())
    metrics = _train(trainer, model, resume)
    trainer.check_weights()
    eval_loss = {}
    for name, blocks in held_out.items():
        eval_loss[name] = trainer.evaluate(blocks, metric_key_prefix=f"eval_{name}")[f"eval_{name}_loss"]
    # `Trainer` turns it off for checkpointing, in the checkpoints that a run resumes from too
    model.config.use_cache = getattr(load_config(model_args.model_name_or_path), "use_cache", True)
    save_result(trainer, tokenizer, merge)
    return _result(trainer, trained, eval_loss, data_args.max_length, metrics)
