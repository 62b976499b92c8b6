# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module checks the files that a run resumes from, apart from the weights: undamaged, and of this optimizer."""

import json
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer
from transformers.trainer_callback import TrainerState
from transformers.trainer_pt_utils import safe_globals

from ..utils.errors import UserError


STATE_FILE = "trainer_state.json"
OPTIMIZER_FILE, SCHEDULER_FILE, SCALER_FILE = "optimizer.pt", "scheduler.pt", "scaler.pt"
RNG_ENTRIES = {"python", "numpy", "cpu"}
# entries of an optimizer's state that have the shape of the parameter
SHAPED = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg", "exp_inf", "sum"}
REMEDY = "resume from another checkpoint, or give this one as model_name_or_path to go on with a new optimizer"


def read_trainer_state(checkpoint: str | Path) -> TrainerState:
    """Reads `trainer_state.json` of a checkpoint.

    Raises:
        UserError: if it is missing or damaged.
    """
    file = Path(checkpoint) / STATE_FILE
    try:
        state = TrainerState.load_from_json(str(file))
        numbers = [state.global_step, state.max_steps, state.num_train_epochs, state.train_batch_size]
        if not all(isinstance(number, int) and number >= 0 for number in numbers) or state.epoch is None:
            raise ValueError("step, epoch and batch size must be numbers")
    except (OSError, ValueError, TypeError, AttributeError, RecursionError, json.JSONDecodeError) as error:
        raise UserError(f"{file} is damaged ({_short(error)}): resume from another checkpoint") from error
    return state


def read_tensors(file: Path) -> Any:
    """Reads a file of `torch.save` onto the CPU without running code in it.

    Raises:
        UserError: if the file is missing or damaged, or holds objects other than tensors and numbers.
    """
    try:
        with safe_globals():
            return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError as error:
        raise UserError(f"{file} is missing: {REMEDY}") from error
    except Exception as error:
        # zip, pickle and torch have no common class of errors
        raise UserError(f"{file} is damaged ({_short(error)}): {REMEDY}") from error


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split()).partition(". ")[0] or type(error).__name__
    return text if len(text) <= 120 else f"{text[:120]} ..."


def check_resume_states(checkpoint: str | Path, optimizer: Optimizer, scheduler: Any, process: int | None) -> None:
    """Refuses states that do not belong to this run, before torch loads them.

    Args:
        checkpoint: folder with `optimizer.pt`, `scheduler.pt` and the states of the random number generators.
        optimizer: the optimizer of this run. Torch would load a state of another shape and read past its end.
        scheduler: the learning-rate scheduler of this run.
        process: number of this process; None for a single process.

    Raises:
        UserError: if a state does not fit; the message names the file and the remedy.
    """
    folder = Path(checkpoint)
    file = folder / OPTIMIZER_FILE
    if problem := _misfit(read_tensors(file), optimizer):
        raise UserError(
            f"{file} is not of this run's optimizer ({problem}): give the flags of the first run, or {REMEDY}"
        )
    file, found = folder / SCHEDULER_FILE, read_tensors(folder / SCHEDULER_FILE)
    known = set(scheduler.state_dict())
    if not isinstance(found, dict) or (set(found) - known and known - set(found)) or "last_epoch" not in found:
        raise UserError(f"{file} is not of this run's lr_scheduler_type: give that of the first run, or {REMEDY}")
    file = folder / ("rng_state.pth" if process is None else f"rng_state_{process}.pth")
    if process is not None and not file.is_file():
        return  # transformers allows more processes than before
    found = read_tensors(file)
    if not isinstance(found, dict) or not found.keys() >= RNG_ENTRIES or not _is_rng(found["cpu"]):
        raise UserError(f"{file} holds no states of random number generators: {REMEDY}")


def _is_rng(state: Any) -> bool:
    now = torch.get_rng_state()
    return isinstance(state, torch.Tensor) and state.dtype == now.dtype and state.shape == now.shape


def _misfit(found: Any, optimizer: Optimizer) -> str | None:
    """Returns why a saved state does not fit `optimizer`, or None if it fits."""
    if not isinstance(found, dict) or not {"state", "param_groups"} <= found.keys():
        return "it is not the state of an optimizer"
    groups, saved = optimizer.param_groups, found["param_groups"]
    if not isinstance(saved, list) or not all(isinstance(group, dict) for group in saved) or len(saved) != len(groups):
        return f"it has {len(saved) if isinstance(saved, list) else 0} groups of parameters, not {len(groups)}"
    if not isinstance(found["state"], dict):
        return "it has no states"
    for group, other in zip(groups, saved, strict=True):
        if set(group) - set(other) and set(other) - set(group):
            return f"it is of another kind, with {sorted(set(other) - set(group))[0]}"
        if not isinstance(other.get("params"), list) or len(other["params"]) != len(group["params"]):
            return "it has another number of parameters"
        for number, parameter in zip(other["params"], group["params"], strict=True):
            state = found["state"].get(number, {})
            for name in SHAPED & set(state):
                if not isinstance(state[name], torch.Tensor) or state[name].shape != parameter.shape:
                    shape = tuple(getattr(state[name], "shape", ()))
                    return f"{name} of parameter {number} has shape {shape}, not {tuple(parameter.shape)}"
    return None
