# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module fine-tunes a causal LM with transformers' `Trainer`: all weights, one part of them, or LoRA by PEFT."""

import math
import os
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from peft import PeftModel
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

from ..data import DataArguments, load_and_pack
from ..lora import is_in_4bit
from ..utils.errors import UserError
from ..utils.loading import load_config, load_tokenizer, refuse_longer, refuse_misfit
from ..utils.prediction_files import leave_out_prediction
from .arguments import BalanceArguments, LoraArguments, MetaArguments, ModelArguments
from .callbacks import CastOnceCallback, MoECallback, is_enabled
from .freezing import FreezeExpertsCallback
from .interruption import SaveOnInterrupt
from .logs import LogAtCheckpoints, ScheduleCallback, detach, routing_callbacks, show_progress_line
from .long_runs import LongRunArguments, refuse_collapsed
from .meta_training import check_meta, without_support_labels
from .preparing import balanced, load_for_training, trained_parameters
from .presets import is_preset, preset_config
from .record import LossChange, logged_losses, write_record
from .resuming import (
    checkpoint_to_resume,
    discard_checkpoints,
    output_folder,
    save_result,
)
from .sharded import is_split
from .trainer import FinetuneTrainer


@dataclass(frozen=True)
class FinetuneResult:
    """The result of a training run.

    Attributes:
        steps: number of optimizer steps, including those before a resumption.
        processes: number of processes that trained.
        trained_params: number of parameters that were trained.
        first_loss: mean of the first quarter of the logged training losses in nats per token, with router losses; NaN
            if no loss was logged.
        last_loss: mean of the last quarter of the logged training losses.
        eval_loss: cross entropy in nats per token on the held-out text of each domain.
        seconds: wall time of the training.
        tokens_per_second: tokens of all processes divided by `seconds`.
    """

    steps: int
    processes: int
    trained_params: int
    first_loss: float
    last_loss: float
    eval_loss: dict[str, float]
    seconds: float
    tokens_per_second: float


def _check_processes(args: TrainingArguments, model_args: ModelArguments) -> None:
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched > 1 and args.world_size == 1:
        raise UserError(
            f"{launched} processes were started without a GPU, and each would train alone: add --use_cpu true"
        )
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
            "dtype: FSDP trains the weights of a layer in one dtype, and routers stay in float32: omit dtype, or set bf16 true"
        )


def _check_report_to(args: TrainingArguments) -> None:
    try:
        for callback in get_reporting_integration_callbacks(args.report_to):
            callback()
    except (ValueError, RuntimeError, ImportError) as error:
        raise UserError(f"report_to: {error}") from error


def _casts_once(trainer: Trainer, model: nn.Module) -> bool:
    """Returns whether all micro-batches of a step can share the experts' copies under autocast."""
    args = trainer.args
    splits = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled or is_split(model)
    return (args.bf16 or args.fp16) and args.device.type == "cuda" and not splits and not args.torch_compile


def _train(trainer: Trainer, model: nn.Module, resume: str | None) -> dict[str, float]:
    """Trains, and returns the trainer's metrics."""
    casting, stopping = CastOnceCallback(), SaveOnInterrupt()
    trainer.add_callback(stopping)
    if _casts_once(trainer, model):
        trainer.add_callback(casting)
    try:
        with stopping.listening():
            metrics = trainer.train(resume_from_checkpoint=resume).metrics
    except ImportError as error:
        raise UserError(f"an argument needs a package that is not installed: {error}") from error
    finally:
        casting.close()
        detach(trainer)
    if trainer.state.global_step == 0:
        raise UserError(
            "no step was trained, so nothing is saved: set num_train_epochs or max_steps above 0, and give more text than "
            "one batch if dataloader_drop_last is true"
        )
    return metrics


