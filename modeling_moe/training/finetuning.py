# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""Fine-tuning by transformers' `Trainer`: all weights, some of them, or LoRA by PEFT."""

import json
import math
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

from peft import LoraConfig, PeftModel, get_peft_model
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
from transformers.distributed import DistributedConfig
from transformers.integrations import get_reporting_integration_callbacks

from ..cli import UserError
from ..files import load_source, load_tokenizer
from ..lora import moe_lora_config
from ..lora.sharding import full_shape
from ..routing import Router
from .data import DataArguments, load_and_pack
from .freezing import FreezeExpertsCallback
from .nan_stop import NanStopMixin
from .sharded import ShardedResumeMixin, is_split


# part of a model -> names of its parameters
PARTS = {
    "router": re.compile(r"\.(gate|router)\."),
    "attention": re.compile(r"\.(self_attn|self_attention|attention|attn)\."),
    "experts": re.compile(r"\.experts\."),
}
METHODS = ("full", "lora", "router", "attention")
STATE_FILE = "trainer_state.json"
REPLACED = ("*.safetensors", "*.safetensors.index.json", "config.json", "adapter_config.json")


@dataclass
class ModelArguments:
    """What to train."""

    model_name_or_path: str = field(metadata={"help": "folder or Hub name of a causal LM, sparse or dense"})
    method: str = field(default="full", metadata={"help": f"what to train: {', '.join(METHODS)}"})
    freeze_experts: str | None = field(
        default=None, metadata={"help": "experts to leave as they are, such as 0-7 or 0,2,5-6; with method full"}
    )
    dtype: str | None = field(
        default=None,
        metadata={"help": "float32, bfloat16, float16 or auto (the checkpoint's); auto for lora, else float32"},
    )
    eval_fraction: float = field(default=0.05, metadata={"help": "part of each domain held out for the eval loss"})
    fsdp_size: int = field(default=1, metadata={"help": "processes that weights are split over, each with its batch"})
    tp_size: int = field(default=1, metadata={"help": "processes that layers are split over, with one batch"})
    ep_size: int = field(default=1, metadata={"help": "processes that experts are divided among; of the above"})
    overwrite: bool = field(
        default=False, metadata={"help": "write into an output_dir that is not empty; its checkpoints are deleted"}
    )

    def __post_init__(self):
        if self.dtype is None:
            # an update is often smaller than the last bit of a 16-bit weight
            self.dtype = "auto" if self.method == "lora" else "float32"
        if self.method not in METHODS:
            raise UserError(f"method is {self.method!r}: choose one of {', '.join(METHODS)}")
        if self.freeze_experts is not None and self.method != "full":
            raise UserError(
                f"freeze_experts goes with method full: {self.method} trains no single expert, leave it away"
            )
        self.frozen_experts()
        self.distributed_config()
        if not 0 <= self.eval_fraction < 1:
            raise UserError(f"eval_fraction is {self.eval_fraction}: choose a number from 0 (none) to below 1")

    def distributed_config(self) -> DistributedConfig | None:
        """How transformers splits the model when it loads it, None if it does not.

        Raises:
            UserError: if the sizes do not fit each other; the message is transformers' own.
        """
        sizes = {"fsdp_size": self.fsdp_size, "tp_size": self.tp_size, "ep_size": self.ep_size}
        try:
            return DistributedConfig(**sizes) if max(sizes.values()) > 1 else None
        except ValueError as error:
            raise UserError(f"fsdp_size, tp_size, ep_size: {error}") from error

    def frozen_experts(self) -> list[int]:
        """Ids of the experts to freeze.

        Raises:
            UserError: if `freeze_experts` is no list of ids and ranges of them.
        """
        ids = []
        for part in self.freeze_experts.split(",") if self.freeze_experts is not None else []:
            ends = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
            new = range(int(ends[1]), int(ends[2] or ends[1]) + 1) if ends else range(0)
            if not new:
                raise UserError(f"freeze_experts {self.freeze_experts!r} is no list of experts: write 0-7 or 0,2,5-6")
            ids += new
        return ids


@dataclass
class LoraArguments:
    """Which weights get a low-rank update, for `--method lora`."""

    lora_r: int = field(default=16, metadata={"help": "rank"})
    lora_rank_per: str = field(
        default="expert", metadata={"help": "expert: each has that rank; token: a token's experts have it together"}
    )
    lora_alpha: int = field(default=32, metadata={"help": "the update is scaled by lora_alpha / lora_r"})
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj"], metadata={"help": "linear layers"}
    )
    lora_dropout: float = field(default=0.0, metadata={"help": "on the input of each update, the experts' included"})
    use_rslora: bool = field(default=False, metadata={"help": "scale by lora_alpha / sqrt(lora_r) instead"})
    lora_experts: bool = field(default=True, metadata={"help": "update the routed experts"})
    lora_shared: bool = field(default=False, metadata={"help": "update the shared experts"})
    lora_router: bool = field(default=True, metadata={"help": "train the routers, in full: they are small"})
    merge_lora: bool = field(default=True, metadata={"help": "save the merged model rather than the adapter"})

    def __post_init__(self):
        if self.lora_r < 1:
            raise UserError(f"lora_r is {self.lora_r}: it must be at least 1")

    def config(self, model: nn.Module) -> LoraConfig:
        """PEFT's configuration for `model`: [`~modeling_moe.lora.moe_lora_config`]."""
        targets = tuple(f".{target}" for target in self.lora_target_modules)
        if targets and not any(name.endswith(targets) for name, _ in model.named_modules()):
            names = " ".join(self.lora_target_modules)
            raise UserError(f"lora_target_modules {names} match no layer: name linear layers")
        return moe_lora_config(
            model,
            r=self.lora_r,
            experts=self.lora_experts,
            router=self.lora_router,
            attention=self.lora_target_modules,
            shared=self.lora_shared,
            rank_per=self.lora_rank_per,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            use_rslora=self.use_rslora,
        )


