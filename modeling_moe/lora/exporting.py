# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module writes a saved LoRA adapter in the form that a server loads, or merges it into the model that is served.

Servers want two-dimensional factors for each expert, under the names of the family's checkpoint, where PEFT saves the
factors of all experts of a layer as one tensor. They were read for this module: vLLM 0.32 (`lora/lora_model.py`,
`lora/lora_weights.py`), SGLang 0.5.23 (`srt/lora/lora.py`), llama.cpp (`convert_lora_to_gguf.py`).
"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from ..checkpoints import LazyTensor, Source, State, fingerprint, open_source, refuse_quantised, write_checkpoint
from ..checkpoints.damage import refuse_not_finite
from ..checkpoints.safetensors_format import make_header
from ..configuration_moe import MoEConfig
from ..conversion.tokenizer_files import keep_tokenizer
from ..utils.companions import copy_companions
from ..utils.errors import UserError
from ..utils.folder_checks import refuse_overlap
from ..utils.folders import ResultFolder, whole_folder
from ..utils.json_files import write_json
from ..utils.lineage import FINETUNING, lineage_of
from ..utils.loading import adapter_base, has_tokenizer, load_config
from ..utils.locations import local_folder
from ..utils.prediction_files import warn_of_left_out
from .export_check import Comparison, compare
from .factors import PREFIX, Factors, read_factors
from .merging import adapter_folder
from .served_names import STACKED, Update, Updates, on_disk, renamed


SERVERS = ("vllm", "sglang", "llama.cpp")
# linear layers for which all three servers have a place in an adapter
SERVED = {
    *("q_proj", "k_proj", "v_proj", "o_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa"),
    *("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"),
}
# servers fuse these layers, and fail on an adapter that has one of a group without the others
GROUPS = (
    {"q_proj", "k_proj", "v_proj"},
    {"q_a_proj", "kv_a_proj_with_mqa"},
    {"gate_proj", "up_proj", "down_proj"},
    {"w1", "w2", "w3"},
)
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
# the largest value of --max-lora-rank
VLLM_RANK = 512


@dataclass
class ExportAdapterArguments:
    """The arguments of `export_adapter`: the adapter, its base model, the server and the folder to write."""

    model_name_or_path: str = field(metadata={"help": "folder or Hub name of the adapter"})
    output_dir: str = field(metadata={"help": "folder to write; a failed run leaves no part of it"})
    server: str = field(default="vllm", metadata={"help": "server that loads the adapter", "choices": SERVERS})
    base_model: str | None = field(
        default=None,
        metadata={
            "help": "folder or Hub name of the model that the adapter was trained on; the default is the one that "
            "adapter_config.json names"
        },
    )
    served_model: str | None = field(
        default=None,
        metadata={"help": "folder of the base model as the server loads it, such as an export by moe convert"},
    )
    merged: bool = field(
        default=False, metadata={"help": "write the served model with the adapter merged, for any server"}
    )
    verify: bool = field(
        default=True,
        metadata={"help": "load both models in fp32 and compare the logits; false needs memory for no model"},
    )
    overwrite: bool = field(default=False, metadata={"help": "replace the result of an earlier run in output_dir"})
    trust_remote_code: bool = field(default=False, metadata={"help": "run Python code that the checkpoint brings"})


@dataclass(frozen=True)
class _Job:
    """What an export reads: folders or Hub names, the served model's configuration, updates and tensors on disk."""

    adapter: Path
    base: str
    served: str
    config: PreTrainedConfig
    updates: Updates
    source: Source

    @property
    def state(self) -> State:
        """The served model's tensors, unread."""
        return self.source.state


def _open(args: ExportAdapterArguments) -> _Job:
    """Reads names and shapes of the adapter, its base model and the served model."""
    folder = adapter_folder(args.model_name_or_path)
    base = local_folder(args.base_model) if args.base_model else adapter_base(folder)
    if base is None:  # `adapter_folder` has found an adapter_config.json
        raise UserError(f"{folder} names no base model: pass --base_model")
    served = local_folder(args.served_model) if args.served_model else base
    for name, source in (("model_name_or_path", folder), ("base_model", base), ("served_model", served)):
        refuse_overlap(args.output_dir, source, name)
    config = load_config(base, trust_remote_code=args.trust_remote_code)
    target = load_config(served, trust_remote_code=args.trust_remote_code)
    factors = read_factors(folder, config, args.trust_remote_code)
    _refuse_untrained(factors, folder)
    updates = on_disk(factors, config, args.trust_remote_code)
    if target.model_type != config.model_type:
        updates = renamed(updates, open_source(base).state, config, target.model_type)
    source = open_source(served)
    refuse_quantised(source.state)
    _refuse_other_model(updates, source.state, served)
    return _Job(folder, base, served, target, updates, source)


