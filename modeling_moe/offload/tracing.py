# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module finds out where each parameter of a model lies in a checkpoint, by letting transformers load the checkpoint.

transformers renames, stacks, joins, splits and transposes the tensors of a checkpoint while it loads. Here the loader is
given tensors without memory that record what is done to them, so that every family and every way of storing is served as
transformers serves it, and no file is read.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedConfig, PreTrainedModel

from ..checkpoints import State
from .pieces import Cast, Cat, Computed, Cut, Permuted, Piece, Reshaped, Stored, stack
from .watched_file import WatchedFile


aten = torch.ops.aten


class TracedTensor(torch.Tensor):
    """A tensor on the meta device that knows from which pieces of files it is made.

    Attributes:
        piece: the piece.
        writes: operations that wrote into the tensor or into a view of it, after which the piece is not the tensor any more.
    """

    piece: Piece
    writes: list[str]

    @staticmethod
    def __new__(cls, piece: Piece, writes: list[str] | None = None) -> "TracedTensor":
        """Makes a tensor of the piece's shape and dtype; a view is given the list `writes` of what it is a view of."""
        meta = torch.device("meta")
        traced = torch.Tensor._make_wrapper_subclass(cls, piece.shape, dtype=piece.dtype, device=meta)
        traced.piece, traced.writes = piece, [] if writes is None else writes
        return traced

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        """Returns shape and dtype, since there is no element to show."""
        return f"TracedTensor({tuple(self.shape)}, {self.dtype})"

    @classmethod
    # pyrefly: ignore[bad-override]: torch annotates this class method without the function
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Records an operation: one that only moves elements as pieces, any other as [`Computed`]."""
        # a traced tensor stays without memory on whatever device the loader puts it
        kwargs = {name: torch.device("meta") if name == "device" else value for name, value in (kwargs or {}).items()}
        schema = func._schema
        if schema.is_mutable:
            return _written(func, args)
        bare_args, bare_kwargs = tree_map_only(cls, _bare, (args, kwargs))
        results = func(*bare_args, **bare_kwargs)
        move = _MOVES.get(func)
        if move is None:
            return tree_map_only(torch.Tensor, lambda result: cls(_computed(func, result)), results)
        arguments = {argument.name: value for argument, value in zip(schema.arguments, args, strict=False)}
        pieces = move(arguments | kwargs, results)
        writes = args[0].writes if schema.returns[0].alias_info and isinstance(args[0], cls) else None
        return cls(pieces, writes) if isinstance(pieces, Piece) else [cls(piece, writes) for piece in pieces]


def _written(func: Any, args: Any) -> Any:
    """Notes an operation that writes into its first argument, which it returns."""
    if isinstance(args[0], TracedTensor):
        args[0].writes.append(str(func))
    return args[0]


def _bare(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def _computed(func: Any, result: torch.Tensor) -> Piece:
    return Computed(tuple(result.shape), result.dtype, str(func))


def _piece(tensor: torch.Tensor) -> Piece:
    if isinstance(tensor, TracedTensor):
        return tensor.piece
    return Computed(tuple(tensor.shape), tensor.dtype, "a tensor that is not in the checkpoint")


def _axis(given: Mapping[str, Any], name: str, result: torch.Tensor) -> int:
    """Returns a dimension, which may be missing or negative in the arguments of an operation, as a number from 0 on."""
    return given.get(name, 0) % result.dim()


def _same(given: Mapping[str, Any], result: torch.Tensor) -> Piece:
    return _piece(given["self"])


def _reshaped(given: Mapping[str, Any], result: torch.Tensor) -> Piece:
    return Reshaped(tuple(result.shape), result.dtype, _piece(given["self"]))


def _cast(given: Mapping[str, Any], result: torch.Tensor) -> Piece:
    piece = _piece(given["self"])
    return piece if result.dtype == piece.dtype else Cast(piece.shape, result.dtype, piece)


def _cat(given: Mapping[str, Any], result: torch.Tensor) -> Piece:
    pieces = tuple(_piece(tensor) for tensor in given["tensors"])
    if any(piece.dtype != result.dtype for piece in pieces):
        pieces = tuple(Cast(piece.shape, result.dtype, piece) for piece in pieces)
    return Cat(tuple(result.shape), result.dtype, pieces, _axis(given, "dim", result))


def _stack(given: Mapping[str, Any], result: torch.Tensor) -> Piece:
    return stack([_piece(tensor) for tensor in given["tensors"]], _axis(given, "dim", result))


def _transposed(given: Mapping[str, Any], result: torch.Tensor) -> Piece:
    dims = list(range(result.dim()))
    first, second = given.get("dim0", 0) % len(dims), given.get("dim1", 1) % len(dims)
    dims[first], dims[second] = dims[second], dims[first]
    return Permuted(tuple(result.shape), result.dtype, _piece(given["self"]), tuple(dims))


def _permuted(given: Mapping[str, Any], result: torch.Tensor) -> Piece:
    dims = tuple(dim % result.dim() for dim in given["dims"])
    return Permuted(tuple(result.shape), result.dtype, _piece(given["self"]), dims)


def _sliced(given: Mapping[str, Any], result: torch.Tensor) -> Piece:
    if given.get("step", 1) != 1:
        return _computed(aten.slice.Tensor, result)
    dim = _axis(given, "dim", result)
    piece = _piece(given["self"])
    start, _, _ = slice(given.get("start"), given.get("end")).indices(piece.shape[dim])
    return Cut(tuple(result.shape), result.dtype, piece, dim, start)


def _selected(given: Mapping[str, Any], result: torch.Tensor) -> Piece:
    piece = _piece(given["self"])
    dim, index = given["dim"] % len(piece.shape), given["index"]
    return _select(piece, dim, index % piece.shape[dim])


def _select(piece: Piece, dim: int, index: int) -> Piece:
    single = (*piece.shape[:dim], 1, *piece.shape[dim + 1 :])
    shape = (*piece.shape[:dim], *piece.shape[dim + 1 :])
    return Reshaped(shape, piece.dtype, Cut(single, piece.dtype, piece, dim, index))


def _unbound(given: Mapping[str, Any], results: list[torch.Tensor]) -> list[Piece]:
    piece = _piece(given["self"])
    dim = given.get("dim", 0) % len(piece.shape)
    return [_select(piece, dim, index) for index in range(len(results))]


def _split(given: Mapping[str, Any], results: list[torch.Tensor]) -> list[Piece]:
    piece, found, start = _piece(given["self"]), [], 0
    for result in results:
        dim = _axis(given, "dim", result)
        found.append(Cut(tuple(result.shape), result.dtype, piece, dim, start))
        start += result.shape[dim]
    return found


# operation -> the piece, or the list of pieces, that the operation makes
_MOVES: dict[Any, Callable[[Mapping[str, Any], Any], Any]] = {
    **dict.fromkeys([aten.detach.default, aten.alias.default, aten.clone.default, aten.contiguous.default], _same),
    **dict.fromkeys([aten.view.default, aten._unsafe_view.default, aten.unsqueeze.default], _reshaped),
    **dict.fromkeys([aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims], _reshaped),
    aten._to_copy.default: _cast,
    aten.cat.default: _cat,
    aten.stack.default: _stack,
    **dict.fromkeys([aten.transpose.int, aten.t.default], _transposed),
    aten.permute.default: _permuted,
    aten.slice.Tensor: _sliced,
    aten.select.int: _selected,
    aten.unbind.int: _unbound,
    **dict.fromkeys([aten.split.Tensor, aten.split_with_sizes.default], _split),
}


def traced_state(state: State) -> dict[str, TracedTensor]:
    """Returns tensors without memory that stand for the tensors of safetensors files.

    Args:
        state: unread tensors, each with its place in a file.
    """
    files: dict[Any, WatchedFile] = {}
    traced: dict[str, TracedTensor] = {}
    for name, tensor in state.items():
        if tensor.place is None:
            raise ValueError(f"{name} is not a tensor of a safetensors file")
        path, offset = tensor.place
        file = files.setdefault(path, WatchedFile(path))
        traced[name] = TracedTensor(Stored(tensor.shape, tensor.dtype, file, offset))
    return traced


def trace(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, state: Mapping[str, TracedTensor], dtype: Any
) -> PreTrainedModel:
    """Loads a model without memory, whose parameters say where they lie in the checkpoint.

    Args:
        model_class: class of the model.
        config: configuration of the model.
        state: tensors of [`traced_state`].
        dtype: dtype that the parameters get, or `"auto"` for that of the configuration.

    Returns:
        The model on the meta device; parameters that the checkpoint holds are [`TracedTensor`]s.

    Raises:
        RuntimeError: if the checkpoint does not fit the configuration, as transformers' `from_pretrained` does.
    """
    return model_class.from_pretrained(
        None, config=config, state_dict=dict(state), dtype=dtype, device_map={"": torch.device("meta")}
    )
