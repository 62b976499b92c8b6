# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""Spherical k-means, whose clusters a router without bias can tell apart, and its form with clusters of equal size.

# N points, F features, C clusters
"""

from collections.abc import Callable

import torch
from torch.nn.functional import normalize


def kmeans(points: torch.Tensor, clusters: int, generator: torch.Generator, restarts: int = 4) -> torch.Tensor:
    """Centroids of spherical k-means (Dhillon and Modha, Machine Learning 42, 2001).

    Points and centroids have length 1, so that the nearest centroid is the one with the largest dot product.

    Args:
        points: (N, F) fp32; of any length but 0.
        clusters: C, at most N.
        generator: of the random numbers.
        restarts: the best of so many runs is taken.

    Returns:
        (C, F) fp32.
    """
    points = normalize(points)
    runs = [lloyd(points, seed_centres(points, clusters, generator), nearest) for _ in range(restarts)]
    return max(runs, key=lambda run: run[2])[0]


def balanced_clusters(points: torch.Tensor, clusters: int, generator: torch.Generator) -> torch.Tensor:
    """Cluster (N,) int64 of each point, all clusters of N / C points, by cosine similarity.

    Args:
        points: (N, F) fp32; N is a multiple of C. Points of length 0 go where there is room.
        clusters: C.
        generator: of the random numbers.
    """
    points = normalize(points)
    # later steps add half a percent to the similarity
    return lloyd(points, seed_centres(points, clusters, generator), assign_evenly, max_steps=10)[1]


def seed_centres(points: torch.Tensor, clusters: int, generator: torch.Generator) -> torch.Tensor:
    """Points (C, F) drawn one by one with the squared distance to those drawn before as weight (k-means++)."""
    not_zero = points.norm(dim=1) > 0
    distance, centres = not_zero.float(), []
    for _ in range(clusters):
        # at least a little, for points that are all the same
        drawn = torch.multinomial(distance.clamp(min=1e-9), 1, generator=generator)
        centres.append(points[drawn[0]])
        distance = torch.minimum(distance, not_zero * (1 - points @ centres[-1]))
    return torch.stack(centres)


def lloyd(
    points: torch.Tensor,
    centres: torch.Tensor,
    assign: Callable[[torch.Tensor], torch.Tensor],
    max_steps: int = 100,
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Assigns points and moves centres in turn as long as that makes them more similar.

    Args:
        points: (N, F) of length 1, or 0.
        centres: (C, F) to start from.
        assign: similarities (N, C) -> cluster of each point (N,).
        max_steps: ends there at the latest.

    Returns:
        Centres (C, F), clusters (N,) int64, and the sum of the points' similarities to their centres.
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
        # a centre that lost all its points takes the one that lies worst
        centres[empty] = points[own.argsort()[: int(empty.sum())]]
    return kept, clusters, best


def nearest(similarity: torch.Tensor) -> torch.Tensor:
    """The cluster (N,) of the largest similarity (N, C)."""
    return similarity.argmax(dim=1)


def assign_evenly(similarity: torch.Tensor) -> torch.Tensor:
    """Clusters (N,) of N / C points each, such that the similarities sum to nearly as much as they can.

    Each cluster gets the price at which about N / C points would choose it; then the points choose, those first that
    lose most by their second choice.

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