def _refuse_other_model(updates: Updates, state: State, served: str) -> None:
    """Refuses a served model that lacks a tensor which the adapter updates, or has the tensor in another shape."""
    remedy = "give the model that the adapter was trained on, or an export of that model"
    for name, update in updates.items():
        if name not in state:
            raise UserError(f"{served} has no tensor {name}, which the adapter updates: {remedy}")
        if state[name].shape != update.shape:
            raise UserError(
                f"{served} has {name} with the shape {state[name].shape}, and the adapter updates one with {update.shape}: {remedy}"
            )


def _refuse_untrained(factors: list[Factors], folder: Path) -> None:
    if not any(each.saved_b.read().any() for each in factors):
        raise UserError(
            f"each lora_B in {folder} is zero, so the adapter changes nothing: train it before it is exported"
        )


def _refuse_for_server(job: _Job, server: str) -> None:
    """Refuses what the server does not load from an adapter, or loads and leaves out.

    Raises:
        UserError: names the part, and a way that works.
    """
    remedy = "write a merged model with --merged true, or with moe merge_adapter"
    if job.config.model_type == MoEConfig.model_type:
        # vLLM runs the model, but finds no factors of experts behind the names of its backend for other packages' models
        raise UserError(
            f"{server} has no adapters on a model of the type {MoEConfig.model_type}: convert the base model with moe convert "
            "--target, and pass the result as --served_model; or write a merged model with --merged true"
        )
    for name, update in job.updates.items():
        layer = name.removesuffix(".weight").rpartition(".")[2]
        if update.stacked and not (server == "vllm" and name.endswith(STACKED)):
            raise UserError(f"{server} has no adapter on {name}, which holds all experts of a layer: {remedy}")
        if not update.stacked and layer not in SERVED:
            raise UserError(f"{server} has no adapter on {name}: {remedy}")
        if server == "vllm" and update.rank > VLLM_RANK:
            raise UserError(
                f"rank {update.rank} of {name} is above {VLLM_RANK}, the largest that vllm serves: {remedy}"
            )


def _padded(update: Update, rank: int, scaling: float) -> tuple[LazyTensor, LazyTensor]:
    """Returns the factors (rank, M) and (N, rank) that give the update with the factor `scaling`; added ranks are zero."""
    more, factor = rank - update.rank, update.scaling / scaling
    a = update.a.map(lambda tensor: torch.nn.functional.pad(tensor, (0, 0, 0, more)), shape=(rank, update.a.shape[1]))
    b = update.b.map(
        lambda tensor: torch.nn.functional.pad(tensor, (0, more)) * factor, shape=(update.b.shape[0], rank)
    )
    return a, b


def _stacked_pair(update: Update, key: str, rank: int, scaling: float) -> State:
    """Returns PEFT's factors of all experts of a layer, (E * R, M) and (N, R * E), which vLLM loads for these families."""
    if update.rank != rank:
        raise UserError(
            f"{update.source.parameter} has the rank {update.rank} and another layer {rank}, which vLLM cannot serve for experts "
            "that lie in one tensor: merge the adapter with moe merge_adapter"
        )
    factor = update.scaling / scaling
    return {
        f"{key}.lora_A.weight": update.source.saved_a,
        f"{key}.lora_B.weight": update.source.saved_b.map(lambda tensor: tensor * factor),
    }


def _zeros(*shape: int, dtype: torch.dtype) -> LazyTensor:
    return LazyTensor(shape, dtype, lambda index: torch.zeros(shape, dtype=dtype)[index])


def _missing(job: _Job) -> Iterator[str]:
    """Yields the served model's tensors that the adapter leaves alone, though it updates others of their group."""
    for name, update in job.updates.items():
        if update.stacked:
            prefix = name.rpartition(".")[0]
            yield from (f"{prefix}.{part}" for part in ("gate_up_proj", "down_proj"))
            continue
        prefix, _, layer = name.removesuffix(".weight").rpartition(".")
        for group in GROUPS:
            if layer in group:
                yield from (f"{prefix}.{other}.weight" for other in sorted(group))


def _tensors(job: _Job, rank: int, scaling: float) -> State:
    """Returns the tensors of the exported adapter, in the order of the served model."""
    wanted = set(job.updates) | set(_missing(job))
    state: State = {}
    for name in (name for name in job.state if name in wanted):
        update, key = job.updates.get(name), PREFIX + name.removesuffix(".weight")
        dtype = update.a.dtype if update else next(iter(job.updates.values())).a.dtype
        if name.endswith(STACKED):
            if update is None:
                raise UserError(f"vllm wants factors of {name} too: train both matrices, or pass --merged true")
            key = key.removesuffix(".down_proj").replace(".gate_up_proj", ".base_layer")
            state |= _stacked_pair(update, key, rank, scaling)
            continue
        rows, columns = job.state[name].shape
        pair = (_zeros(rank, columns, dtype=dtype), _zeros(rows, rank, dtype=dtype))
        if update is not None:
            pair = _padded(update, rank, scaling)
        state |= {f"{key}.lora_A.weight": pair[0], f"{key}.lora_B.weight": pair[1]}
    return state


