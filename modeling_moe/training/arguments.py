# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""What `scripts/finetune.py` is told: which model, what of it to train, and how."""

import re
from dataclasses import dataclass, field

from peft import LoraConfig
from torch import nn
from transformers import TrainingArguments
from transformers.distributed import DistributedConfig

from ..cli import UserError
from ..lora import moe_lora_config


METHODS = ("full", "lora", "router", "attention")


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
        except (TypeError, ValueError) as error:  # a TypeError where transformers is too old for one of them
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
