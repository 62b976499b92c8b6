# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This command turns dense checkpoints into a Mixture of Experts, which computes the dense function until it is trained.

    moe upcycle --model_name_or_path HuggingFaceTB/SmolLM2-135M --output_dir outputs/moe --num_experts 4
    moe upcycle --model_name_or_path ./dense --output_dir outputs/moe --num_experts 64 --granularity 8 \\
        --num_experts_per_tok 8
    moe upcycle --model_name_or_path ./math --sources ./code ./law --num_experts 3 --output_dir outputs/btx \\
        --router_init ridge --calibration_data math=math.txt code=code.txt law=law.txt
    moe upcycle --model_name_or_path ./dense --output_dir outputs/moe --attention_experts 8 --attention_experts_per_tok 2
    moe upcycle --model_name_or_path ./dense --output_dir outputs/moe --dry_run

Sources: Llama (SmolLM2, Yi, ...), Mistral, Qwen2, Qwen3, SmolLM3, OLMo2, OLMo3, Phi-3, Gemma 2 and 3, Granite, GPT-2 and
GPT-NeoX, as safetensors or GGUF (--gguf_file). An interrupted run goes on when the same command is given again.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..conversion import Verification
from ..upcycling import UpcyclingOptions, UpcyclingPlan, open_sources, plan_upcycling, upcycle_checkpoint
from ..utils.command_line import parse
from ..utils.errors import UserError
from ..utils.loading import DtypeName
from .plan import print_plan


@dataclass
class UpcycleArguments:
    """Which model to upcycle, and where to write the result."""

    model_name_or_path: str = field(metadata={"help": "folder or Hub name of the dense model"})
    output_dir: str = field(
        metadata={"help": "folder to write, whole or not at all; the same command continues an interrupted run"}
    )
    gguf_file: str | None = field(default=None, metadata={"help": "name of the GGUF file in the source's folder"})
    dtype: DtypeName = field(default="auto", metadata={"help": "dtype of the result; auto: the source's dtype"})
    overwrite: bool = field(default=False, metadata={"help": "replace what an earlier run wrote to output_dir"})
    max_shard_size: str = field(
        default="5GB", metadata={"help": "size of the largest file; an interrupted run repeats one file at most"}
    )
    dry_run: bool = field(default=False, metadata={"help": "print the plan, read no weights, write nothing"})
    verify: bool = field(default=False, metadata={"help": "run source and result on a text and compare the logits"})
    trust_remote_code: bool = field(default=False, metadata={"help": "run Python code that the checkpoint brings"})

    def __post_init__(self):
        if self.dry_run and self.verify:
            raise UserError("verify compares the result, and dry_run makes none: leave one of them out")


def upcycle(args: UpcycleArguments, options: UpcyclingOptions) -> tuple[UpcyclingPlan, Verification | None]:
    """Upcycles, or only plans with `args.dry_run`.

    Returns:
        The plan, and the comparison with the source if `args.verify` is set.

    Raises:
        UserError: see [`~modeling_moe.upcycling.upcycle_checkpoint`].
    """
    if args.dry_run:
        sources = open_sources(
            args.model_name_or_path, options, args.gguf_file, args.dtype, trust_remote_code=args.trust_remote_code
        )
        return plan_upcycling(sources, options), None
    return upcycle_checkpoint(
        args.model_name_or_path,
        args.output_dir,
        options,
        args.gguf_file,
        args.dtype,
        args.overwrite,
        args.verify,
        args.max_shard_size,
        trust_remote_code=args.trust_remote_code,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Upcycles or plans, and prints the plan."""
    args, options = parse([UpcycleArguments, UpcyclingOptions], __doc__, argv)
    plan, verification = upcycle(args, options)
    print_plan(plan, "plan, nothing written" if args.dry_run else args.output_dir, verification)
