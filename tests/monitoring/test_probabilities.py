"""These tests find the scoring function of routers whose function is known."""

from unittest import mock

import pytest
import torch
from torch import nn

from modeling_moe.monitoring.probabilities import (
    COARSE_TOLERANCE,
    GIVEN,
    SCORINGS,
    ScoringEvidence,
    differences,
    explanation,
    probabilities,
)
from modeling_moe.router import SCORING_FUNCS


LOGITS = torch.randn(200, 12, generator=torch.Generator().manual_seed(0))


def scores(scoring: str, logits: torch.Tensor) -> torch.Tensor:
    return logits.softmax(dim=-1) if scoring == GIVEN else SCORING_FUNCS[scoring](logits)[0]


def evidence(
    scoring, top_k, normalise=False, factor=1.0, dtype=torch.float32, logits=LOGITS, bias=0.0
) -> ScoringEvidence:
    """Returns the evidence of a router that chooses by its scores and a bias."""
    value = scores(scoring, logits)
    index = (value + bias).topk(top_k, dim=-1).indices
    weight = value.gather(-1, index)
    weight = (weight / weight.sum(dim=-1, keepdim=True) if normalise else weight) * factor
    found = ScoringEvidence(top_k, torch.zeros((), dtype=torch.float64))
    returned = value if scoring == GIVEN else logits
    found.add(returned.to(dtype), index, weight.to(dtype), None)
    return found


def explained(found: ScoringEvidence, configured: str | None = None):
    return explanation(found.sums, found.top_k, found.coarse, configured)


@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("top_k", [1, 2, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_scoring_function_is_found(scoring, top_k, dtype):
    for normalise in {False, top_k > 1}:
        found = evidence(scoring, top_k, normalise, factor=2.5, dtype=dtype, bias=torch.linspace(0, 0.1, 12))
        assert found.settled() == scoring
        assert explained(found) == (scoring, None)


def test_a_few_tokens_settle_nothing():
    found = evidence("softmax", 2, logits=LOGITS[:100])
    assert found.settled() is None
    assert explained(found).scoring == "softmax"


def test_the_softmax_of_the_chosen_logits_is_a_softmax():
    best = LOGITS.topk(4, dim=-1)
    found = ScoringEvidence(4, torch.zeros((), dtype=torch.float64))
    found.add(LOGITS, best.indices, best.values.softmax(dim=-1), None)
    assert explained(found).scoring == "softmax"


def test_probabilities_stay_probabilities_whatever_scales_the_experts():
    value = LOGITS.softmax(dim=-1)
    best = value.topk(2, dim=-1)
    found = ScoringEvidence(2, torch.zeros((), dtype=torch.float64))
    found.add(value, best.indices, best.values * torch.rand(12)[best.indices], None)
    assert explained(found).scoring == GIVEN


def test_weights_that_nothing_explains_are_said():
    best = LOGITS.topk(2, dim=-1)
    found = ScoringEvidence(2, torch.zeros((), dtype=torch.float64))
    found.add(LOGITS, best.indices, best.values.abs() ** 3, None)
    scoring, reason = explained(found, "softmax")
    assert found.settled() is None
    assert scoring is None
    assert reason.startswith("neither softmax nor sigmoid nor sqrt(softplus)")


def test_one_constant_weight_tells_nothing_and_the_configuration_decides():
    found = ScoringEvidence(1, torch.zeros((), dtype=torch.float64))
    found.add(LOGITS, LOGITS.argmax(dim=-1, keepdim=True), torch.ones(200, 1), None)
    assert explained(found).scoring is None
    assert "constant" in explained(found).reason
    assert explained(found, "sigmoid") == ("sigmoid", None)


def test_equal_logits_settle_nothing_and_all_explain():
    found = evidence("sigmoid", 2, logits=torch.zeros(9, 12))
    assert found.settled() is None
    assert explained(found, "sigmoid").scoring == "sigmoid"
    assert explained(found).scoring in SCORINGS


def test_nothing_is_known_without_tokens():
    found = ScoringEvidence(2, torch.zeros((), dtype=torch.float64))
    assert differences(found.sums, 2) == {}
    assert explained(found).reason == "no token has a combine weight"


def test_padding_and_empty_assignments_are_left_out():
    value = LOGITS.sigmoid()
    index = value.topk(3, dim=-1).indices
    weight = value.gather(-1, index)
    index[:, 2], weight[:, 2] = 12, 0.0
    real = torch.arange(200) % 3 > 0
    logits = LOGITS.masked_fill(~real[:, None], torch.nan)
    found = ScoringEvidence(3, torch.zeros((), dtype=torch.float64))
    found.add(logits, index, weight.masked_fill(~real[:, None], torch.nan), real)
    assert found.sums.isfinite().all()
    assert explained(found).scoring == "sigmoid"
    assert found.sums[-1, 0] == real.sum()


@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_probabilities_sum_to_one(scoring, dtype):
    value = scores(scoring, LOGITS.double())
    given = (value if scoring == GIVEN else LOGITS).to(dtype)
    found = probabilities(given, scoring)
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(found.sum(dim=-1), torch.ones_like(found[:, 0]))
    tolerance = COARSE_TOLERANCE if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(found.double(), value / value.sum(dim=-1, keepdim=True), atol=tolerance, rtol=tolerance)


def test_large_logits_overflow_nothing():
    found = evidence("softmax", 2, logits=nn.functional.one_hot(torch.arange(12), 12) * 1e4)
    assert found.sums.isfinite().all()
    assert explained(found).scoring == "softmax"


def test_the_evidence_of_an_accelerator_is_read_when_its_copy_has_arrived():
    found = evidence("sigmoid", 2)
    arrived = mock.Mock(query=mock.Mock(side_effect=[False, True]))
    with mock.patch("torch.cuda.Event", return_value=arrived), mock.patch("torch.cuda.current_stream"):
        for expected in (None, None, "sigmoid"):
            found._settle_on_cuda()
            assert found._settled == expected
    arrived.record.assert_called_once()
