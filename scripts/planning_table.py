#!/usr/bin/env python
"""Compare plans with runs on this machine's CPU, and write the table of docs/planning.md.

    python scripts/planning_table.py
    python scripts/planning_table.py --cases moe_full_none olmoe_decode --output table.md

Each run has processes and one thread of its own. Memory is the largest resident size minus that before the model was made,
with an allocator that returns freed blocks at once. Time is processor time, the median of three steps between probes of the
machine.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from peft import get_peft_model
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    LlamaConfig,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedConfig,
    Qwen3MoeConfig,
)

from modeling_moe import MoEConfig
from modeling_moe.lora import moe_lora_config
from modeling_moe.monitoring import sparse_layers
from modeling_moe.planning import METHODS, Device, Method, Recompute, Request, make_plan, measure_device
from modeling_moe.planning.probe import clock_of
from modeling_moe.utils.command_line import run


SHAPE: dict[str, Any] = {
    "vocab_size": 8192,
    "hidden_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
}
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 768}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SHAPE, intermediate_size=3072),
    "moe": MoEConfig(**SHAPE, **EXPERTS, intermediate_size=2048, num_experts=8),
    "mixtral": MixtralConfig(**SHAPE, intermediate_size=1024, num_local_experts=8, num_experts_per_tok=2),
    "qwen3_moe": Qwen3MoeConfig(**SHAPE, **EXPERTS, intermediate_size=2048, num_experts=16),
    "olmoe": OlmoeConfig(**SHAPE, intermediate_size=384, num_experts=32, num_experts_per_tok=4, eos_token_id=1),
    "deepseek_v3": DeepseekV3Config(
        **SHAPE | {"num_key_value_heads": 12},
        **EXPERTS,
        intermediate_size=2048,
        n_routed_experts=16,
        n_group=4,
        topk_group=2,
        first_k_dense_replace=1,
        q_lora_rank=384,
        kv_lora_rank=256,
        qk_nope_head_dim=64,
        qk_rope_head_dim=32,
        v_head_dim=64,
    ),
}


class Case(NamedTuple):
    """A run to compare with its plan.

    Attributes:
        family: a key of `CONFIGS`.
        mode: what trains (full, lora, router), or prefill or decode.
        batch_size: number of sequences.
        length: tokens of each; of a prompt for decode.
        recompute: what backward computes again.
        dtype: dtype of the weights.
    """

    family: str
    mode: Method | Literal["prefill", "decode"]
    batch_size: int
    length: int
    recompute: Recompute = "none"
    dtype: str = "float32"

    @property
    def name(self) -> str:
        """Name of the case for `--cases`."""
        return "_".join([self.family, self.mode, *([self.recompute] if self.trains else [])])

    @property
    def trains(self) -> bool:
        """Whether the run is a training step."""
        return self.mode in ("full", "lora", "router")


CASES = {
    case.name: case
    for case in (
        Case("llama", "full", 2, 128),
        Case("llama", "full", 8, 128, "layers"),
        Case("llama", "prefill", 4, 256),
        Case("llama", "decode", 1, 512),
        Case("moe", "full", 2, 128),
        Case("moe", "full", 8, 128, "experts"),
        Case("moe", "lora", 4, 128),
        Case("moe", "prefill", 4, 256),
        Case("mixtral", "full", 1, 256),
        Case("mixtral", "router", 8, 128),
        Case("qwen3_moe", "lora", 4, 128, "layers"),
        Case("qwen3_moe", "decode", 1, 512),
        Case("olmoe", "lora", 2, 256),
        Case("olmoe", "decode", 8, 128, dtype="bfloat16"),
        Case("deepseek_v3", "router", 2, 256),
        Case("deepseek_v3", "prefill", 2, 256),
    )
}


def resident() -> int:
    """Returns the resident bytes of this process now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak() -> int:
    """Returns the largest number of resident bytes that this process had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def step_of(case: Case, config: PreTrainedConfig, batch_size: int, length: int) -> Any:
    """Makes a model and returns a function that runs one step of the case."""
    torch.manual_seed(0)
    config.get_text_config().experts_recompute = case.recompute == "experts"
    model: Any = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, case.dtype))
    if case.family != "llama":
        model.set_experts_implementation("moe")
    ids = torch.randint(0, config.vocab_size, (batch_size, length))
    if not case.trains:
        return generation_step(case, model.eval(), ids)
    if case.recompute == "layers":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if case.mode == "router":
        model.requires_grad_(False)
        for layer in sparse_layers(model):
            assert layer.router is not None
            layer.router.requires_grad_()
    if case.mode == "lora":
        model = get_peft_model(model, moe_lora_config(model))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    model.train()

    def step() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def generation_step(case: Case, model: Any, ids: torch.Tensor) -> Any:
    """Returns a function that runs the prompt's pass, or the pass of one further token each."""

    @torch.no_grad()
    def prefill() -> Any:
        return model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values

    if case.mode == "prefill":
        return prefill
    cache = prefill()

    @torch.no_grad()
    def decode() -> None:
        model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True, logits_to_keep=1)

    return decode


def warm_up(case: Case) -> None:
    """Runs a tiny model of the case's family, so that libraries are loaded before memory is measured."""
    config = CONFIGS[case.family]
    fields = {"hidden_size": 48, "num_hidden_layers": 2, "vocab_size": 64, "intermediate_size": 32}
    fields |= {"layer_types": None, "mlp_layer_types": None} if case.family == "moe" else {}
    step_of(case, type(config).from_dict(config.to_dict() | fields), 1, 8)()


