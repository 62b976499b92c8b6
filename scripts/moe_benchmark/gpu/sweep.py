# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module is part `sweep`: it times other tiles than the table's, from which `scripts/gpu_report.py` proposes
a table.

Each field of a [`~modeling_moe.dispatch.backends.triton.tiles.Config`] is varied alone, because each belongs to
different kernels.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from modeling_moe.dispatch.backends.triton import tiles
from modeling_moe.dispatch.backends.triton.launching import Launch
from modeling_moe.dispatch.backends.triton.tiles import Config, Decoding, Tile

from ..presets import PRESETS
from . import passes
from .kernels import named_arguments, total
from .passes import Problem
from .results import Results, free
from .sizes import Shape, Size
from .tile_table import with_field
from .timing import launch_times, median_ms


# field -> kernels that use it
KERNELS = {
    "gradient": ("weight_gradient",),
    "persistent": ("multiply", "multiply_persistent"),
    "down": ("multiply", "multiply_persistent"),
    "gate": ("gate_backward",),
    "up": ("project_up",),
    "narrow": ("project_up", "multiply"),
}
DECODING_KERNELS = {
    "up": ("decode_up",),
    "down": ("decode_down",),
    "down_many": ("decode_down",),
    "num_warps": ("decode_up", "decode_down"),
}
# field -> changes of the table's tile, the most promising first; the unchanged tile is measured too
CHANGES: dict[str, tuple[dict[str, int], ...]] = {
    "gradient": (
        {"BLOCK_N": 256},
        {"BLOCK_N": 128},
        {"BLOCK_N": 256, "num_stages": 6},
        {"BLOCK_N": 256, "num_stages": 4},
        {"num_warps": 4},
        {"num_stages": 4},
    ),
    "down": (
        {"num_stages": 4},
        {"BLOCK_N": 128},
        {"BLOCK_N": 256},
        {"BLOCK_N": 128, "num_stages": 4},
        {"BLOCK_N": 128, "num_warps": 4, "num_stages": 4},
    ),
    "gate": (
        {"BLOCK_N": 256},
        # two programs run at a time, so that the products of one overlap with the end of the other
        {"maxnreg": 128},
        {"BLOCK_N": 128},
        {"BLOCK_N": 128, "num_stages": 4},
        {"BLOCK_N": 64, "num_warps": 4, "num_stages": 4},
    ),
    "up": ({"num_stages": 4}, {"num_stages": 2}, {"BLOCK_N": 64}, {"BLOCK_N": 64, "num_stages": 4}),
    "narrow": ({"BLOCK_K": 128}, {"num_stages": 5}, {"num_warps": 8}, {"BLOCK_K": 128, "num_stages": 3}),
}
DECODING_CHANGES = {"up": (32, 8), "down": (16, 4), "down_many": (32, 8), "num_warps": (8, 2)}


def alternatives(shape: Shape, own: Config | Decoding, most: int) -> Iterator[tuple[str, Config | Decoding]]:
    """Yields the name of each field, with the configurations that differ in that field only.

    Args:
        shape: the pass; only a pass with low-rank updates uses the field `"narrow"`.
        own: configuration of the table, which comes first for each field.
        most: largest number of changes of a field.
    """
    if isinstance(own, Decoding):
        unused = "down_many" if shape.tokens <= own.few else "down"
        for field, values in DECODING_CHANGES.items():
            if field != unused:
                for value in list(dict.fromkeys([getattr(own, field), *values]))[: 1 + most]:
                    yield field, own._replace(**{field: value})
        return
    if shape.scenario == "lora":
        fields = ["narrow"]
    else:
        fields = [field for field in CHANGES if field != "narrow"]
        yield "persistent", own
        yield "persistent", own._replace(persistent=not own.persistent)
    for field in fields:
        tile: Tile = getattr(own, field)
        # AMD's compiler has no register limit
        known = (change for change in CHANGES[field] if torch.version.hip is None or "maxnreg" not in change)
        changed = (tile._replace(**change) for change in known)
        for value in list(dict.fromkeys([tile, *changed]))[: 1 + most]:
            yield field, with_field(own, field, value)


