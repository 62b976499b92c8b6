# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module defines the arguments of `finetune`: the model, the weights to train, and the training."""

import json
import math
import re
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from peft import LoraConfig
from transformers import PreTrainedModel, TrainingArguments
from transformers.distributed import DistributedConfig

from ..lora import Experts4bitConfig, moe_lora_config
from ..utils.errors import UserError
from ..utils.loading import DtypeName
from .presets import is_preset


Method = Literal["full", "lora", "router", "attention"]
METHODS = get_args(Method)
# argument of TrainingArguments -> the smallest value allowed, and the smallest value that is too large
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
    "routing_steps": (0, math.inf),
    "label_smoothing_factor": (0, 1),
    "dataloader_num_workers": (0, 4096),
    "save_total_limit": (1, math.inf),
    "seed": (0, 2**32),
    "data_seed": (0, 2**32),
}
FILES_OR_JSON = ("deepspeed", "fsdp_config", "accelerator_config", "gradient_checkpointing_kwargs")


@dataclass
class ModelArguments:
    """The model to train, its weights to train, and how the model is split over processes."""

    model_name_or_path: str = field(
        metadata={
            "help": "folder or Hub name of a causal LM, sparse or dense; or a configuration file, such as "
            "configuration/models/moe_tiny.json, to train a new model"
        }
    )
    tokenizer_name: str | None = field(
        default=None, metadata={"help": "folder or Hub name of the tokenizer; the default is the model's"}
    )
    method: Method = field(default="full", metadata={"help": "weights to train"})
    freeze_experts: str | None = field(
        default=None,
        metadata={"help": "experts of feed-forward networks not to train, such as 0-7 or 0,2,5-6; needs method full"},
    )
    dtype: DtypeName | None = field(
        default=None,
        metadata={
            "help": "dtype of the weights; auto: as in the checkpoint; the default is auto for method lora and float32 otherwise"
        },
    )
    load_in_4bit: Literal["experts", "all"] | None = field(
        default=None,
        metadata={
            "help": "hold weights in 4 bits (QLoRA), quantized while they are read: those of the experts, or of all linear "
            "layers too; needs method lora, merge_lora false and the extra 4bit"
        },
    )
    eval_fraction: float = field(default=0.05, metadata={"help": "share of each domain held out for the eval loss"})
    fsdp_size: int = field(
        default=1, metadata={"help": "processes over which FSDP2 splits the weights; each has its own batch"}
    )
    tp_size: int = field(
        default=1, metadata={"help": "processes over which tensor parallelism splits layers; they share a batch"}
    )
    ep_size: int = field(
        default=1,
        metadata={"help": "processes among which experts are divided; some or all of fsdp_size times tp_size"},
    )
    overwrite: bool = field(
        default=False,
        metadata={
            "help": "write into the output_dir of an earlier run; its checkpoints are deleted, other files stay"
        },
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "run the Python code that the checkpoint contains"}
    )

    def __post_init__(self):
        if self.dtype is None:
            # a 16-bit weight would round most updates of an optimizer away
            self.dtype = "auto" if self.method == "lora" else "float32"
        if self.method not in METHODS:
            raise UserError(f"method is {self.method!r}: choose one of {', '.join(METHODS)}")
        if self.load_in_4bit is not None and self.method != "lora":
            raise UserError(f"load_in_4bit needs method lora: weights in 4 bits are not trained by {self.method}")
        if self.load_in_4bit is not None and self.distributed_config() is not None:
            raise UserError(
                "load_in_4bit with fsdp_size, tp_size or ep_size: weights in 4 bits cannot be split while they are loaded, "
                "leave the sizes out, and each process holds the model, as under DDP"
            )
        if self.freeze_experts is not None and self.method != "full":
            raise UserError(
                f"freeze_experts needs method full: method {self.method} does not train single experts, omit freeze_experts"
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
            raise UserError("tokenizer_name is missing: a configuration file has no tokenizer, so name one")
        if self.method != "full" or self.freeze_experts is not None:
            raise UserError("method must be full, without freeze_experts, for a new model, whose weights are random")
        if self.distributed_config() is not None:
            raise UserError(
                "fsdp_size, tp_size and ep_size split a model while it is loaded, and a new model is not loaded: save it "
                "first, or split it by accelerate launch"
            )

    def quantization_config(self) -> Experts4bitConfig | None:
        """Returns how transformers quantizes the model while loading it, or None to leave it as it is."""
        return Experts4bitConfig(linear_layers=self.load_in_4bit == "all") if self.load_in_4bit else None

    def distributed_config(self) -> DistributedConfig | None:
        """Returns how transformers splits the model while loading it, or None to load it whole.

        Raises:
            UserError: if the sizes do not fit each other; the message is transformers' own.
        """
        sizes = {"fsdp_size": self.fsdp_size, "tp_size": self.tp_size, "ep_size": self.ep_size}
        try:
            return DistributedConfig(**sizes) if max(sizes.values()) > 1 else None
        except (
            TypeError,
            ValueError,
        ) as error:  # older releases of transformers raise TypeError for a size that they do not know
            raise UserError(f"fsdp_size, tp_size, ep_size: {error}") from error

    def frozen_experts(self) -> list[int]:
        """Returns the ids of the experts to freeze.

        Raises:
            UserError: if `freeze_experts` is not a list of ids and ranges of ids.
        """
        ids = []
        for part in self.freeze_experts.split(",") if self.freeze_experts is not None else []:
            ends = re.fullmatch(r"(\d{1,5})(?:-(\d{1,5}))?", part.strip())
            new = range(int(ends[1]), int(ends[2] or ends[1]) + 1) if ends else range(0)
            if not new:
                raise UserError(
                    f"freeze_experts {self.freeze_experts!r} is not a list of experts: write 0-7 or 0,2,5-6"
                )
            ids += new
        return ids


@dataclass
class BalanceArguments:
    """How a model of transformers balances its experts; a model of this package reads its configuration instead."""

    router_aux_loss_coef: float | None = field(
        default=None,
        metadata={
            "help": "coefficient of the load-balancing loss of transformers' own MoE models; the default is that of the "
            "model's configuration, and 0 switches the loss off"
        },
    )
    router_aux_loss_scope: Literal["batch", "sequence"] = field(
        default="batch", metadata={"help": "tokens over which that loss measures balance"}
    )
    router_z_loss_coef: float = field(
        default=0.0, metadata={"help": "coefficient of the z-loss of transformers' own MoE models"}
    )
    router_bias_update_rate: float = field(
        default=0.0,
        metadata={
            "help": "step size of the selection biases of transformers' own MoE models, such as 0.001; 0: they stay"
        },
    )

    def given(self) -> list[str]:
        """Returns the names of the arguments that differ from their defaults."""
        return [entry.name for entry in fields(self) if getattr(self, entry.name) != entry.default]


@dataclass
class MetaArguments:
    """How `--method router` trains routers that adapt to a domain by a few tokens of it."""

    meta_support_tokens: int | None = field(
        default=None,
        metadata={
            "help": "method router: adapt the routers to the first tokens of each row, as many as this number, and train the "
            "weights from which they are adapted on the rest of the row; default: train the routers as they are"
        },
    )
    meta_learning_rate: float = field(default=1.0, metadata={"help": "size of a step of the adaptation"})
    meta_steps: int = field(default=1, metadata={"help": "number of steps of an adaptation"})

    def __post_init__(self):
        if self.meta_support_tokens is not None and self.meta_support_tokens < 2:
            raise UserError(f"meta_support_tokens is {self.meta_support_tokens}: it must be at least 2")
        if not self.meta_learning_rate > 0 or self.meta_steps < 1:
            raise UserError("meta_learning_rate and meta_steps must be positive")
        given = [entry.name for entry in fields(self)[1:] if getattr(self, entry.name) != entry.default]
        if self.meta_support_tokens is None and given:
            raise UserError(f"{given[0]} has no effect without meta_support_tokens: give it too")

    def used(self) -> dict[str, Any]:
        """Returns the settings of meta-training; none if the routers are trained as they are."""
        return {} if self.meta_support_tokens is None else asdict(self)


@dataclass
class LoraArguments:
    """The low-rank updates of `--method lora`."""

    lora_r: int = field(default=16, metadata={"help": "rank of the updates"})
    lora_rank_per: Literal["expert", "token"] = field(
        default="expert",
        metadata={"help": "expert: each expert's update has rank lora_r; token: the experts of a token share it"},
    )
    lora_alpha: int = field(default=32, metadata={"help": "updates are scaled by lora_alpha / lora_r"})
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj"],
        metadata={"help": "names of linear layers to update"},
    )
    lora_dropout: float = field(
        default=0.0, metadata={"help": "dropout on the input of each update, experts included"}
    )
    use_rslora: bool = field(default=False, metadata={"help": "scale updates by lora_alpha / sqrt(lora_r) instead"})
    lora_experts: bool = field(default=True, metadata={"help": "update the routed experts"})
    lora_shared: bool = field(default=False, metadata={"help": "update the shared experts"})
    lora_router: bool = field(default=True, metadata={"help": "train all weights of the routers, which are small"})
    merge_lora: bool = field(default=True, metadata={"help": "save the merged model instead of the adapter"})

    def __post_init__(self):
        if self.lora_r < 1:
            raise UserError(f"lora_r is {self.lora_r}: it must be at least 1")

    def config(self, model: PreTrainedModel) -> LoraConfig:
        """Returns PEFT's configuration for `model`, made by [`~modeling_moe.lora.moe_lora_config`]."""
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
    """transformers' [`~transformers.TrainingArguments`] with a log line after the first step, the routing in the
    log, and checked values."""

    logging_first_step: bool = field(default=True, metadata={"help": "log the first step's loss"})
    logging_steps: float = field(default=10, metadata={"help": "optimizer steps between two log lines"})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "log the mean loss instead of NaN"})
    routing_steps: int | None = field(
        default=None,
        metadata={
            "help": "optimizer steps between two logs of the routing (experts' load, MaxVio, entropies, router gradients); 0: "
            "none; by default with each log of the loss"
        },
    )

    def __post_init__(self):
        if self.output_dir is None:
            raise UserError("output_dir is missing: name the folder for the result and its checkpoints")
        self._check_ranges()
        if "activation_checkpointing" in (new := {f.name for f in fields(self)}):
            # transformers 5.24 warns of the recipes' names, and older releases know no others
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
                "bf16 true needs a GPU with bfloat16: add --use_cpu true to use bfloat16 on the CPU"
            ) from error
        if self.device.type == "cpu":
            # torch warns for each loader that memory is only pinned for an accelerator
            self.dataloader_pin_memory = False
        # without a name, a tracker would take the evaluation after training for another run
        self.run_name = self.run_name or self.output_dir

    def _check_ranges(self) -> None:
        for name, (least, below) in RANGES.items():
            value = getattr(self, name, None)
            if isinstance(value, int | float) and not least <= value < below:
                limit = "a finite number" if below == math.inf else f"below {below:g}"
                raise UserError(f"{name} is {value}: it must be at least {least:g} and {limit}")
        if self.label_names not in (None, ["labels"]):
            raise UserError(f"label_names is {self.label_names}: omit it, since the column is called labels")
        for name in FILES_OR_JSON:
            value = getattr(self, name, None)
            if not isinstance(value, str):
                continue
            if value.startswith("{"):
                try:
                    json.loads(value)
                except ValueError as error:
                    raise UserError(f"{name} is not JSON: {error}") from error
            elif not Path(value).is_file():
                raise UserError(f"{name} {value} does not exist: give the path of a JSON file, or JSON in braces")