def _make_trainer(
    model: PreTrainedModel | PeftModel,
    args: TrainingArguments,
    train: Dataset,
    held_out: dict[str, Dataset],
    tokenizer: PreTrainedTokenizerBase,
    callbacks: list[TrainerCallback],
    run: LongRunArguments,
) -> FinetuneTrainer:
    metric, known = (args.metric_for_best_model or "loss"), {"loss", *(f"{name}_loss" for name in held_out)}
    if metric.removeprefix("eval_") not in known:
        raise UserError(f"metric_for_best_model {metric} is not computed: choose one of {', '.join(sorted(known))}")
    try:
        trainer = FinetuneTrainer(
            model=model,
            args=args,
            train_dataset=train,
            eval_dataset=held_out or None,
            processing_class=tokenizer,
            data_collator=default_data_collator,
            callbacks=[
                *([] if is_enabled() else [MoECallback()]),
                LogAtCheckpoints(),
                *callbacks,
                *run.callbacks(),
                *routing_callbacks(args, model, callbacks),
            ],
        )
    except (ValueError, ImportError) as error:
        # conflicting arguments or a missing package; the message is transformers' own
        raise UserError(str(error)) from error
    _check_dtypes(trainer, model)
    show_progress_line(trainer)
    trainer.long_run = run
    if run.router_average is not None:
        trainer.average_routers(run.router_average)
    if (samples := run.samples()) is not None:
        samples.add_to(trainer)
    return trainer


def _check_merge(trainer: Trainer, model: nn.Module, merge: bool) -> None:
    if merge and (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled or is_split(model)):
        raise UserError(
            "merge_lora true cannot merge a model that is split over processes: set merge_lora false, and merge the adapter "
            "by `moe merge_adapter` afterwards"
        )
    if merge and is_in_4bit(model):
        raise UserError(
            "merge_lora true cannot merge into experts in 4 bits: set merge_lora false, and merge the adapter into the 16-bit "
            "model by `moe merge_adapter` afterwards"
        )


def _save(
    trainer: FinetuneTrainer, tokenizer: PreTrainedTokenizerBase, merge: bool, model_args: ModelArguments
) -> None:
    # `Trainer` turns the cache off for checkpointing, and a resumed run has read the changed config.json
    source = model_args.model_name_or_path
    read_config = preset_config if is_preset(source) else load_config
    config: Any = read_config(source, trust_remote_code=model_args.trust_remote_code)
    model: Any = trainer.model
    model.config.use_cache = getattr(config, "use_cache", True)
    if not is_preset(source) and trainer.is_world_process_zero() and (merge or model_args.method != "lora"):
        leave_out_prediction(model, source, "The fine-tuned model")
    save_result(trainer, tokenizer, merge)


def _result(trainer: Trainer, trained: int, eval_loss: dict[str, float], max_length: int, metrics) -> FinetuneResult:
    loss = logged_losses(trainer.state.log_history).get("loss", LossChange(math.nan, math.nan))
    return FinetuneResult(
        steps=trainer.state.global_step,
        processes=trainer.args.world_size,
        trained_params=trained,
        first_loss=loss.first,
        last_loss=loss.last,
        eval_loss=eval_loss,
        seconds=metrics["train_runtime"],
        tokens_per_second=metrics["train_samples_per_second"] * max_length,
    )


def _load_data(
    model_args: ModelArguments, data_args: DataArguments, args: TrainingArguments, tokenizer: PreTrainedTokenizerBase
) -> tuple[Dataset, dict[str, Dataset]]:
    """Returns the blocks to train on, and the held-out blocks of each domain."""
    seed = args.data_seed or args.seed
    with args.main_process_first(desc="data"):
        return load_and_pack(data_args, tokenizer, model_args.eval_fraction, seed)


def _evaluate(trainer: FinetuneTrainer, held_out: dict[str, Dataset]) -> dict[str, float]:
    """Returns the cross entropy on the held-out blocks of each domain, in nats per token."""
    losses = {}
    for name, blocks in held_out.items():
        losses[name] = trainer.evaluate(blocks, metric_key_prefix=f"eval_{name}")[f"eval_{name}_loss"]
    return losses


