# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module measures which experts prefer which domains, and tells preference from chance.

The tokens of one text share a topic, so their routing is correlated, and a test that takes tokens for independent finds a
preference everywhere. The unit of the test is therefore a stretch of text of many tokens. The stretches of all domains are equally
long: a short stretch varies more than a long one, and a small domain of short stretches would seem to differ by chance alone.

# D domains, U units of all domains together, L sparse layers, E experts of one layer, C cells: all experts of all layers
"""

import math
from collections.abc import Sequence

import numpy as np


PERMUTATIONS = 999
# largest corrected p-value that counts as significant
LEVEL = 0.05
# smaller differences of shares are rounding
ROUNDING = 1e-12


def specialisation(load: np.ndarray) -> np.ndarray:
    """Returns log2 of each expert's share of a domain over the expert's mean share of all domains.

    Half an assignment is added to each count, so that the logarithm is finite. The share of a domain is OLMoE's domain
    specialisation (arXiv:2409.02060) divided by K.

    Args:
        load: (D, E) assignments of each domain to each expert.

    Returns:
        (D, E) float64; 1 for an expert that gets twice its mean share from a domain, and 0 without any preference.
    """
    smoothed = load.astype(np.float64) + 0.5
    share = smoothed / smoothed.sum(axis=-1, keepdims=True)
    return np.log2(share / share.mean(axis=0))


def contrasts(values: np.ndarray, labels: np.ndarray, domains: int) -> np.ndarray:
    """Returns the t statistic of each cell: the mean of one domain against the mean of the other domains' means.

    The variance is that within the domains, pooled over all domains as in the analysis of variance.

    Args:
        values: (U, C) value of each cell in each unit; U is at least D + 1.
        labels: (U,) domain of each unit, from 0 to D - 1, each of which occurs.
        domains: D, at least 2.

    Returns:
        (D, C) float64; 0 where the means are equal, and infinite where they differ without any variance.
    """
    one_hot = (labels == np.arange(domains)[:, None]).astype(np.float64)  # (D, U)
    size = one_hot.sum(axis=-1, keepdims=True)  # (D, 1)
    mean = one_hot @ values / size
    difference = (domains * mean - mean.sum(axis=0)) / (domains - 1)
    difference[np.abs(difference) < ROUNDING] = 0.0
    within = (values**2).sum(axis=0) - (size * mean**2).sum(axis=0)
    variance = within.clip(min=0.0) / (len(values) - domains)
    others = ((1 / size).sum() - 1 / size) / (domains - 1) ** 2
    with np.errstate(divide="ignore", invalid="ignore"):
        statistic = difference / np.sqrt(variance * (1 / size + others))
    return np.where(difference == 0, 0.0, statistic)


def adjusted_p_values(
    values: np.ndarray, labels: np.ndarray, seed: int, permutations: int = PERMUTATIONS
) -> np.ndarray:
    """Returns the p-value of each domain and cell, corrected for the number of all cells of all domains.

    This is Westfall and Young's single-step maxT procedure (Resampling-Based Multiple Testing, 1993): the labels of the
    units are permuted, and the p-value is the share of the permutations whose largest statistic over all cells reaches the
    cell's statistic. However the cells are correlated, the chance that any p-value falls below a level without a
    preference is at most the level.

    Args:
        values: (U, C) value of each cell in each unit.
        labels: (U,) int64 domain of each unit, from 0 to D - 1.
        seed: seed of the permutations.
        permutations: number of permutations; the smallest p-value is 1 over one more.

    Returns:
        (D, C) float64; all 1 for one domain, or with fewer than two units more than domains.
    """
    domains = int(labels.max()) + 1
    if domains < 2 or len(labels) < domains + 2:
        return np.ones((domains, values.shape[1]))
    # centred, since sums of squares are subtracted below
    centred = values - values.mean(axis=0)
    observed = np.abs(contrasts(centred, labels, domains))
    random, reached = np.random.default_rng(seed), np.ones(observed.shape)
    for _ in range(permutations):
        largest = np.abs(contrasts(centred, random.permutation(labels), domains)).max()
        reached += largest >= observed * (1 - ROUNDING)
    return reached / (permutations + 1)


def is_too_little(units: Sequence[int]) -> bool:
    """Returns whether so few units exist that no preference can be significant.

    Args:
        units: number of units of each domain.
    """
    # a whole number, which may be too large for a float
    labellings = math.prod(math.comb(sum(units[: place + 1]), count) for place, count in enumerate(units))
    # of two equally large domains, each labelling has a mirror with an equal statistic
    return len(units) < 2 or labellings < 2 / LEVEL


def significant_cells(
    unit_loads: Sequence[np.ndarray], labels: np.ndarray, seed: int = 0, level: float = LEVEL
) -> list[np.ndarray]:
    """Returns for each layer which experts prefer or avoid which domains beyond chance.

    The chance that any cell of any layer is wrongly named is at most `level`, if units of one domain are exchangeable.

    Args:
        unit_loads: L arrays (U, E), assignments of each unit to each expert.
        labels: (U,) int64 domain of each unit, from 0 to D - 1.
        seed: seed of the permutations.
        level: largest corrected p-value that counts.

    Returns:
        L arrays (D, E) bool.
    """
    shares = [load / load.sum(axis=-1, keepdims=True).clip(min=1) for load in unit_loads]
    small = adjusted_p_values(np.concatenate(shares, axis=1), labels, seed) <= level
    return np.split(small, np.cumsum([load.shape[1] for load in unit_loads])[:-1], axis=1)
