# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module counts what the expert cache of each layer does, and shows the counts as figures and as a table."""

from collections.abc import Mapping
from dataclasses import dataclass, fields


@dataclass
class LayerStatistics:
    """LayerStatistics counts what the expert cache of one layer did since the last reset.

    The cache adds to the counts while a model runs.

    Attributes:
        hits: uses of an expert that was resident when its round began, or that a prefetch loaded in the meantime; an expert counts
            once in a pass, for all its tokens.
        misses: uses for which the pass loaded the expert.
        bytes_read: bytes that were read from the store, for misses and for prefetching.
        prefetched: experts that were loaded ahead of a pass.
        prefetched_used: prefetched experts that a pass used before they were evicted.
        stall_seconds: time in seconds in which passes waited for experts.
    """

    hits: int = 0
    misses: int = 0
    bytes_read: int = 0
    prefetched: int = 0
    prefetched_used: int = 0
    stall_seconds: float = 0.0

    @property
    def hit_rate(self) -> float:
        """Returns the hits as a share of all uses; NaN without a use."""
        return self.hits / (self.hits + self.misses) if self.hits + self.misses else float("nan")

    @property
    def prefetch_precision(self) -> float:
        """Returns the share of the prefetched experts that were used; NaN if nothing was prefetched."""
        return self.prefetched_used / self.prefetched if self.prefetched else float("nan")

    def reset(self) -> None:
        """Starts from 0 again."""
        for field in fields(self):
            setattr(self, field.name, field.default)


@dataclass(frozen=True)
class OffloadStatistics:
    """OffloadStatistics shows the statistics of all layers of a model; they go on counting while the model runs.

    Attributes:
        layers: qualified name of the experts module -> statistics of the layer's cache.
    """

    layers: Mapping[str, LayerStatistics]

    @property
    def total(self) -> LayerStatistics:
        """Returns the sums over all layers."""
        names = [field.name for field in fields(LayerStatistics)]
        return LayerStatistics(**{n: sum(getattr(layer, n) for layer in self.layers.values()) for n in names})

    def reset(self) -> None:
        """Starts from 0 again in all layers."""
        for layer in self.layers.values():
            layer.reset()

    def table(self) -> str:
        """Returns a plain-text table with a row for each layer and one for the total."""
        rows = [("layer", "hits", "misses", "hit rate", "MiB read", "prefetched", "precision", "stall s")]
        rows += [_row(name, layer) for name, layer in (*self.layers.items(), ("total", self.total))]
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        return "\n".join(
            "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
            for row in rows
        )


def _row(name: str, layer: LayerStatistics) -> tuple[str, ...]:
    """Returns the cells of a layer; a share of nothing is a dash."""
    return (
        name,
        str(layer.hits),
        str(layer.misses),
        f"{layer.hit_rate:.1%}" if layer.hits + layer.misses else "-",
        f"{layer.bytes_read / 2**20:.1f}",
        str(layer.prefetched),
        f"{layer.prefetch_precision:.1%}" if layer.prefetched else "-",
        f"{layer.stall_seconds:.2f}",
    )
