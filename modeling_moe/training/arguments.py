# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""What `scripts/finetune.py` is told: which model, what of it to train, and how."""

import json
import math
import re
from dataclasses import dataclass, field, fields
from pathlib import Path

from peft import LoraConfig
from torch import nn
from transformers import TrainingArguments
from transformers.distributed import DistributedConfig

from ..lora import moe_lora_config
from ..utils.errors import UserError
from .presets import is_preset


METHODS = ("full", "lora", "router", "attention")
# argument of transformers' -> the least value, and the first that is too large
RANGES = {
    "per_device_train_batch_size": (1, math.inf),
    "per_device_eval_batch_size": (1, math.inf),
    "eval_accumulation_steps": (1, math.inf),
    "gradient_accumulation_steps": (1, math.inf),
    "learning_rate": (0, math.inf),
    "weight_decay": (0, math.inf),
    "max_grad_norm": (0, math.inf),
    "adam_beta1": (0, 1),
    "adam_beta2": (0, 1),
    "adam_epsilon": (0, math.inf),
    "num_train_epochs": (0, math.inf),
    "warmup_steps": (0, math.inf),
    "max_steps": (-1, math.inf),
    "save_steps": (0, math.inf),
    "logging_steps": (0, math.inf),
    "eval_steps": (0, math.inf),
    "label_smoothing_factor": (0, 1),
    "dataloader_num_workers": (0, 4096),
    "save_total_limit": (1, math.inf),
    "seed": (0, 2**32),
    "data_seed": (0, 2**32),
}
FILES_OR_JSON = ("deepspeed", "fsdp_config", "accelerator_config", "gradient_checkpointing_kwargs")


@dataclass
class ModelArguments:
    """What to train."""

    model_name_or_path: str = field(
        metadata={
            "help": "folder or Hub name of a causal LM, sparse or dense; or a configuration file, such as "
            "configuration/models/moe_tiny.json, for a new model"
        }
    )
    tokenizer_name: str | None = field(
        default=None, metadata={"help": "folder or Hub name of the tokenizer; the model's if not given"}
    )
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
        default=False,
        metadata={"help": "write where an earlier run did; its checkpoints are deleted, other files stay"},
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "run Python code that the checkpoint brings"})

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
        self._check_new_model()
        if not 0 <= self.eval_fraction < 1:
            raise UserError(f"eval_fraction is {self.eval_fraction}: choose a number from 0 (none) to below 1")

    def _check_new_model(self):
        if not is_preset(self.model_name_or_path):
            return
        if self.tokenizer_name is None:
            raise UserError("tokenizer_name is missing: a configuration file alone has no tokenizer, so name one")
        if self.method != "full" or self.freeze_experts is not None:
            raise UserError("method must be full, without freeze_experts, for a new model: its weights are random")
        if self.distributed_config() is not None:
            raise UserError(
                "fsdp_size, tp_size and ep_size split a model while it is loaded, and a new one is made whole: save it first, "
                "or split it by accelerate launch"
            )

    def distributed_config(self) -> DistributedConfig | None:
        """How transformers splits the model when it loads it, None if it does not.

        Raises:
            UserError: if the sizes do not fit each other; the message is transformers' own.
        """
        sizes = {"fsdp_size": self.fsdp_size, "tp_size": self.tp_size, "ep_size": self.ep_size}
        try:
            return DistributedConfig(**sizes) if max(sizes.values()) > 1 else None
        except (TypeError, ValueError) as error:  # a TypeError where transformers is too old for one of them
            raise UserError(f"fsdp_size, tp_size, ep_size: {error}") from error

    def frozen_experts(self) -> list[int]:
        """Ids of the experts to freeze.

        Raises:
            UserError: if `freeze_experts` is no list of ids and ranges of them.
        """
        ids = []
        for part in self.freeze_experts.split(",") if self.freeze_experts is not None else []:
            ends = re.fullmatch(r"(\d{1,5})(?:-(\d{1,5}))?", part.strip())
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
        if self.output_dir is None:
            raise UserError("output_dir is missing: name the folder for the result and its checkpoints")
        self._check_ranges()
        if "activation_checkpointing" in (new := {f.name for f in fields(self)}):
            # from transformers 5.24 on the recipes' names warn, and before it there are no others
            for name in ("gradient_checkpointing", "gradient_checkpointing_kwargs"):
                if (to := name.replace("gradient", "activation")) in new and getattr(self, to) is None:
                    setattr(self, to, getattr(self, name))
                    setattr(self, name, None)
        try:
            super().__post_init__()
        except ValueError as error:
            if "bf16" not in str(error):
                raise
            raise UserError(
                "bf16 true asks for a GPU that has bfloat16: add --use_cpu true to have it on the CPU"
            ) from error
        if self.device.type == "cpu":
            # torch warns that it pins memory for an accelerator alone, once for each loader
            self.dataloader_pin_memory = False
        # a tracker takes the evaluation after training for another run, unless both have a name
        self.run_name = self.run_name or self.output_dir

    def _check_ranges(self) -> None:
        for name, (least, below) in RANGES.items():
            value = getattr(self, name, None)
            if isinstance(value, int | float) and not least <= value < below:
                limit = "a finite number" if below == math.inf else f"below {below:g}"
                raise UserError(f"{name} is {value}: it must be at least {least:g} and {limit}")
        if self.label_names not in (None, ["labels"]):
            raise UserError(f"label_names is {self.label_names}: leave it away, for the column is labels")
        for name in FILES_OR_JSON:
            value = getattr(self, name, None)
            if not isinstance(value, str):
                continue
            if value.startswith("{"):
                try:
                    json.loads(value)
                except ValueError as error:
                    raise UserError(f"{name} is no JSON: {error}") from error
            elif not Path(value).is_file():
                raise UserError(f"{name} {value} does not exist: give the path of a JSON file, or JSON in braces")