def _write_tensors(file: Path, state: State) -> None:
    """Writes one safetensors file; memory holds the factors of about one layer."""
    with open(file, "wb") as stream:
        stream.write(make_header(state))
        for name, tensor in state.items():
            data = tensor.read().to(tensor.dtype).contiguous()
            refuse_not_finite(data, f"{name} of the result", "the adapter is damaged, train it again")
            stream.write(data.reshape(-1).view(torch.uint8).numpy().data)


def _write_adapter(job: _Job, folder: Path) -> None:
    """Writes adapter_config.json and adapter_model.safetensors, with one rank and one scaling for all layers."""
    updates = list(job.updates.values())
    rank, scaling = max(update.rank for update in updates), updates[0].scaling
    state = _tensors(job, rank, scaling)
    alpha = scaling * rank
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(job.served),
        "r": rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted({key.split(".lora_")[0].rpartition(".")[2] for key in state}),
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "modules_to_save": None,
    }
    write_json(folder / "adapter_config.json", config)
    _write_tensors(folder / "adapter_model.safetensors", state)


def _merged(update: Update, weight: LazyTensor) -> LazyTensor:
    """Returns the tensor plus its update in fp32."""

    def add(w: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        a, b = a.float(), b.float()
        if update.stacked:
            a = a.view(len(w), -1, a.shape[1])
            delta = (b.mT @ a).mT if update.source.transposed else b @ a
        else:
            delta = b @ a
        return w.float() + update.scaling * delta

    return LazyTensor.combine(add, weight, update.a, update.b, dtype=torch.float32)


def _bring_along(job: _Job, folder: Path, trust_remote_code: bool) -> None:
    """Copies the served model's configuration and code, the adapter's tokenizer if it has one, and its record."""
    source = job.source.folder
    for file in [source / "config.json", *source.glob("*.py"), *source.glob("generation_config.json")]:
        shutil.copyfile(file, folder / file.name)
    if (job.adapter / FINETUNING).is_file():
        shutil.copyfile(job.adapter / FINETUNING, folder / FINETUNING)
    if not has_tokenizer(str(job.adapter)):
        copy_companions(source, folder)
        return
    copy_companions(job.adapter, folder)
    older_readers = job.config.model_type != MoEConfig.model_type
    keep_tokenizer(job.adapter, folder, older_readers=older_readers, trust_remote_code=trust_remote_code)


def _write_merged(job: _Job, args: ExportAdapterArguments, recipe: dict[str, Any]) -> Comparison | None:
    """Writes the served model with the adapter's updates added, tensor by tensor."""
    exact = {
        name: _merged(job.updates[name], tensor) if name in job.updates else tensor
        for name, tensor in job.state.items()
    }
    state = {name: tensor.to(job.state[name].dtype) for name, tensor in exact.items()}
    comparison = None

    def check(folder: Path) -> dict[str, Any]:
        nonlocal comparison
        comparison = compare(job.adapter, job.base, job.served, folder, args.trust_remote_code, exact=exact)
        return comparison.figures()

    target = ResultFolder(args.output_dir, args.overwrite, [job.source.folder, job.adapter])
    recipe = recipe | {"served_files": fingerprint(job.source.folder, job.source.files)}
    write_checkpoint(
        target,
        state,
        recipe,
        lambda folder: _bring_along(job, folder, args.trust_remote_code),
        check=check if args.verify else None,
    )
    warn_of_left_out(job.source.folder, "The merged model")
    return comparison


def export_adapter(args: ExportAdapterArguments) -> Comparison | None:
    """Writes an adapter for a server, or the served model with the adapter merged.

    Args:
        args: the adapter, its base model, the server and the folder to write.

    Returns:
        The comparison of the logits, or None without `args.verify`.

    Raises:
        UserError: if the adapter, the base model or the served model cannot be read or do not belong together, the server
            cannot load a part of the adapter, the result changes the logits by another amount than the adapter does, or
            `output_dir` cannot be written.
    """
    if args.server not in SERVERS:
        raise UserError(f"server is {args.server!r}: choose {', '.join(SERVERS)}")
    job = _open(args)
    lineage = lineage_of(job.base) if Path(job.base).is_dir() else {"base_model": job.base}
    recipe = {
        "method": "export_adapter",
        "adapter": str(job.adapter),
        "adapter_files": fingerprint(job.adapter, ADAPTER_FILES, progress=False),
        "base_model": job.base,
        "served_model": job.served,
    }
    recipe = json.loads(
        json.dumps(recipe | {"merged": args.merged, "server": args.server, "lineage": lineage}, default=str)
    )
    if args.merged:
        return _write_merged(job, args, recipe)
    _refuse_for_server(job, args.server)
    with whole_folder(args.output_dir, recipe, args.overwrite) as partial:
        _write_adapter(job, partial)
        if not args.verify:
            return None
        return compare(job.adapter, job.base, job.served, partial, args.trust_remote_code)
