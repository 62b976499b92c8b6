"""The causal Routing Transformer attends to the nearest centroid's keys, and the controller moves centroids by k-means."""

import pytest
import torch
from transformers.cache_utils import StaticCache

from modeling_moe import MoEForCausalLM
from modeling_moe.attention_routing_transformer import cluster_mask, routing_vectors
from modeling_moe.router import RoutingContext
from tests.builders import tiny_config
from tests.core.attention_variants import (
    LENGTH,
    ROWS,
    VARIANTS,
    assert_equal,
    attend,
    attention_of,
    heads_of,
    inputs_of,
    model_of,
)


HEADS, GROUPS, CLUSTERS = 4, 2, 3


def randomise_centroids(attention) -> None:
    torch.manual_seed(3)
    attention.gate.init_weights(0.02)
    centroids = attention.gate.centroids
    torch.testing.assert_close(centroids.norm(dim=-1), torch.ones(GROUPS, CLUSTERS, dtype=centroids.dtype))


def nearest(attention, states: torch.Tensor) -> list[list[list[int]]]:
    """Returns, for heads (B, S, heads, D), the number of the nearest centroid by Euclidean distance."""
    centroids, heads = attention.gate.centroids, states.shape[2]
    found = []
    for row in states.detach():
        found.append([])
        for token in row:
            of_token = []
            for head, vector in enumerate(token):
                vector = vector - vector.mean()
                distances = (vector / vector.norm() - centroids[head * GROUPS // heads]).norm(dim=-1)
                of_token.append(int(distances.argmin()))
            found[-1].append(of_token)
    return found


def allowed_keys(queries, keys, window: int | None) -> torch.Tensor:
    """Marks, token by token, the latest `window` keys of a query's cluster up to the query, and the query's own: (B, n, S, S)."""
    allowed = torch.zeros(ROWS, HEADS, LENGTH, LENGTH, dtype=torch.bool)
    for row in range(ROWS):
        for head in range(HEADS):
            for i in range(LENGTH):
                own = queries[row][i][head]
                same = [j for j in range(i + 1) if keys[row][j][head * GROUPS // HEADS] == own]
                same = same if window is None else same[len(same) - window :] if len(same) > window else same
                allowed[row, head, i, [*same, i]] = True
    return allowed


@pytest.mark.parametrize("window", [None, 1, 2])
@pytest.mark.parametrize("masked", [False, True])
def test_equals_attention_to_the_listed_keys(window, masked):
    attention = attention_of("routing_transformer", attention_cluster_window=window, qkv_bias=True)
    randomise_centroids(attention)
    arguments = inputs_of(attention, masked)
    x, rotary = arguments["hidden_states"], arguments["position_embeddings"]
    query, key, value = (proj(x) for proj in (attention.q_proj, attention.k_proj, attention.v_proj))
    queries, keys = nearest(attention, heads_of(query, HEADS)), nearest(attention, heads_of(key, GROUPS))
    allowed = allowed_keys(queries, keys, window)
    causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    assert not allowed[:, :, causal].all()  # the clusters exclude keys
    rotated = heads_of(query, HEADS, rotary), heads_of(key, GROUPS, rotary)
    attended = attend(*rotated, heads_of(value, GROUPS), allowed)
    assert_equal(attention, arguments, attention.o_proj(attended.flatten(2)))


def test_one_cluster_is_full_attention():
    fields = {"num_attention_heads": 4, "num_key_value_heads": 2}
    clustered = model_of("routing_transformer", attention_experts=1).double().eval()
    plain = MoEForCausalLM(tiny_config(**fields)).double().eval()
    missing = plain.load_state_dict(clustered.state_dict(), strict=False)
    assert not missing.missing_keys
    assert all("self_attn.gate" in name for name in missing.unexpected_keys)
    ids = torch.randint(3, 99, (2, 9))
    torch.testing.assert_close(clustered(ids).logits, plain(ids).logits, rtol=0, atol=1e-12)


def test_padding_is_in_no_window():
    """Keys at padding, in the middle of a row too, take no place among the latest keys of a cluster."""
    queries = torch.zeros(1, 1, 5, dtype=torch.long)
    keys = torch.tensor([[[0, 0, 1, 0, 0]]])  # cluster 1 of 1 is padding
    mask = cluster_mask(queries, keys, 1, window=2)[0, 0].tril()
    assert mask[4].tolist() == [False, False, False, True, True]
    assert mask[3].tolist() == [False, True, False, True, False]
    assert mask[2].tolist() == [True, True, True, False, False]


def test_the_controller_is_spherical_k_means():
    model = model_of("routing_transformer", router_ema_decay=0.9).double().train()
    model(torch.randint(3, 99, (2, 9)))
    model.update_routers()
    before = [layer.self_attn.gate.centroids.clone() for layer in model.model.layers]
    inputs: dict[int, torch.Tensor] = {}
    for number, layer in enumerate(model.model.layers):
        layer.self_attn.register_forward_hook(
            lambda _, __, kwargs, ___, number=number: inputs.__setitem__(number, kwargs["hidden_states"]),
            with_kwargs=True,
        )
    ids = torch.randint(3, 99, (2, 9), generator=torch.Generator().manual_seed(5))
    ids[0, 7:] = 0
    mask = (ids > 0).long()
    for part in (slice(0, 1), slice(1, 2)):  # two micro-batches
        model(ids[part], attention_mask=mask[part])
        for number in range(3):
            inputs[number, part.start] = inputs.pop(number)
    model.update_routers()
    for number, layer in enumerate(model.model.layers):
        attention = layer.self_attn
        sums = torch.zeros_like(before[number])
        for row in range(2):
            states = inputs[number, row]
            for proj, heads in ((attention.q_proj, HEADS), (attention.k_proj, GROUPS)):
                vectors = routing_vectors(heads_of(proj(states), heads))[0][mask[row] > 0]  # (tokens, heads, D)
                for head in range(heads):
                    group = head * GROUPS // heads
                    of_head = vectors[:, head]
                    best = torch.cdist(of_head, before[number][group]).argmin(dim=-1)
                    sums[group].index_add_(0, best, of_head)
        moved = 0.9 * before[number] + 0.1 * torch.nn.functional.normalize(sums, dim=-1)
        expected = torch.nn.functional.normalize(moved, dim=-1).where(sums.any(-1, keepdim=True), before[number])
        torch.testing.assert_close(attention.gate.centroids, expected, rtol=0, atol=1e-6)
        assert not torch.equal(attention.gate.centroids, before[number])


def test_centroids_stay_in_evaluation_and_are_fp32_and_saved(tmp_path):
    model = model_of("routing_transformer").to(torch.bfloat16).eval()
    ids = torch.randint(3, 99, (2, 9))
    gate = model.model.layers[1].self_attn.gate
    before = gate.centroids.clone()
    model(ids, output_router_logits=True)
    model.update_routers()
    assert torch.equal(gate.centroids, before)
    assert gate.centroids.dtype == torch.float32
    model.save_pretrained(tmp_path)
    loaded = MoEForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    assert torch.equal(loaded.model.layers[1].self_attn.gate.centroids, before)
    assert loaded.model.layers[1].self_attn.gate.centroids.dtype == torch.float32


def test_training_finds_clusters():
    """Tokens in four directions are put into four clusters, if the centroids begin among them."""
    attention = attention_of("routing_transformer", attention_experts=4, num_key_value_heads=4, router_ema_decay=0.5)
    torch.manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(4, 12, dtype=torch.float64), dim=-1)
    labels = torch.arange(400) % 4
    vectors = directions[labels] + 0.05 * torch.randn(400, 12, dtype=torch.float64)
    tokens = vectors[:, None].expand(-1, 8, -1).flatten(1)
    gate = attention.gate
    gate.centroids.copy_(torch.nn.functional.normalize(directions + 0.3 * torch.randn(4, 4, 12).double(), dim=-1))
    for _ in range(20):
        routing = gate(tokens)
        attention.controller.step_layer(gate, gate.cluster_sums(routing, None).flatten())
    found = (gate(tokens).index % 4)[:, 0]
    assert torch.equal(found, labels)
    means = routing_vectors(torch.stack([vectors[labels == label].mean(dim=0) for label in range(4)]))
    torch.testing.assert_close(gate.centroids[0], means, rtol=0, atol=1e-2)


def test_what_takes_no_mask_of_heads_is_refused():
    model = model_of("routing_transformer")
    ids = torch.randint(3, 99, (1, 5))
    with pytest.raises(ValueError, match="static cache"):
        model(ids, cache=StaticCache(config=model.config, max_cache_len=8))
    with pytest.raises(ValueError, match=r"continuous batching .* routed_attention='routing_transformer'"):
        model.config.refuse_continuous_batching()
    for implementation in ("flex_attention", "flash_attention_2"):
        with pytest.raises((ValueError, ImportError)):
            MoEForCausalLM._from_config(model.config, attn_implementation=implementation)
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="takes no mask for each head"):
        model.model.layers[0].self_attn(torch.zeros(1, 5, 32), None, None)


def test_eager_attention_equals_sdpa():
    model = model_of("routing_transformer", attention_cluster_window=2, sliding_window=4).eval()
    ids = torch.randint(3, 99, (2, 9))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    expected = model(ids, attention_mask=mask).logits
    model.set_attn_implementation("eager")
    outputs = model(ids, attention_mask=mask, output_attentions=True)
    torch.testing.assert_close(outputs.logits[mask > 0], expected[mask > 0], rtol=0, atol=1e-5)
    assert outputs.attentions[0].shape == (2, HEADS, 9, 9)


def test_routing_has_the_contract():
    attention = attention_of("routing_transformer")
    randomise_centroids(attention)
    chosen, routing = attention.route(torch.randn(5, (HEADS + GROUPS) * 12, dtype=torch.float64), RoutingContext())
    assert chosen is routing
    assert routing.logits.shape == routing.probs.shape == (5, 6 * CLUSTERS)
    assert routing.index.shape == routing.weight.shape == (5, 6)
    torch.testing.assert_close(routing.probs.sum(dim=-1), torch.ones(5, dtype=torch.float64))
    assert not routing.logits.requires_grad


def test_more_clusters_than_one_are_refused():
    with pytest.raises(ValueError, match=r"attention_experts_per_tok is 2: .* one cluster, set it to 1"):
        tiny_config(**(VARIANTS["routing_transformer"] | {"attention_experts_per_tok": 2}))
