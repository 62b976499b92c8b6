"""These tests check the texts that Python's standard library makes."""

from itertools import combinations

from experiments.text_domains import DOMAINS, SIZE, domain_bytes


def test_every_domain_has_its_size_and_none_is_another():
    texts = {}
    for domain in DOMAINS:
        training, held_out = domain_bytes(domain)
        assert len(training) + len(held_out) == SIZE
        assert len(training) == 3 * len(held_out)
        assert bytes(domain_bytes(domain)[0]) == bytes(training)
        texts[domain] = {bytes(training[start : start + 64]) for start in range(0, len(training), 64)}
    for one, other in combinations(DOMAINS, 2):
        assert len(texts[one] & texts[other]) < 10, (one, other)
