"""These tests check the measurements on text: the networks' true inputs, routers that separate domains, groups of
neurons.
"""

import datasets
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models import gemma2, gpt2, gpt_neox, llama, mixtral, olmo2, opt

from modeling_moe import MoEForCausalLM
from modeling_moe.upcycling.calibration import (
    MEASURED_ROUTERS,
    LayerInputs,
    collect_inputs,
    group_neurons,
    logit_std,
    measure,
)
from modeling_moe.upcycling.options import UpcyclingOptions
from modeling_moe.utils.errors import UserError
from tests.builders import SHAPE, tiny_config, train_tokenizer


# feed-forward networks
FIRST, SECOND = ("mlp", 0), ("mlp", 1)
SIZE = SHAPE | {"vocab_size": 300}
GPT2 = {
    "vocab_size": 300,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
NEOX = {name: SIZE[name] for name in SIZE if name != "num_key_value_heads"}
# model -> configuration, and name of the norm before the feed-forward network
MODELS = {
    "llama": (llama.LlamaConfig(**SIZE), "post_attention_layernorm"),
    "gemma2": (gemma2.Gemma2Config(**SIZE, head_dim=8), "pre_feedforward_layernorm"),
    "gpt2": (gpt2.GPT2Config(**GPT2), "ln_2"),
    "gpt_neox": (gpt_neox.GPTNeoXConfig(**NEOX), "post_attention_layernorm"),
    "mixtral": (mixtral.MixtralConfig(**SIZE, num_local_experts=4), "post_attention_layernorm"),
    "ours": (tiny_config(vocab_size=300), "post_attention_layernorm"),
}
TEXTS = {"german": "der Weg führt über die Brücke. ", "english": "to the old mill, the mill to old. "}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer()


def source(config):
    return (MoEForCausalLM(config) if config.model_type == "moe" else AutoModelForCausalLM.from_config(config)).eval()


def documents(**texts: str) -> dict[str, datasets.Dataset]:
    return {name: datasets.Dataset.from_dict({"text": [text]}) for name, text in texts.items()}


def domains(*names: str, times: int = 100) -> dict[str, datasets.Dataset]:
    return documents(**{name: TEXTS[name] * times for name in names or TEXTS})


def upcycled_config(**fields):
    fields = {"num_experts": 4, "num_hidden_layers": 2, "mlp_layer_types": ["sparse"] * 2, "vocab_size": 300} | fields
    return tiny_config(**fields)


def measured(model, tokenizer, texts=None, config=None, **options):
    options = UpcyclingOptions(**({"num_experts": 4, "calibration_tokens": 150} | options))
    config = config or upcycled_config(num_experts=options.num_experts)
    return measure(model, tokenizer, texts or domains(), config, options)


@pytest.mark.parametrize("name", MODELS)
def test_the_input_is_what_the_norm_after_attention_puts_out(name, tokenizer):
    config, norm = MODELS[name]
    model = source(config)
    layer = (model.transformer.h if name == "gpt2" else model.base_model.layers)[1]
    got = collect_inputs(model, tokenizer, domains(), 150, [SECOND], seed=0, gram=True)[SECOND]

    seen, entered = [], []
    getattr(layer, norm).register_forward_hook(lambda module, args, output: seen.append(output[0]))
    layer.register_forward_pre_hook(lambda module, args: entered.append(args[0][0]))
    for text in TEXTS.values():
        # the model's context is 64 tokens
        for block in tokenizer(text * 100, return_tensors="pt").input_ids[0, :150].split(64):
            with torch.no_grad():
                model(block[None])
    states = torch.cat([state[1:] for state in seen])
    by_domain = states.view(2, 147, -1).double()
    assert torch.equal(got.sample, states)
    torch.testing.assert_close(got.means, by_domain.mean(dim=1))
    torch.testing.assert_close(got.gram, states.double().T @ states.double())
    assert (torch.cat([state[1:] for state in entered]) - states).abs().max() > 0.1


@pytest.mark.parametrize("name", MODELS)
def test_the_input_of_attention_is_what_the_norm_before_it_puts_out(name, tokenizer):
    model = source(MODELS[name][0])
    layer = (model.transformer.h if name == "gpt2" else model.base_model.layers)[1]
    place = ("self_attn", 1)
    got = collect_inputs(model, tokenizer, domains(), 150, [SECOND, place], seed=0)
    seen = []
    norm = layer.ln_1 if name == "gpt2" else layer.input_layernorm
    norm.register_forward_hook(lambda module, args, output: seen.append(output[0, 1:]))
    with torch.no_grad():
        for text in TEXTS.values():
            for block in tokenizer(text * 100, return_tensors="pt").input_ids[0, :150].split(64):
                model(block[None])
    assert torch.equal(got[place].sample, torch.cat(seen))
    assert got[SECOND].sample.shape == got[place].sample.shape
    # the two norms of GPT-NeoX read one input, and new norms have equal weights
    assert torch.equal(got[SECOND].sample, got[place].sample) == (name == "gpt_neox")


def test_a_network_without_norm_before_it_is_found(tokenizer):
    model = source(olmo2.Olmo2Config(**SIZE))
    got = collect_inputs(model, tokenizer, domains(), 60, [FIRST], seed=0)[FIRST]
    seen = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0][0, 1:]))
    with torch.no_grad():
        for text in TEXTS.values():
            model(tokenizer(text * 100, return_tensors="pt").input_ids[:, :60])
    assert torch.equal(got.sample, torch.cat(seen))


