# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module narrows the types of the `datasets` library."""

import datasets


def one_table(rows: datasets.Dataset | datasets.DatasetDict) -> datasets.Dataset:
    """Returns `rows`, which is one table and not a dictionary of splits.

    `Dataset.map`, `filter` and the like are annotated as if they could return both.

    Raises:
        TypeError: if `rows` is a dictionary of splits.
    """
    if not isinstance(rows, datasets.Dataset):
        raise TypeError(f"rows is a {type(rows).__name__}: choose one of its splits")
    return rows