def finetune(
    model_args: ModelArguments,
    data_args: DataArguments,
    lora_args: LoraArguments,
    args: TrainingArguments,
    callbacks: Iterable[TrainerCallback] = (),
    balance_args: BalanceArguments | None = None,
    run_args: LongRunArguments | None = None,
    meta_args: MetaArguments | None = None,
) -> FinetuneResult:
    """Trains a model, and saves it with its tokenizer in `args.output_dir`. Equal seeds give equal results.

    An interrupted run continues from its last complete checkpoint with the losses and weights of an uninterrupted run,
    bit for bit where the device's kernels are deterministic.

    Args:
        model_args: the model, and the weights to train.
        data_args: the data.
        lora_args: the adapter, for `method="lora"`.
        args: the training; `resume_from_checkpoint="true"` resumes from the last checkpoint.
        callbacks: further callbacks for the trainer.
        balance_args: how a model of transformers balances its experts; None for the defaults.
        run_args: learning rates by role, Muon, averaged routers, samples, stop on collapse; None for none of them.
        meta_args: how `method="router"` trains routers that adapt to a text; None to train them as they are.

    Raises:
        UserError: if an argument cannot work, before anything is written.
        NonFiniteError: at the first loss or gradient that is not finite; a subclass of UserError.
        CollapseError: when `run_args` ends a training whose routing has collapsed; a subclass of UserError.
        Interrupted: after Ctrl-C or SIGTERM in training, when the step is complete and a checkpoint is saved.
    """
    _check_processes(args, model_args)
    meta = check_meta(meta_args or MetaArguments(), model_args, args, data_args.max_length)
    if args.gradient_checkpointing and args.ddp_find_unused_parameters is None:
        # `Trainer` chooses this without an adapter: DDP cannot find unused parameters under reentrant checkpointing
        args.ddp_find_unused_parameters = False
    resume = checkpoint_to_resume(args, model_args)
    _check_report_to(args)
    trust = model_args.trust_remote_code
    tokenizer = load_tokenizer(model_args.tokenizer_name or model_args.model_name_or_path, trust_remote_code=trust)
    train, held_out = _load_data(model_args, data_args, args, tokenizer)
    if meta is not None and meta.meta_support_tokens is not None:
        train = without_support_labels(train, meta.meta_support_tokens)
    set_seed(args.seed)
    model = load_for_training(model_args, lora_args, bool(args.gradient_checkpointing), resume, tokenizer)
    refuse_misfit(tokenizer, model)
    refuse_longer(model, data_args.max_length, f"max_length is {data_args.max_length}")
    freezing = [FreezeExpertsCallback(model_args.frozen_experts())] if model_args.freeze_experts else []
    schedule = [ScheduleCallback(resume)] if resume else []
    merge = model_args.method == "lora" and lora_args.merge_lora
    balancing = balanced(model, balance_args or BalanceArguments())
    run = run_args or LongRunArguments()
    trainer = _make_trainer(model, args, train, held_out, tokenizer, [*callbacks, *freezing, *schedule], run)
    trainer.meta = meta
    _check_merge(trainer, model, merge)
    if resume is None and args.should_save:
        discard_checkpoints(output_folder(args))
    parts = trained_parameters(model).values()
    trained, total = sum(trained for trained, _ in parts), sum(total for _, total in parts)
    with balancing or nullcontext():
        metrics = _train(trainer, model, resume)
    refuse_collapsed(trainer)
    trainer.check_weights()
    eval_loss = _evaluate(trainer, held_out)
    with trainer.averaged():
        _save(trainer, tokenizer, merge, model_args)
    if args.should_save:
        tokens = round((trainer.state.epoch or 0) * len(train)) * data_args.max_length
        numbers: dict[str, Any] = {"tokens": tokens, "trained_parameters": trained, "parameters": total}
        if balancing is not None and (used := balancing.settings.used()):
            numbers["balance"] = used
        if used := run.used():
            numbers["long_run"] = used
        if meta is not None:
            numbers["meta_training"] = meta.used()
        write_record(output_folder(args), model_args, data_args, lora_args, args, trainer.state, numbers, eval_loss)
    return _result(trainer, trained, eval_loss, data_args.max_length, metrics)