def test_the_sample_is_of_the_same_tokens_in_all_layers_and_seeded(tokenizer):
    model = source(MODELS["llama"][0])
    full = collect_inputs(model, tokenizer, domains(), 100, [FIRST, SECOND], seed=0)
    some = collect_inputs(model, tokenizer, domains(), 100, [FIRST, SECOND], seed=0, samples=20)
    other = collect_inputs(model, tokenizer, domains(), 100, [FIRST, SECOND], seed=1, samples=20)
    where = [(some[i].sample[:, None] == full[i].sample).all(dim=-1) for i in (FIRST, SECOND)]
    assert some[FIRST].sample.shape == (20, 32)
    assert where[0].any(dim=1).all()
    assert (where[0] & where[1]).any(dim=1).all()
    assert torch.equal(some[FIRST].means, full[FIRST].means)
    assert not torch.equal(some[FIRST].sample, other[FIRST].sample)
    assert all(not module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
def test_active_neurons_are_the_largest_at_the_down_projection(name, tokenizer):
    model = source(MODELS[name][0])
    got = collect_inputs(model, tokenizer, domains(), 60, [SECOND], seed=0, neurons=True)[SECOND]
    with torch.no_grad():
        if name == "llama":
            mlp = model.model.layers[1].mlp
            neurons = mlp.act_fn(mlp.gate_proj(got.sample)) * mlp.up_proj(got.sample)
        elif name == "gpt2":
            mlp = model.transformer.h[1].mlp
            neurons = mlp.act(mlp.c_fc(got.sample))
        else:
            mlp = model.gpt_neox.layers[1].mlp
            neurons = mlp.act(mlp.dense_h_to_4h(got.sample))
    share = round(0.1 * neurons.shape[1])
    assert (got.active.sum(dim=1) == share).all()
    smallest = neurons.abs().where(got.active, torch.inf).amin(dim=1)
    assert (smallest >= neurons.abs().where(~got.active, 0.0).amax(dim=1) - 1e-5).all()


def synthetic(num_domains: int, hidden: int = 48, tokens: int = 200) -> tuple[LayerInputs, torch.Tensor, torch.Tensor]:
    """Returns inputs of domains, each with a direction of its domain and a shared vector, of unequal lengths; and
    new inputs.
    """
    shared, directions = 2 * torch.randn(hidden), torch.randn(num_domains, hidden)
    lengths = torch.linspace(1.0, 1.5, num_domains)[:, None, None]

    def draw():
        states = shared + directions[:, None] + 0.5 * torch.randn(num_domains, tokens, hidden)
        return lengths * states * (0.8 + 0.4 * torch.rand(num_domains, tokens, 1))

    states = draw()
    flat = states.flatten(0, 1)
    inputs = LayerInputs(states.double().mean(dim=1), flat, flat.double().T @ flat.double())
    return inputs, draw().flatten(0, 1), torch.arange(num_domains).repeat_interleave(tokens)


@pytest.mark.parametrize("init", MEASURED_ROUTERS)
def test_domains_that_differ_are_told_apart(init):
    inputs, states, domain = synthetic(4)
    rows = MEASURED_ROUTERS[init](inputs, FIRST, UpcyclingOptions(num_experts=4)).float()
    chosen = (states @ rows.T).argmax(dim=1)
    if init == "kmeans":
        # the order of clusters is arbitrary
        chosen = torch.stack([chosen[domain == d].mode().values for d in range(4)]).argsort()[chosen]
    assert (chosen == domain).float().mean() > 0.9


@pytest.mark.parametrize("init", ["text", "ridge"])
def test_replicas_of_a_domain_share_it(init):
    inputs, states, domain = synthetic(2)
    rows = MEASURED_ROUTERS[init](inputs, FIRST, UpcyclingOptions(num_experts=12, granularity=2)).float()
    assert rows.shape == (6, 48)
    chosen = (states @ rows.T).argmax(dim=1)
    assert (chosen // 3 == domain).float().mean() > 0.9
    assert len(chosen.unique()) > 2
    other_layer = MEASURED_ROUTERS[init](inputs, SECOND, UpcyclingOptions(num_experts=12, granularity=2)).float()
    assert not torch.equal(rows, other_layer)


def test_the_largest_logit_is_that_of_the_nearest_centroid():
    inputs, states, _ = synthetic(4)
    rows = MEASURED_ROUTERS["kmeans"](inputs, FIRST, UpcyclingOptions(num_experts=7))
    torch.testing.assert_close(rows.sum(dim=0), torch.zeros(48), atol=1e-6, rtol=0)
    # the centroid of the points that choose a row equals that row
    directions = torch.nn.functional.normalize(inputs.sample)
    chosen = (inputs.sample @ rows.T).argmax(dim=1)
    means = torch.stack([directions[chosen == r].mean(dim=0) for r in range(7)])
    centroids = torch.nn.functional.normalize(means)
    torch.testing.assert_close(rows, centroids - centroids.mean(dim=0), atol=1e-5, rtol=0)
    nearest = torch.cdist(torch.nn.functional.normalize(states), centroids).argmin(dim=1)
    assert ((states @ rows.T).argmax(dim=1) == nearest).float().mean() > 0.999


@pytest.mark.parametrize("ridge_lambda", [1e-3, 1.0])
def test_ridge_is_regularised_least_squares(ridge_lambda):
    inputs, _, domain = synthetic(3)
    rows = MEASURED_ROUTERS["ridge"](inputs, FIRST, UpcyclingOptions(num_experts=3, ridge_lambda=ridge_lambda))
    states = inputs.sample.double().numpy()
    penalty = np.sqrt(ridge_lambda * (states**2).sum() / 48) * np.eye(48)
    targets = np.eye(3)[domain.numpy()] - 1 / 3
    expected = np.linalg.lstsq(np.vstack([states, penalty]), np.vstack([targets, np.zeros((48, 3))]), rcond=None)[0]
    # 200 tokens of each domain
    np.testing.assert_allclose(200 * rows.numpy(), expected.T, atol=1e-6)


@pytest.mark.parametrize("init", MEASURED_ROUTERS)
def test_measured_logits_have_the_deviation_asked_for(init, tokenizer):
    model = source(MODELS["llama"][0])
    got = measured(model, tokenizer, router_init=init, router_logit_std=0.7, seed=3)
    inputs = collect_inputs(model, tokenizer, domains(), 150, [FIRST, SECOND], seed=3)
    assert set(got) == {"layers.0.router", "layers.1.router"}
    for (_, layer), seen in inputs.items():
        rows = got[f"layers.{layer}.router"]
        assert (rows.shape, rows.dtype) == ((4, 32), torch.float32)
        logits = (seen.sample.double() @ rows.double().T).numpy()
        assert np.std(logits, axis=1).mean() == pytest.approx(0.7, rel=1e-4)
        assert logit_std(rows.repeat_interleave(2, dim=0), seen.sample) == pytest.approx(0.7, rel=1e-4)
    again = measured(model, tokenizer, router_init=init, router_logit_std=0.7, seed=3)
    other = measured(model, tokenizer, router_init=init, router_logit_std=0.7, seed=4)
    assert all(torch.equal(got[name], again[name]) for name in got)
    assert not any(torch.equal(got[name], other[name]) for name in got)


@pytest.mark.parametrize("init", ["text", "ridge"])
def test_held_out_text_is_sent_to_its_domain(init, tokenizer):
    model = source(MODELS["llama"][0])
    rows = measured(model, tokenizer, router_init=init, calibration_tokens=600)["layers.1.router"]
    new = documents(german="die Brücke führt über der Weg. " * 40, english="old mill the to the, the old mill. " * 40)
    seen = collect_inputs(model, tokenizer, new, 150, [SECOND], seed=0)[SECOND].sample
    domain = torch.arange(2).repeat_interleave(len(seen) // 2)
    assert ((seen @ rows.T).argmax(dim=1) // 2 == domain).float().mean() > 0.9


def test_only_sparse_layers_of_the_result_are_measured(tokenizer):
    config = upcycled_config(mlp_layer_types=["dense", "sparse"])
    model = source(MODELS["llama"][0])
    assert set(measured(model, tokenizer, config=config, router_init="text")) == {"layers.1.router"}
    assert measured(model, tokenizer, router_init="random") == {}


def test_neurons_that_fire_together_are_grouped():
    together = torch.rand(500, 6) < 0.1
    planted = torch.randperm(6 * 20) % 6
    active = together[:, planted] & (torch.rand(500, 120) < 0.7) | (torch.rand(500, 120) < 0.02)
    neurons = group_neurons(active, 6, torch.Generator().manual_seed(0))
    assert torch.equal(neurons.sort().values, torch.arange(120))
    assert (planted[neurons].view(6, 20) == planted[neurons].view(6, 20)[:, :1]).all()


def test_clustered_split_is_measured(tokenizer):
    model = source(MODELS["llama"][0])
    options = {"method": "split", "split": "clustered", "router_init": "kmeans"}
    got = measured(model, tokenizer, **options)
    assert set(got) == {f"layers.{i}.{name}" for i in (0, 1) for name in ("router", "neurons")}
    assert got["layers.0.neurons"].dtype == torch.int64
    assert got["layers.0.neurons"].sort().values.tolist() == list(range(40))
    again = measured(model, tokenizer, **options)
    assert torch.equal(got["layers.1.neurons"], again["layers.1.neurons"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"router_init": "kmeans", "calibration_tokens": 100_000},
            "100000, but domain 'german' of calibration_data has",
        ),
        ({"router_init": "kmeans", "calibration_tokens": 1}, "calibration_tokens is 1: it must be at least 2"),
        (
            {"router_init": "kmeans", "calibration_tokens": 2},
            "calibration_tokens is 2: 2 inputs do not make 4 k-means",
        ),
        (
            {"router_init": "text", "num_experts": 3},
            "calibration_data has 2 domain.* needs at least 2, of which num_exp",
        ),
        (
            {"router_init": "kmeans", "granularity": 4, "num_experts_per_tok": 4},
            "finds no difference .* in layer 0: .* at least 2 replicas",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_measured_is_refused(options, message, tokenizer):
    with pytest.raises(UserError, match=message):
        measured(source(MODELS["llama"][0]), tokenizer, **options)


def test_domains_that_tell_nothing_are_refused(tokenizer):
    model = source(MODELS["llama"][0])
    with pytest.raises(UserError, match=r"calibration_data has 1 domain"):
        measured(model, tokenizer, domains("german"), router_init="ridge")
    text = TEXTS["german"] * 40
    with pytest.raises(UserError, match=r"'text' finds no difference .* whose domains differ"):
        measured(model, tokenizer, documents(one=text, two=text), router_init="text")


def test_models_without_the_networks_are_refused(tokenizer):
    sizes = {"vocab_size": 300, "hidden_size": 32, "ffn_dim": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
    with pytest.raises(UserError, match="cannot be used with this opt model"):
        measured(source(opt.OPTConfig(**sizes, word_embed_proj_dim=32)), tokenizer, router_init="text")
    with pytest.raises(UserError, match="split 'clustered' needs a dense network in layer 0"):
        measured(source(MODELS["mixtral"][0]), tokenizer, method="split", split="clustered")
