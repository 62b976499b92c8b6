"""These tests compare spherical k-means with enumeration, and clusters of equal size with the best assignment."""

import math
from itertools import product

import pytest
import torch
from torch.nn.functional import normalize

from modeling_moe.upcycling.clustering import assign_evenly, balanced_clusters, kmeans, lloyd, nearest, seed_centres


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("seed", range(5))
def test_kmeans_comes_close_to_the_best_of_all_partitions(seed):
    points = normalize(torch.randn(7, 3, generator=generator(seed)))
    partitions = [torch.tensor(labels) for labels in product(range(3), repeat=7)]
    best = max(sum(points[labels == k].sum(0).norm().item() for k in range(3)) for labels in partitions)
    centroids = kmeans(3.0 * points, 3, generator(seed))
    reached = (points @ centroids.T).amax(1).sum().item()
    assert 0.95 * best < reached < best + 1e-4


def test_kmeans_finds_separate_groups():
    centres = normalize(torch.randn(6, 16))
    labels = torch.arange(300) % 6
    points = centres[labels] * (0.5 + torch.rand(300, 1)) + 0.03 * torch.randn(300, 16)
    found = (points @ kmeans(points, 6, generator()).T).argmax(1)
    assert len({(a, b) for a, b in zip(labels.tolist(), found.tolist(), strict=True)}) == 6


def test_starting_centres_are_drawn_by_the_distance_to_all_centres_before():
    # 48 equal points and two other ones: a draw that ignores a centre would take an equal point again
    points = torch.eye(3)[[0] * 48 + [1, 2]]
    for seed in range(20):
        assert len(seed_centres(points, 3, generator(seed)).unique(dim=0)) == 3


def test_starting_centres_are_drawn_by_the_squared_distance():
    points = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
    draws, random = 4000, generator()
    pairs = [seed_centres(points, 2, random) for _ in range(draws)]
    second = [centres[1, 0].item() for centres in pairs if centres[0, 0] == 1]
    # squared distances of the other points to (1, 0): 0.4 and 2
    share = sum(x > 0.5 for x in second) / len(second)
    sigma = math.sqrt(1 / 6 * 5 / 6 / len(second))
    assert len(second) > draws / 4
    assert abs(share - 1 / 6) < 4 * sigma


def test_a_centre_without_points_takes_the_one_that_lies_worst():
    points = normalize(torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.9, 0.1], [0.3, 1.0]]))
    centres, labels, _ = lloyd(points, torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), nearest)
    assert labels.tolist() == [0, 0, 0, 1]
    torch.testing.assert_close(centres[1], points[3])


@pytest.mark.parametrize("seed", range(5))
def test_even_assignment_is_nearly_the_best(seed):
    # every point prefers the first cluster
    similarity = torch.randn(9, 3, generator=generator(seed)) + torch.tensor([3.0, 0.0, 0.0])
    labels = [torch.tensor(row) for row in product(range(3), repeat=9) if all(row.count(k) == 3 for k in range(3))]
    best = max(similarity.gather(1, row[:, None]).sum().item() for row in labels)
    assigned = assign_evenly(similarity)
    assert torch.bincount(assigned, minlength=3).tolist() == [3, 3, 3]
    mean = similarity.mean().item() * 9
    assert similarity.gather(1, assigned[:, None]).sum().item() - mean > 0.95 * (best - mean)


def test_balanced_clusters_have_one_size_whatever_the_points():
    points = torch.randn(60, 8)
    points[::3] = 0.0
    points[1::3] = points[1]
    clusters = balanced_clusters(points, 5, generator())
    assert torch.bincount(clusters).tolist() == [12] * 5
    assert torch.equal(clusters, balanced_clusters(points, 5, generator()))
    assert balanced_clusters(points, 1, generator()).tolist() == [0] * 60
