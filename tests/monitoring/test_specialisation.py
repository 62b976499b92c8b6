"""These tests compare the statistics of specialisation with cases by hand, and count what the test finds in noise."""

from itertools import permutations

import numpy as np
import pytest

from modeling_moe.monitoring.report.specialisation import (
    adjusted_p_values,
    contrasts,
    is_too_little,
    significant_cells,
    specialisation,
)


def test_specialisation_by_hand():
    """Shares with half an assignment more: (2, 2) / 4 and (6, 2) / 8, so the mean shares are 0.625 and 0.375."""
    found = specialisation(np.array([[1.5, 1.5], [5.5, 1.5]]))
    assert found == pytest.approx(np.log2([[0.5 / 0.625, 0.5 / 0.375], [0.75 / 0.625, 0.25 / 0.375]]))
    assert np.isfinite(specialisation(np.array([[0, 7], [3, 0]]))).all()
    assert specialisation(np.array([[0, 5], [0, 5]])) == pytest.approx(np.zeros((2, 2)))


def test_a_long_domain_weighs_no_more_than_a_short_one():
    few, many = np.array([[30, 10], [10, 30]]), np.array([[30_000, 10_000], [10, 30]])
    assert specialisation(few) == pytest.approx(specialisation(many), abs=0.05)


def test_the_statistic_by_hand():
    """Means 2 and 8, sums of squares 2 and 8 within, variance 10/3, standard error sqrt(10/3 * (1/2 + 1/3)) = 5/3."""
    values = np.array([[1.0], [3.0], [6.0], [8.0], [10.0]])
    found = contrasts(values, np.array([0, 0, 1, 1, 1]), 2)
    assert found == pytest.approx(np.array([[-3.6], [3.6]]))


def test_the_statistic_of_three_domains_by_hand():
    """Means 0, 4 and 8, variance 6 / 3 = 2; the first domain against (4 + 8) / 2, error sqrt(2 * (1/2 + (1/2 + 1/2) / 4))."""
    values = np.array([[-1.0], [1.0], [3.0], [5.0], [7.0], [9.0]])
    found = contrasts(values, np.array([0, 0, 1, 1, 2, 2]), 3)
    assert found[:, 0] == pytest.approx([-6 / 1.5**0.5, 0, 6 / 1.5**0.5])


def test_cells_without_variance_give_no_nan():
    values = np.array([[0.5, 0.1], [0.5, 0.1], [0.5, 0.9], [0.5, 0.9]])
    found = contrasts(values, np.array([0, 0, 1, 1]), 2)
    assert found.tolist() == [[0.0, -np.inf], [0.0, np.inf]]


def test_p_values_equal_those_of_all_permutations():
    """With 3 and 3 units, all 20 labellings can be counted; the sampled share lies within 4 standard errors."""
    random = np.random.default_rng(1)
    values, labels = random.normal(size=(6, 3)), np.array([0, 0, 0, 1, 1, 1])
    values[:3, 0] += 3
    observed = np.abs(contrasts(values, labels, 2))
    orders = sorted(set(permutations(labels.tolist())))
    largest = np.array([np.abs(contrasts(values, np.array(order), 2)).max() for order in orders])
    exact = (largest[:, None, None] >= observed - 1e-9).mean(axis=0)
    assert len(orders) == 20
    assert adjusted_p_values(values, labels, seed=0) == pytest.approx(exact, abs=4 * 0.5 / 999**0.5)
    assert exact.min() >= 2 / 20


def noise(seed: int, documents: int = 24, experts: tuple[int, ...] = (8, 8, 4)) -> list[np.ndarray]:
    """Returns loads of documents that each have their own topic, so that the tokens of one document are alike."""
    random = np.random.default_rng(seed)
    loads = []
    for count in experts:
        share = random.dirichlet(np.full(count, 3.0), size=documents)
        loads.append(np.array([random.multinomial(512, row) for row in share]))
    return loads


def chi_squares(load: np.ndarray) -> np.ndarray:
    """Returns the squared Pearson residual of each cell, which is chi-square of one degree if tokens are independent."""
    expected = load.sum(axis=1, keepdims=True) * load.sum(axis=0) / load.sum()
    return (load - expected) ** 2 / expected


def test_documents_in_fake_domains_are_told_from_specialisation():
    """A false finding is allowed in 5 % of the runs; counting tokens as independent finds something in each run."""
    labels, found, naive = np.repeat([0, 1, 2], 8), 0, 0
    for seed in range(20):
        loads = noise(seed)
        found += any(cells.any() for cells in significant_cells(loads, labels, seed))
        by_domain = [np.stack([load[labels == domain].sum(axis=0) for domain in range(3)]) for load in loads]
        bonferroni = 3.5**2  # two-sided 0.05 over 60 cells, in squared standard deviations
        naive += any((chi_squares(load) > bonferroni).any() for load in by_domain)
    assert found <= 3  # of 20 runs at 5 %, more than 3 have a chance of 1.6 %
    assert naive == 20


def test_one_document_cut_at_random_is_no_specialisation():
    found = 0
    for seed in range(20):
        random = np.random.default_rng(seed)
        loads = [random.multinomial(512, np.full(16, 1 / 16), size=20) for _ in range(4)]
        found += any(
            cells.any() for cells in significant_cells(loads, random.permutation(np.repeat([0, 1], 10)), seed)
        )
    assert found <= 3


def test_a_planted_preference_is_found_and_no_other():
    """Expert 2 of the second layer takes a third of its tokens more in domain 1, at the cost of all the others."""
    labels, found, others = np.repeat([0, 1, 2], 12), 0, 0
    for seed in range(10):
        random = np.random.default_rng(seed)
        loads = [random.multinomial(512, np.full(8, 1 / 8), size=36) for _ in range(3)]
        loads[1][12:24, 2] += 60
        cells = significant_cells(loads, labels, seed)
        found += cells[1][1, 2]
        others += sum(layer.any() for layer in (cells[0], cells[2]))
    assert found == 10
    assert others <= 2


def test_an_expert_of_one_domain_is_found_among_many_cells():
    """An expert that only one domain uses stands out of 16 layers of 64 experts, although each domain has 6 texts."""
    random = np.random.default_rng(0)
    loads = [random.multinomial(512, np.full(64, 1 / 64), size=18) for _ in range(16)]
    loads[3][:, 5] = 0
    loads[3][:6, 5] = 40
    cells = significant_cells(loads, np.repeat([0, 1, 2], 6))
    assert cells[3][0, 5]
    assert sum(layer[:, :5].sum() for layer in cells) == 0


def test_too_little_text_is_never_significant():
    loads = [np.array([[9, 0], [0, 9], [0, 9]])]
    assert not significant_cells(loads, np.array([0, 1, 1]))[0].any()
    (alone,) = significant_cells(loads, np.array([0, 0, 0]))
    assert alone.shape == (1, 2)
    assert not alone.any()


def test_how_much_text_is_too_little():
    """With 3 and 3 units there are 20 labellings, of which 2 are extreme; with 4 and 4 there are 70."""
    assert is_too_little([3, 3])
    assert not is_too_little([4, 4])
    assert is_too_little([2, 2, 1])
    assert not is_too_little([2, 2, 2])
    assert is_too_little([500])


def test_many_domains_of_much_text_are_not_too_little():
    """The number of labellings of 12 times 64 units is larger than any float."""
    assert not is_too_little([64] * 12)
    assert is_too_little([64, 0])
