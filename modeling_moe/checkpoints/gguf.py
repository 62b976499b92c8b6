# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module reads GGUF files tensor by tensor; transformers and the `gguf` library supply the names and layouts."""

import itertools
import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

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


if TYPE_CHECKING:
    from gguf import GGMLQuantizationType


# transformers does not reorder these two tensors, the largest ones, so a few rows of them can be read alone
BY_ROWS = {"token_embd.weight", "output.weight"}
# largest piece of such a tensor in bytes of fp32
BLOCK = 1 << 26


@dataclass(frozen=True)
class _StoredTensor:
    """A tensor of a GGUF file: file, name, quantisation, byte offset, packed shape and dtype, and number of elements."""

    file: Path
    name: str
    quantisation: "GGMLQuantizationType"
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    numel: int

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Returns rows `start` to `stop` of the tensor, dequantised to fp32."""
        from gguf import dequantize

        row = math.prod(self.shape[1:]) * self.dtype.itemsize
        count = (self.shape[0] if stop is None else stop) - start
        packed = np.fromfile(self.file, np.uint8, count * row, offset=self.offset + start * row)
        if len(packed) != count * row:
            raise UserError(f"{self.file} became shorter while it was read: download it again")
        values = dequantize(packed.view(self.dtype).reshape(count, *self.shape[1:]), self.quantisation)
        remedy = "the file is damaged, download it again"
        refuse_not_finite(torch.from_numpy(values), f"{self.name} in {self.file}", remedy)
        return values


def read_gguf(file: Path) -> State:
    """Returns the tensors of a GGUF file under transformers' names, in fp32, equal to those that transformers loads.

    Raises:
        UserError: if the file is truncated or not GGUF, transformers does not know the architecture, or a tensor of the
            model is missing.
    """
    if not file.is_file():
        raise UserError(f"gguf_file {file.name} is not in {file.parent}: name a file of that folder")
    refuse_damaged_header(file)
    try:
        architecture, stored = _stored_tensors(file)
        config: dict[str, Any] = load_gguf_checkpoint(file)["config"]
        _refuse_more_layers(file, config, stored)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
        processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=config)
        mapping = get_gguf_hf_weights_map(_name_source(model), processor)
    except ImportError as error:
        raise UserError(f"{file} needs the gguf library: pip install gguf") from error
    except UserError:
        raise
    except Exception as error:
        # both libraries trust the file's contents, so a damaged file can make them raise any exception
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


def _stored_tensors(file: Path) -> tuple[str, list[_StoredTensor]]:
    """Returns the file's architecture and tensors."""
    from gguf import GGUFReader

    reader = GGUFReader(file)
    stored = [
        _StoredTensor(file, t.name, t.tensor_type, t.data_offset, t.data.shape, t.data.dtype, t.n_elements)
        for t in reader.tensors
    ]
    ends = sorted((t.data_offset, t.data_offset + t.n_bytes, t.name) for t in reader.tensors)
    for (_, end, name), (start, _, other) in itertools.pairwise(ends):
        if start < end:
            raise UserError(f"{file} is damaged: {name} and {other} overlap; download it again")
    return read_field(reader, "general.architecture")[0], stored


def _refuse_more_layers(file: Path, config: dict[str, Any], stored: list[_StoredTensor]) -> None:
    """Refuses metadata with more layers than tensors, before a model with that many layers is built."""
    if (layers := config.get("num_hidden_layers", 0)) > len(stored):
        raise UserError(
            f"{file} is damaged: it asks for {layers} layers and has {len(stored)} tensors; download it again"
        )


def _name_source(model: PreTrainedModel) -> SimpleNamespace:
    """Returns a stand-in with the attributes that transformers' name map reads of a model.

    The base model is the only submodule of the stand-in: a walk through all submodules would take long.
    """
    base = SimpleNamespace(state_dict=model.base_model.state_dict, named_children=list)
    children = [(model.base_model_prefix, base)]
    return SimpleNamespace(config=model.config, state_dict=model.state_dict, named_children=lambda: children)


def _tensor(
    name: str,
    shape: tuple[int, ...],
    members: list[_StoredTensor],
    processor: TensorProcessor,
    mapping: dict[str, str],
) -> LazyTensor:
    """Makes one of transformers' tensors from the stored tensors that belong to it.

    Raises:
        UserError: if the stored tensors do not have as many elements as `shape`.
    """

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
