"""These tests read experts from stand-ins for vLLM's outputs, which have the attributes and arrays of vLLM's own."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from modeling_moe.replay import RoutingStore, replay_routing
from tests.replay.test_replay import chosen, model_of, texts


def output_of(model, ids: torch.Tensor, prompt: int, *, dense_layers: bool = False, dtype=np.uint8, answers: int = 1):
    """Returns the output of vLLM for texts (answers, S) that begin with one prompt, as the model itself chooses."""
    rows = []
    for row in ids[:answers]:
        index = torch.stack(chosen(model, input_ids=row[None]), dim=1)[:-1].numpy()
        if dense_layers:
            # vLLM's buffer has a row for each decoder layer, with zeros for the dense ones
            index = np.concatenate([np.zeros_like(index[:, :1]), index], axis=1)
        rows.append(index.astype(dtype))
    return SimpleNamespace(
        prompt_token_ids=ids[0, :prompt].tolist(),
        outputs=[
            SimpleNamespace(token_ids=tuple(row[prompt:].tolist()), routed_experts=experts)
            for row, experts in zip(ids[:answers], rows, strict=True)
        ],
    )


def same_prompt(rows: int, prompt: int) -> torch.Tensor:
    ids = texts(rows)
    ids[:, :prompt] = ids[0, :prompt]
    return ids


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32])
@pytest.mark.parametrize(
    ("name", "dense_layers"), [("mixtral", False), ("deepseek_v3", True), ("deepseek_v3", False), ("moe", False)]
)
def test_answers_of_vllm_are_replayed(name, dense_layers, dtype):
    model, other, ids = model_of(name), model_of(name, seed=5), same_prompt(2, 4)
    store = RoutingStore()
    store.add_output(output_of(model, ids, 4, dense_layers=dense_layers, dtype=dtype, answers=2), other)
    assert len(store) == 2
    with replay_routing(other, store) as replay:
        got = chosen(other, input_ids=ids)
        assert replay.figures().coverage == pytest.approx(10 / 11)
    for mine, theirs in zip(chosen(model, input_ids=ids), got, strict=True):
        mine, theirs = mine.view(2, 11, -1)[:, :-1], theirs.view(2, 11, -1)[:, :-1]
        assert torch.equal(mine.long(), theirs.long())


def test_the_prompt_of_release_21_is_joined_and_its_cached_tokens_choose_by_themselves():
    model, ids = model_of("mixtral"), texts(1)
    output, store = output_of(model, ids, 4, dtype=np.int16), RoutingStore()
    (answer,) = output.outputs
    output.prompt_routed_experts, answer.routed_experts = answer.routed_experts[:4].copy(), answer.routed_experts[4:]
    output.prompt_routed_experts[:3] = -1
    store.add_output(output, model)
    with replay_routing(model, store) as replay:
        model(ids, use_cache=False)
        assert replay.figures() == (pytest.approx(7 / 11), 0)


def test_what_does_not_fit_is_refused_and_nothing_is_kept():
    model, ids, store = model_of("deepseek_v3"), same_prompt(2, 4), RoutingStore()

    def refused(message: str, change) -> None:
        output = output_of(model, ids, 4, answers=2)
        answer = output.outputs[1]
        answer.routed_experts = change(answer.routed_experts)
        with pytest.raises(ValueError, match=message):
            store.add_output(output, model)
        assert len(store) == 0

    refused("enable_return_routed_experts=True", lambda experts: None)
    refused("8 tokens for a text of 11 tokens", lambda experts: experts[2:])
    refused("3 layers for a model with 1 routers in 2 layers", lambda experts: experts.repeat(3, axis=1))
    refused("expert 9 for a model with 6 experts", lambda experts: np.full_like(experts, 9))
