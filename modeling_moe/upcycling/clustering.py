# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module implements spherical k-means, and a variant with clusters of equal size.

A router without a bias can separate the clusters, because on the unit sphere the nearest centroid has the largest
logit.

# N points, F features, C clusters
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn.functional import normalize


class Clustering(NamedTuple):
    """Holds the outcome of one run of k-means.

    Attributes:
        centres: (C, F), of length 1.
        clusters: (N,) int64, the cluster of each point.
        similarity: sum over the points of the cosine between a point and the centre of its cluster.
    """

    centres: torch.Tensor
    clusters: torch.Tensor
    similarity: float


def kmeans(points: torch.Tensor, clusters: int, generator: torch.Generator, restarts: int = 4) -> torch.Tensor:
    """Returns the centroids (C, F) fp32 of spherical k-means (Dhillon and Modha, Machine Learning 42, 2001).

    Points and centroids have length 1, so that the nearest centroid is the one with the largest dot product.

    Args:
        points: (N, F) fp32, of any length but 0.
        clusters: C, at most N.
        generator: source of the random numbers.
        restarts: number of runs, of which the best is taken.
    """
    points = normalize(points)
    runs = [lloyd(points, seed_centres(points, clusters, generator), nearest) for _ in range(restarts)]
    return max(runs, key=lambda run: run.similarity).centres


def balanced_clusters(points: torch.Tensor, clusters: int, generator: torch.Generator) -> torch.Tensor:
    """Returns the cluster (N,) int64 of each point, by cosine similarity, with N / C points in every cluster.

    Args:
        points: (N, F) fp32; N is a multiple of C. Points of length 0 fill the clusters with room left.
        clusters: C.
        generator: source of the random numbers.
    """
    points = normalize(points)
    # more than 10 steps raise the similarity by half a percent
    return lloyd(points, seed_centres(points, clusters, generator), assign_evenly, max_steps=10).clusters


def seed_centres(points: torch.Tensor, clusters: int, generator: torch.Generator) -> torch.Tensor:
    """Draws starting centres (C, F) from the points, one after another (k-means++, Arthur and Vassilvitskii, 2007).

    The probability of a point is proportional to the squared distance to the nearest centre drawn before it; between
    points of length 1 that is twice `1 - cosine`. Points of length 0 are not drawn.
    """
    not_zero = points.norm(dim=1) > 0
    distance, centres = not_zero.float(), []
    for _ in range(clusters):
        # a little for every point, so that something can be drawn if all points are equal
        drawn = torch.multinomial(distance.clamp(min=1e-9), 1, generator=generator)
        centres.append(points[drawn[0]])
        distance = torch.minimum(distance, not_zero * (1 - points @ centres[-1]))
    return torch.stack(centres)


def lloyd(
    points: torch.Tensor,
    centres: torch.Tensor,
    assign: Callable[[torch.Tensor], torch.Tensor],
    max_steps: int = 100,
) -> Clustering:
    """Assigns points to centres and moves the centres, in turn, as long as the total similarity rises.

    Args:
        points: (N, F), of length 1 or 0.
        centres: (C, F), where to start.
        assign: function from similarities (N, C) to the cluster of each point (N,).
        max_steps: largest number of steps.
    """
    best, kept = -float("inf"), centres
    clusters = torch.zeros(len(points), dtype=torch.int64)
    for _ in range(max_steps):
        similarity = points @ centres.T
        assigned = assign(similarity)
        own = similarity.gather(1, assigned[:, None])[:, 0]
        if own.sum().item() <= best:
            break
        best, clusters, kept = own.sum().item(), assigned, centres
        centres = normalize(torch.zeros_like(centres).index_add(0, assigned, points))
        empty = torch.bincount(assigned, minlength=len(centres)) == 0
        # a centre without points moves to the point that is least similar to its centre
        centres[empty] = points[own.argsort()[: int(empty.sum())]]
    return Clustering(kept, clusters, best)


def nearest(similarity: torch.Tensor) -> torch.Tensor:
    """Returns the most similar cluster (N,) of each point, from similarities (N, C)."""
    return similarity.argmax(dim=1)


def assign_evenly(similarity: torch.Tensor) -> torch.Tensor:
    """Returns a cluster (N,) for each point, N / C points to a cluster, with nearly the largest total similarity.

    Each cluster gets a price at which about N / C points would choose it. Then the points choose, in the order of what
    each would lose by taking its second choice.

    Args:
        similarity: (N, C).
    """
    points, clusters = similarity.shape
    size = points // clusters
    price, step = similarity.new_zeros(clusters), similarity.std() / 2
    for turn in range(100):
        demand = torch.bincount((similarity - price).argmax(dim=1), minlength=clusters)
        price += step * (turn + 1) ** -0.7 * (demand / size - 1).clamp(max=1)
    ranked = (similarity - price).sort(dim=1, descending=True)
    regret = ranked.values[:, 0] - ranked.values[:, min(1, clusters - 1)]
    room, choices, assigned = [size] * clusters, ranked.indices.tolist(), [0] * points
    for point in regret.argsort(descending=True).tolist():
        cluster = next(choice for choice in choices[point] if room[choice])
        room[cluster] -= 1
        assigned[point] = cluster
    return torch.tensor(assigned)
