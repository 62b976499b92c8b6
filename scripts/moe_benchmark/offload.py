# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module measures decoding with the experts on disk: the expert cache, Accelerate's disk offload, and the whole model."""

import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import disk_offload
from torch import nn
from transformers import AutoModelForCausalLM

from modeling_moe import MoEConfig
from modeling_moe.offload import from_pretrained_offloaded
from modeling_moe.offload.simulation import belady, simulate, zipf_passes

from .arguments import BenchmarkArguments
from .case_runner import CaseRunner
from .cases import Case
from .check import refuse_disagreement
from .contestants import ACCELERATE, ALL_SLOTS, QUARTER, WHOLE
from .measure import Contestant
from .presets import PRESETS, Preset
from .results import Result


VOCABULARY = 512
LAYERS = 4
PROMPT = 16
ZIPF_PASSES = 400


def _config(preset: Preset) -> MoEConfig:
    heads = max(4, preset.hidden // 64)
    return MoEConfig(
        vocab_size=VOCABULARY,
        hidden_size=preset.hidden,
        intermediate_size=preset.intermediate,
        moe_intermediate_size=preset.intermediate,
        num_hidden_layers=LAYERS,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        num_experts=preset.experts,
        num_experts_per_tok=preset.per_token,
    )


def slots_of_quarter(preset: Preset) -> int:
    """Returns the number of slots of each layer at a budget of a quarter of the experts, and at least K."""
    return max(preset.per_token, preset.experts // 4)


def drop_pages(folder: Path) -> None:
    """Takes the files of a folder out of the page cache, so that the next read of a file reads the disk."""
    for file in folder.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            try:
                os.fsync(descriptor)  # pages that are not written yet would stay
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)


class _Decoding:
    """A model that reads one text of random tokens, one in each call, so that its routing does not repeat itself."""

    def __init__(self, model: nn.Module, prompt: torch.Tensor):
        self.model: Any = model.eval()
        self._draw = torch.Generator().manual_seed(1)
        self._cache: Any = None
        self.logits = self._run(prompt)

    def step(self) -> torch.Tensor:
        """Returns the logits (1, V) after the next token."""
        token = torch.randint(VOCABULARY, (1, 1), generator=self._draw)
        self.logits = self._run(token.to(self.logits.device))
        return self.logits

    @torch.inference_mode()
    def _run(self, ids: torch.Tensor) -> torch.Tensor:
        output = self.model(ids, past_key_values=self._cache, use_cache=True)
        self._cache = output.past_key_values
        return output.logits[:, -1]


class OffloadRunner(CaseRunner):
    """Measures cases of the level `"offload"`: decoding one text with the experts on disk.

    The files of all offloaded models leave the page cache before each token. Logits must be those of the whole model, bit for
    bit for the expert cache. On a Zipf trace the result also has the experts that the default policy loads over the fewest
    possible.
    """

    def __init__(self, args: BenchmarkArguments):
        super().__init__(args)
        self._folder: tempfile.TemporaryDirectory | None = None

    def contestants(self, case: Case, result: Result) -> list[Contestant]:
        """Returns the whole model, and those whose experts are on disk."""
        preset = PRESETS[case.preset]
        self._folder = tempfile.TemporaryDirectory()
        root = Path(self._folder.name)
        torch.manual_seed(0)
        source = AutoModelForCausalLM.from_config(_config(preset), dtype=case.torch_dtype)
        source.save_pretrained(root / "model")
        del source
        prompt = torch.randint(VOCABULARY, (1, PROMPT), generator=torch.Generator().manual_seed(0)).to(self.device)
        makers: dict[str, Callable[[], nn.Module]] = {
            WHOLE: partial(self._whole, root, case),
            ALL_SLOTS: partial(self._slots, root, preset.experts),
            QUARTER: partial(self._slots, root, slots_of_quarter(preset)),
            ACCELERATE: partial(self._accelerate, root, case),
        }
        decodings: dict[str, _Decoding] = {}
        for name, make in makers.items():
            self.guard(name, result, lambda name=name, make=make: decodings.update({name: _Decoding(make(), prompt)}))
        for name in list(decodings)[1:]:
            if not self.guard(name, result, partial(self._check, name, decodings, case)):
                del decodings[name]
        result.loads["Zipf"] = _loads_over_fewest(preset)
        return [Contestant(name, decoding.step, partial(drop_pages, root)) for name, decoding in decodings.items()]

    def _whole(self, root: Path, case: Case) -> nn.Module:
        model = AutoModelForCausalLM.from_pretrained(root / "model", dtype=case.torch_dtype)
        # a copy, because transformers maps the file
        return model.to(self.device)._apply(torch.clone)

    def _slots(self, root: Path, slots: int) -> nn.Module:
        return from_pretrained_offloaded(root / "model", slots=slots, tier="disk", device=self.device)

    def _accelerate(self, root: Path, case: Case) -> nn.Module:
        model = AutoModelForCausalLM.from_pretrained(root / "model", dtype=case.torch_dtype)
        disk_offload(model, str(root / "accelerate"), execution_device=self.device)
        return model

    def _check(self, name: str, decodings: dict[str, _Decoding], case: Case) -> None:
        whole = decodings[WHOLE].logits
        error = ((decodings[name].logits - whole).abs().max() / whole.abs().max()).item()
        # products at other addresses may round otherwise in Accelerate's mapped files
        refuse_disagreement(
            {"logits": error}, 1e-2 if name == ACCELERATE else 0.0, f"{name} in {case}", "the whole model"
        )

    def remembered(self, name: str) -> tuple[Callable[[], Any], list[torch.Tensor]] | None:
        """Returns None: decoding saves nothing for backward."""
        return None

    def measure(self, case: Case) -> Result:
        """Measures one case, and deletes the case's files."""
        try:
            return super().measure(case)
        finally:
            if self._folder is not None:
                self._folder.cleanup()
                self._folder = None


def _loads_over_fewest(preset: Preset) -> float:
    """Returns the experts that the default policy loads over Belady's fewest, on a Zipf trace with a quarter of the slots."""
    passes = zipf_passes(preset.experts, preset.per_token, ZIPF_PASSES)
    slots = slots_of_quarter(preset)
    return simulate(passes, "lfru", slots, preset.experts).misses / belady(passes, slots).misses