def measure_memory(case: Case) -> dict[str, Any]:
    """Runs two steps of a case in this process, and returns the bytes that they added."""
    torch.set_num_threads(1)
    warm_up(case)
    before = resident()
    step = step_of(case, CONFIGS[case.family], case.batch_size, case.length)
    for _ in range(2):  # the optimizer's state exists from the second step on
        step()
    return {"memory": peak() - before}


def measure_time(case: Case) -> dict[str, Any]:
    """Runs three steps of a case between four probes in this process, and returns seconds and the probes' figures."""
    found = measure_memory(case)
    step = step_of(case, CONFIGS[case.family], case.batch_size, case.length)
    step()
    dtype, cpu = getattr(torch, case.dtype), torch.device("cpu")
    clock, seconds, probes = clock_of(cpu), [], [measure_device([dtype], cpu)]
    for _ in range(3):
        start = clock()
        for _ in range(repeats := 8 if case.mode == "decode" else 1):
            step()
        seconds.append((clock() - start) / repeats)
        probes.append(measure_device([dtype], cpu))
    return found | {
        "seconds": statistics.median(seconds),
        "bandwidth": statistics.median(probe.bandwidth for probe in probes),
        "flops": statistics.median(probe.flops[dtype] for probe in probes),
        "operator": statistics.median(probe.operator_seconds for probe in probes),
    }


MEASURES = {"memory": measure_memory, "time": measure_time}
# glibc gives freed blocks back to the system, so that the resident size shows what is in use
RETURNED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


class Row(NamedTuple):
    """A case, measured and planned: bytes and seconds.

    Attributes:
        case: the case.
        memory: bytes in use at the worst moment.
        held: bytes that the process holds with glibc's defaults, which keep freed blocks.
        planned_memory: bytes that the plan gives.
        seconds: time of a step.
        planned_seconds: time that the plan gives.
    """

    case: Case
    memory: int
    held: int
    planned_memory: int
    seconds: float
    planned_seconds: float

    @property
    def memory_residual(self) -> float:
        """Planned over measured memory, minus 1."""
        return self.planned_memory / self.memory - 1

    @property
    def time_ratio(self) -> float:
        """The larger of planned and measured time over the smaller."""
        return max(self.planned_seconds, self.seconds) / min(self.planned_seconds, self.seconds)


def run_apart(case: Case, what: str) -> dict[str, Any]:
    """Runs a measurement in a process of its own.

    Raises:
        RuntimeError: if the process fails, with the end of what it wrote.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment |= RETURNED if what == "memory" else {}
    command = [sys.executable, __file__, "--measure", what, "--cases", case.name]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{case.name} failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(case: Case) -> Row:
    """Measures a case, and plans it with the figures that the probes gave beside it."""
    used, found = run_apart(case, "memory"), run_apart(case, "time")
    dtype = getattr(torch, case.dtype)
    device = Device(
        name="this machine",
        memory=1e15,
        bandwidth=found["bandwidth"],
        flops={dtype: found["flops"]},
        link_bandwidth=1e9,
        link_latency=1e-5,
        operator_seconds=found["operator"],
        assumed=(),
        source="measured",
    )
    request = Request(
        device=device,
        dtype=dtype,
        train_dtype=dtype,
        batch_size=case.batch_size,
        sequence_length=case.length,
        train=[method for method in METHODS if method == case.mode],
        recompute=[case.recompute],
        limits=False,
    )
    plan = make_plan(CONFIGS[case.family], request)
    if case.trains:
        memory, seconds = plan.training[0].memory.total, plan.training[0].time.seconds
    else:
        assert plan.inference is not None
        memory, seconds = plan.inference.memory.total, getattr(plan.inference, case.mode).seconds
    return Row(case, used["memory"], found["memory"], memory, found["seconds"], seconds)


def markdown(rows: list[Row]) -> str:
    """Returns the table of the comparison."""
    lines = [
        "| model | run | tokens | recompute | memory, MB | planned | residual | held by glibc | time, ms | planned | ratio |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        case = row.case
        cells = [
            case.family,
            f"{case.mode}, {case.dtype}",
            f"{case.batch_size} x {case.length}",
            case.recompute if case.trains else "-",
            f"{row.memory / 1e6:,.0f}",
            f"{row.planned_memory / 1e6:,.0f}",
            f"{row.memory_residual:+.1%}",
            f"{row.held / 1e6:,.0f}",
            f"{row.seconds * 1e3:,.0f}",
            f"{row.planned_seconds * 1e3:,.0f}",
            f"{row.planned_seconds / row.seconds:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measures, compares, and writes the table."""
    parser = argparse.ArgumentParser(
        "planning_table.py", None, __doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="*", choices=CASES, default=list(CASES), help="runs to compare")
    parser.add_argument("--measure", choices=MEASURES, help="run the first case in this process and print its numbers")
    parser.add_argument("--output", type=Path, help="file for the table; without it the table is printed alone")
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(MEASURES[arguments.measure](CASES[arguments.cases[0]])))
        return
    rows = []
    for name in arguments.cases:
        rows.append(compare(CASES[name]))
        print(markdown(rows[-1:]).splitlines()[-1], file=sys.stderr)
    table = markdown(rows)
    print(table, end="")
    if arguments.output:
        arguments.output.write_text(table)


if __name__ == "__main__":
    run(main)