@dataclass
class FinetuneArguments(TrainingArguments):
    """transformers' [`~transformers.TrainingArguments`] that log early."""

    logging_first_step: bool = field(default=True, metadata={"help": "log the first step's loss"})
    logging_steps: float = field(default=10, metadata={"help": "steps between two log lines"})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "log the mean loss in place of NaN"})

    def __post_init__(self):
        super().__post_init__()
        # a tracker takes the evaluation after training for another run, unless both have a name
        self.run_name = self.run_name or self.output_dir


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


def _is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end: the trainer's state comes last."""
    try:
        return isinstance(json.loads((checkpoint / STATE_FILE).read_text()), dict)
    except (OSError, ValueError):
        return False


def _last_checkpoint(folder: Path) -> str | None:
    """The checkpoint that was finished last, not one in whose writing a run was killed."""
    whole = [checkpoint for checkpoint in folder.glob("checkpoint-*") if _is_whole(checkpoint)]
    return str(max(whole, key=lambda checkpoint: (checkpoint / STATE_FILE).stat().st_mtime_ns)) if whole else None


def _check_output_dir(args: TrainingArguments, model_args: ModelArguments) -> str | None:
    """Checkpoint to resume from, if any."""
    folder = Path(args.output_dir)
    resume = args.resume_from_checkpoint
    if resume is not None and resume.lower() == "true":
        resume = _last_checkpoint(folder)
        if resume is None:
            raise UserError(
                f"resume_from_checkpoint: {folder} holds no checkpoint that is whole, pass --overwrite instead to start anew"
            )
    if resume is not None and not _is_whole(Path(resume)):
        raise UserError(f"resume_from_checkpoint {resume} is no whole checkpoint: name one, or true for the last one")
    occupied = folder.is_file() or (folder.is_dir() and any(folder.iterdir()))
    if occupied and resume is None and not model_args.overwrite:
        raise UserError(
            f"output_dir {folder} is not empty: choose another, or pass --overwrite or --resume_from_checkpoint true"
        )
    source = Path(model_args.model_name_or_path).resolve()
    if resume is None and source in [checkpoint.resolve() for checkpoint in folder.glob("checkpoint-*")]:
        raise UserError(f"model_name_or_path {source} is a checkpoint in output_dir, which overwrite deletes: move it")
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


class _WholeCheckpoints(Trainer):
    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the model; a checkpoint that it is part of is not whole until its state is written."""
        if _internal_call and output_dir is not None and self.args.should_save:
            (Path(output_dir) / STATE_FILE).unlink(missing_ok=True)
        super().save_model(output_dir, _internal_call)


class FinetuneTrainer(ShardedResumeMixin, NanStopMixin, _WholeCheckpoints):
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
    adapted = get_peft_model(model, args.config(model))
    for module in adapted.modules():
        if isinstance(module, Router):
            module.float()  # PEFT does so for its own weights only
    return adapted


def _load_for_training(
    model_args: ModelArguments, lora_args: LoraArguments, checkpointing: bool, resume: str | None
) -> PreTrainedModel | PeftModel:
    source = model_args.model_name_or_path
    if resume is not None and (Path(resume) / "config.json").is_file():
        # `Trainer` looks for fused experts, and transformers' own models have one tensor for each in the checkpoint
        source = resume
    model = load_source(source, dtype=model_args.dtype or "auto", distributed_config=model_args.distributed_config())
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


def _discard_checkpoints(output_dir: Path) -> None:
    """Deletes those of another run, for one that resumes here must not find them."""
    for checkpoint in output_dir.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)


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
    resume = _check_output_dir(args, model_args)
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
    merge = model_args.method == "lora" and lora_args.merge_lora
    if merge and (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled or is_split(model)):
        raise UserError("merge_lora true cannot merge a model that is split over ranks: set merge_lora false")
    if resume is None and args.should_save:
        _discard_checkpoints(Path(args.output_dir))
    trained = sum(trained for trained, _ in trained_parameters(model).values())
    metrics = trainer.train(resume_from_checkpoint=resume).metrics
    trainer.check_weights()
    eval_loss = {}
    for name, blocks in held_out.items():
        eval_loss[name] = trainer.evaluate(blocks, metric_key_prefix=f"eval_{name}")[f"eval_{name}_loss"]
    _save(trainer, tokenizer, merge)
    return _result(trainer, trained, eval_loss, data_args.max_length, metrics)
