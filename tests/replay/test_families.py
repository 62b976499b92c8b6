"""This test replays recorded experts in every causal LM with experts of the installed transformers."""

from contextlib import nullcontext

import pytest
import torch

from modeling_moe.monitoring import UnreachableRouting, observe
from modeling_moe.replay import record_routing, replay_routing
from tests.training.families import families, tiny


CHOOSES_WHILE_IT_WEIGHS = {"phimoe"}


@pytest.mark.slow
@pytest.mark.parametrize("family", families())
def test_each_family_uses_the_recorded_experts(family):
    try:
        model = tiny(family).eval()
        recording = record_routing(model)
    except UnreachableRouting as error:
        pytest.skip(str(error))
    other = tiny(family).eval()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.3 * parameter.std() * torch.randn_like(parameter) if parameter.numel() > 1 else 0
    refused = family in CHOOSES_WHILE_IT_WEIGHS
    outcome = pytest.raises(ValueError, match="cannot be replayed") if refused else nullcontext()
    ids, mine, theirs = torch.randint(3, 60, (2, 9)), [], []
    with recording as recorder, torch.no_grad(), observe(model, lambda event: mine.append(event.index.clone())):
        model(ids, use_cache=False)
    with (
        outcome,
        replay_routing(other, recorder.store) as replay,
        observe(other, lambda event: theirs.append(event.index.clone())),
    ):
        other(ids, use_cache=False).logits.sum().backward()
    if refused:
        return
    assert replay.figures().coverage == 1
    for one, two in zip(mine, theirs, strict=True):
        assert torch.equal(one.long(), two.long())
