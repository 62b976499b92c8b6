# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""GGUF files, read tensor by tensor with what transformers and the `gguf` library know of their names and layouts."""

import itertools
import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_gguf_pytorch_utils import (
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_hf_weights_map,
    load_gguf_checkpoint,
    read_field,
)

from ..utils.errors import UserError
from .damage import refuse_not_finite
from .gguf_header import refuse_damaged_header
from .lazy_tensor import Index, LazyTensor, State


# the largest tensors; transformers takes them as they are stored, so that rows of them can be read alone
BY_ROWS = {"token_embd.weight", "output.weight"}
BLOCK = 1 << 26


@dataclass(frozen=True)
class _Stored:
    """A tensor in the file: where it is, and how its numbers are packed."""

    file: Path
    name: str
    kind: int
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype
    numel: int

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows of the tensor, dequantised to fp32."""
        from gguf import dequantize

        row = math.prod(self.shape[1:]) * self.dtype.itemsize
        count = (self.shape[0] if stop is None else stop) - start
        packed = np.fromfile(self.file, np.uint8, count * row, offset=self.offset + start * row)
        if len(packed) != count * row:
            raise UserError(f"{self.file} became shorter while it was read: download it again")
        values = dequantize(packed.view(self.dtype).reshape(count, *self.shape[1:]), self.kind)
        remedy = "the file is damaged, download it again"
        refuse_not_finite(torch.from_numpy(values), f"{self.name} in {self.file}", remedy)
        return values


def read_gguf(file: Path) -> State:
    """The tensors of a GGUF file under transformers' names, in fp32, equal to those that transformers loads.

    Raises:
        UserError: if the file is no GGUF file or truncated, transformers does not know its architecture, or it lacks a
            tensor of the model.
    """
    if not file.is_file():
        raise UserError(f"gguf_file {file.name} is not in {file.parent}: name a file of that folder")
    refuse_damaged_header(file)
    try:
        architecture, stored = _stored_tensors(file)
        config = load_gguf_checkpoint(file)["config"]
        _refuse_more_layers(file, config, stored)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
        processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=config)
        mapping = get_gguf_hf_weights_map(_names(model), processor)
    except ImportError as error:
        raise UserError(f"{file} needs the gguf library: pip install gguf") from error
    except UserError:
        raise
    except Exception as error:
        # both libraries take what a file says without looking, and fail where it does not fit in any way
        raise UserError(f"{file} cannot be read as a GGUF file: {type(error).__name__} {error}") from error
    members = defaultdict(list)
    for tensor in stored:
        if name := mapping.get(tensor.name) or mapping.get(tensor.name.removesuffix(".weight")):
            members[name].append(tensor)
    for name, _ in model.named_parameters():
        if name not in members:
            raise UserError(f"{file} lacks {name}: it is not whole, or transformers does not know its layout")
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    return {name: _tensor(name, shapes[name], members[name], processor, mapping) for name in shapes if name in members}


def _stored_tensors(file: Path) -> tuple[str, list[_Stored]]:
    """The file's architecture and tensors."""
    from gguf import GGUFReader

    reader = GGUFReader(file)
    stored = [
        _Stored(file, t.name, t.tensor_type, t.data_offset, t.data.shape, t.data.dtype, t.n_elements)
        for t in reader.tensors
    ]
    ends = sorted((t.data_offset, t.data_offset + t.n_bytes, t.name) for t in reader.tensors)
    for (_, end, name), (start, _, other) in itertools.pairwise(ends):
        if start < end:
            raise UserError(f"{file} is damaged: {name} and {other} overlap; download it again")
    return read_field(reader, "general.architecture")[0], stored


def _refuse_more_layers(file: Path, config: dict[str, Any], stored: list[_Stored]) -> None:
    """Refuses metadata with more layers than there are tensors, before a model is built that has so many."""
    if (layers := config.get("num_hidden_layers", 0)) > len(stored):
        raise UserError(
            f"{file} is damaged: it asks for {layers} layers and has {len(stored)} tensors; download it again"
        )


def _names(model: PreTrainedModel) -> SimpleNamespace:
    """What transformers' map of names asks of a model; its base model is the only submodule, for speed."""
    base = SimpleNamespace(state_dict=model.base_model.state_dict, named_children=list)
    children = [(model.base_model_prefix, base)]
    return SimpleNamespace(config=model.config, state_dict=model.state_dict, named_children=lambda: children)


def _tensor(
    name: str, shape: tuple[int, ...], members: list[_Stored], processor: TensorProcessor, mapping: dict[str, str]
) -> LazyTensor:
    """One of transformers' tensors, made of those in the file that belong to it."""

    if sum(member.numel for member in members) != math.prod(shape):
        raise UserError(
            f"{members[0].name} in {members[0].file} does not fit its metadata, which ask for shape {shape}"
        )

    def load(index: Index) -> torch.Tensor:
        parsed = {"tensors": {}}
        for member in members:
            weights, target, _ = processor.process(
                weights=member.read(), name=member.name, tensor_key_mapping=mapping, parsed_parameters=parsed
            )
            if target in mapping:
                parsed["tensors"][mapping[target]] = torch.from_numpy(np.ascontiguousarray(weights))
        return parsed["tensors"][name][index]

    def load_rows(index: Index) -> torch.Tensor:
        rows = range(shape[0])[index[0]]
        return torch.from_numpy(members[0].read(rows.start, rows.stop))[(slice(None), *index[1:])]

    if members[0].name not in BY_ROWS:
        return LazyTensor(shape, torch.float32, load)
    whole = LazyTensor(shape, torch.float32, load_rows)
    step = max(1, BLOCK * shape[0] // whole.nbytes)
    parts = tuple(whole[row : row + step] for row in range(0, shape[0], step))
    return LazyTensor(shape, torch.float32, load_rows, parts)