def value_of(config: Config | Decoding, field: str) -> list[int | None] | int:
    """Returns the value of a field in JSON's types."""
    value = getattr(config, field)
    return list(value) if isinstance(value, Tile) else value


def family() -> str:
    """Returns the family of this GPU, a key of [`~modeling_moe.dispatch.backends.triton.tiles.CONFIGS`]."""
    return tiles.family_of(torch.device("cuda"))


def table(dtype: str, family: str) -> list[tuple[float, Config]]:
    """Returns the tiles for a [`Shape`]'s dtype, with the largest average rows per expert of each tile."""
    return tiles.CONFIGS[family][dtype if dtype in ("float32", "tf32") else "16bit"]


def rows_of(shape: Shape) -> float:
    """Returns the average number of rows per expert."""
    preset = PRESETS[shape.preset]
    return shape.tokens * preset.per_token / preset.experts


def own_config(shape: Shape, family: str) -> Config | Decoding:
    """Returns the table's configuration for a shape."""
    if shape.scenario == "decode":
        return tiles.DECODING[family]
    return next(config for most, config in table(shape.dtype, family) if rows_of(shape) <= most)


def run(results: Results, size: Size) -> None:
    """Writes the times of tiles of other heights at several numbers of tokens, then those of each change of a field."""
    _compare_heights(results, size)
    for shape in size.swept:
        with results.attempt(**shape._asdict()):
            problem, config = passes.make(shape), own_config(shape, family())
            for field, changed in alternatives(shape, config, size.changes):
                label = {**shape._asdict(), "family": family(), "rows_per_expert": rows_of(shape)}
                label |= {"field": field, "value": value_of(changed, field)}
                if results.late():
                    results.put(not_run=label)
                    continue
                with results.attempt(**label):
                    _put_change(results, size, problem, label, changed, current=changed == config)
            del problem
        free()


def _put_change(
    results: Results, size: Size, problem: Problem, label: dict[str, Any], config: Config | Decoding, current: bool
) -> None:
    """Writes the ms of the kernels that use the changed field, or that the GPU has no room for the tile."""
    try:
        times = launch_times(lambda: passes.run(problem, config), size.rounds)
    except Exception as error:
        if "out of resource" not in str(error):
            raise
        results.put(**label, current=current, refused=str(error))
        return
    ruled = DECODING_KERNELS if isinstance(config, Decoding) else KERNELS
    chosen = [time for time in times if _is_ruled(ruled, label["field"], time.launch)]
    ms, (work, _) = sum(time.ms for time in chosen), total(chosen, problem.slots)
    rate = {"tflops": work / ms / 1e9} if work else {}
    results.put(**label, current=current, ms=ms, each_ms=[time.ms for time in chosen], **rate)


def _is_ruled(ruled: Mapping[str, tuple[str, ...]], field: str, launch: Launch) -> bool:
    """Returns whether a launch takes its blocks from a field."""
    values = named_arguments(launch)
    is_narrow = passes.RANK in (values.get("n"), values.get("inner"))
    return launch.name in ruled[field] and (field == "narrow") == is_narrow


def _compare_heights(results: Results, size: Size) -> None:
    """Writes the times of forward, and of forward plus backward, with the two highest tiles of the table."""
    for shape in size.crossover:
        if results.late():
            results.put(not_run=shape._asdict())
            continue
        with results.attempt(**shape._asdict()):
            problem = passes.make(shape)
            inference = problem._replace(shape=shape._replace(scenario="infer"))
            for _, config in table(shape.dtype, family())[-2:]:
                times = {
                    "forward_ms": median_ms(lambda p=inference, c=config: passes.run(p, c), size.rounds),
                    "both_ms": median_ms(lambda p=problem, c=config: passes.run(p, c), size.rounds),
                }
                label = {"preset": shape.preset, "tokens": shape.tokens, "dtype": shape.dtype}
                results.put(**label, rows_per_expert=rows_of(shape), block_m=config.up.BLOCK_M, **times)
            del problem, inference
        free()
