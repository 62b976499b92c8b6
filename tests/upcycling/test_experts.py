"""These tests check the experts made from dense networks: equal functions where claimed, and the weights of each
method.
"""

import pytest
import torch

from modeling_moe import MoEForCausalLM
from modeling_moe.checkpoints import LazyTensor
from modeling_moe.upcycling import (
    METHODS,
    UpcyclingOptions,
    assemble,
    reason_not_exact,
    refuse_mismatch,
    sparse_config,
)
from modeling_moe.upcycling.experts import output_scale
from modeling_moe.utils.errors import UserError
from tests.builders import tiny_config


IDS = torch.randint(3, 99, (2, 11), generator=torch.Generator().manual_seed(3))
PLAIN = {"gated_mlp": False, "hidden_act": "gelu"}
WEIGHTS = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")


def dense_model(seed: int = 0, dtype: torch.dtype = torch.float64, **fields) -> MoEForCausalLM:
    torch.manual_seed(seed)
    model = MoEForCausalLM(tiny_config(**({"mlp_layer_types": ["dense"] * 3, "moe_intermediate_size": None} | fields)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.to(dtype).eval()


def lazy(model: MoEForCausalLM) -> dict[str, LazyTensor]:
    return {name: LazyTensor.of(tensor) for name, tensor in model.state_dict().items()}


def upcycled(*models: MoEForCausalLM, measured=None, config_fields=None, **options):
    """Returns the result's tensors on disk, the configuration and the options."""
    options = {"num_experts": 4, "num_experts_per_tok": 2, "router_std": 0.5} | options
    if len(models) > 1:
        options["sources"] = [f"source {i}" for i in range(1, len(models))]
    options = UpcyclingOptions(**options)
    config = sparse_config(models[0].config, options, models[0].dtype)
    for name, value in (config_fields or {}).items():
        setattr(config, name, value)
    state = assemble([lazy(model) for model in models], config, options, measured or {})
    assert all(tuple(tensor.read().shape) == tensor.shape for tensor in state.values())
    return {name: tensor.read() for name, tensor in state.items()}, config, options


def loaded(state, config) -> MoEForCausalLM:
    config._experts_implementation = "eager"
    model = MoEForCausalLM(config).to(state["model.norm.weight"].dtype)
    model.load_state_dict(state)
    return model.eval()


def network(model: MoEForCausalLM, layer: int) -> dict[str, torch.Tensor]:
    return model.model.layers[layer].mlp.state_dict()


def expert_of(state, layer: int, expert: int) -> dict[str, torch.Tensor]:
    prefix = f"model.layers.{layer}.mlp.experts.{expert}."
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


BIASES = {"mlp_bias": True}
GROUPS = {"num_experts": 12, "granularity": 4, "num_experts_per_tok": 8}
EIGHTHS = {"num_experts": 16, "granularity": 8, "num_experts_per_tok": 8}
FIFTHS = {"num_experts": 10, "granularity": 5, "num_experts_per_tok": 5}
ZERO = {"router_init": "zero"}
LOOSE = {"norm_topk_prob": False}
MEGATRON = {"scaling": "megatron"}


@pytest.mark.parametrize(
    ("options", "fields", "exact"),
    [
        *(({"num_experts_per_tok": top_k}, {}, True) for top_k in (1, 2, 3, 4)),
        *((groups, fields | BIASES, True) for groups in (GROUPS, EIGHTHS, FIFTHS) for fields in ({}, PLAIN)),
        (FIFTHS | {"num_experts_per_tok": 10}, {}, True),
        (GROUPS | {"num_experts_per_tok": 4}, BIASES, True),
        (FIFTHS, PLAIN | BIASES, True),
        (GROUPS | {"num_experts_per_tok": 7}, {}, False),
        (GROUPS | {"num_experts_per_tok": 3}, {}, False),
        # routers of zeros
        (ZERO, {}, True),
        ({"router_std": 0.0}, {}, True),
        (ZERO | LOOSE, BIASES, True),
        (ZERO | LOOSE | {"num_experts": 6}, PLAIN | BIASES, True),
        (ZERO | GROUPS | {"num_experts_per_tok": 12}, {}, True),
        # weights that are not renormalised
        (LOOSE, {}, False),
        (LOOSE | GROUPS, {}, False),
        (LOOSE | {"num_experts_per_tok": 4}, BIASES, True),
        (LOOSE | GROUPS | {"num_experts_per_tok": 12}, BIASES, True),
        ({"num_experts": 1, "num_experts_per_tok": 1, "norm_topk_prob": False}, {}, True),
        # scaling
        (MEGATRON, BIASES, True),
        ({"scaling": "none"}, BIASES, True),
        (MEGATRON | GROUPS, {}, False),
        (MEGATRON | GROUPS, PLAIN, False),
        (MEGATRON | GROUPS, {"gated_mlp": False, "hidden_act": "relu2", **BIASES}, True),
        (MEGATRON | GROUPS, {"gated_mlp": False, "hidden_act": "relu", **BIASES}, True),
        (MEGATRON | GROUPS, {"hidden_act": "relu", **BIASES}, True),
        (MEGATRON | GROUPS, {"hidden_act": "relu2"}, False),
        (MEGATRON | ZERO | LOOSE, {"gated_mlp": False, "hidden_act": "relu2"}, True),
        (MEGATRON | ZERO | LOOSE, {"gated_mlp": False, "hidden_act": "relu2", **BIASES}, False),
        ({"scaling": "none"} | GROUPS, {}, False),
        # the dense network as a shared expert
        *(({"shared_expert": True} | options, BIASES, True) for options in ({}, GROUPS, LOOSE, {"method": "split"})),
        ({"shared_expert": True, "method": "drop", "noise": 0.1, "noise_std": 0.1}, PLAIN | BIASES, True),
        # options that change the experts
        ({"noise": 0.1}, {}, False),
        ({"noise_std": 0.1}, {}, False),
        ({"method": "drop"}, {}, False),
        ({"method": "drop"} | GROUPS, BIASES, False),
        ({"method": "split"}, {}, False),
        ({"method": "split"} | ZERO, {}, False),
        ({"method": "split", "num_experts_per_tok": 4}, {}, False),
        ({"method": "split", "num_experts": 5, "num_experts_per_tok": 5} | ZERO, BIASES, True),
        ({"method": "split", "num_experts_per_tok": 4} | ZERO | LOOSE, PLAIN | BIASES, True),
        ({"method": "split", "num_experts_per_tok": 4, "scaling": "none"} | ZERO, {}, False),
        ({"method": "split", "num_experts": 1, "num_experts_per_tok": 1}, {}, True),
        # a subset of the layers
        ({"layers": "every:2"}, {}, True),
        ({"layers": "0,2", "noise": 0.1}, {}, False),
    ],
    ids=str,
)
def test_exact_where_it_says_so(options, fields, exact):
    # a dense configuration refuses fields of a router
    scaling = {name: value for name, value in fields.items() if name == "routed_scaling_factor"}
    dense = dense_model(**{name: value for name, value in fields.items() if name not in scaling})
    state, config, chosen = upcycled(dense, config_fields=scaling, **options)
    difference = (loaded(state, config)(IDS).logits - dense(IDS).logits).abs().max()
    if exact:
        assert reason_not_exact(chosen, config) is None
        assert difference < 1e-10
    else:
        assert reason_not_exact(chosen, config)
        assert difference > 1e-4


@pytest.mark.parametrize(
    ("options", "reasons"),
    [
        ({"noise": 0.1, "norm_topk_prob": False}, ["noise moves", "norm_topk_prob=False"]),
        (GROUPS | {"num_experts_per_tok": 6}, [r"num_experts_per_tok (6) is not a multiple of granularity (4)"]),
        (GROUPS | ZERO, ["replicas tie in the router"]),
        (
            GROUPS | {"router_init": "text", "router_std": 0.0, "calibration_data": ["a=file"]},
            ["replicas tie in the router"],
        ),
        (GROUPS | {"router_init": "text", "calibration_data": ["a=file"]}, []),
        ({"method": "drop", "drop_ratio": 0.25}, ["drop draws 25%"]),
        ({"method": "split"}, ["a token is sent to 2 of the 4 parts of the network (a scale of 2 gives"]),
        ({"method": "split", "num_experts_per_tok": 4}, ["unequally"]),
        (GROUPS | {"scaling": "none"}, ["scaling='none': the output is not multiplied by 4"]),
    ],
    ids=str,
)
def test_reasons(options, reasons):
    options = UpcyclingOptions(**({"num_experts": 4} | options))
    text = reason_not_exact(options, sparse_config(dense_model().config, options, torch.float64))
    found = text.split("; ") if text else []
    assert len(found) == len(reasons)
    assert all(reason in (text or "") for reason in reasons)


@pytest.mark.parametrize(
    ("options", "scale", "bias"),
    [
        # He et al.'s c = R * G**2 / T: R replicas, here 2 and 3
        (GROUPS | LOOSE, 3 * 16 / 8, 12 / 8),
        (EIGHTHS | LOOSE, 2 * 64 / 8, 2.0),
        (EIGHTHS, 8.0, 1.0),
        ({"num_experts_per_tok": 3} | LOOSE, 4 / 3, 4 / 3),
        ({"method": "split"}, 2.0, 1.0),
        ({"method": "split"} | LOOSE, 4.0, 2.0),
    ],
    ids=str,
)
def test_scales(options, scale, bias):
    options = UpcyclingOptions(**({"num_experts": 4} | options))
    assert output_scale(sparse_config(dense_model().config, options, torch.float64), options) == (scale, bias)


@pytest.mark.parametrize("gated", [True, False])
def test_powers_of_two_lose_nothing_in_bf16(gated):
    dense = dense_model(dtype=torch.bfloat16, gated_mlp=gated)
    state, _, _ = upcycled(dense, **EIGHTHS)
    mlp, width = network(dense, 1), 5
    up = 4 if gated else 1
    for expert in (0, 3, 11):
        block = slice(expert % 8 * width, (expert % 8 + 1) * width)
        made = expert_of(state, 1, expert)
        assert made["down_proj.weight"].dtype == torch.bfloat16
        assert torch.equal(made["down_proj.weight"] * (up / 8), mlp["down_proj.weight"][:, block])
        if gated:
            assert torch.equal(made["up_proj.weight"] / up, mlp["up_proj.weight"][block])
            assert torch.equal(made["gate_proj.weight"], mlp["gate_proj.weight"][block])
        else:
            stack = state["model.layers.1.mlp.experts.up_proj"]
            assert stack.shape == (16, width, 32)
            assert torch.equal(stack[expert], mlp["up_proj.weight"][block])


def test_other_scales_round_once():
    dense = dense_model(dtype=torch.bfloat16)
    state, _, _ = upcycled(dense, **FIFTHS)
    mlp, made = network(dense, 0), expert_of(state, 0, 7)
    block = slice(2 * 8, 3 * 8)
    assert torch.equal(made["up_proj.weight"], (5 * mlp["up_proj.weight"][block].double()).bfloat16())
    assert torch.equal(made["down_proj.weight"], mlp["down_proj.weight"][:, block])
    assert torch.equal(made["gate_proj.weight"], mlp["gate_proj.weight"][block])
    # bf16 cannot represent 4 / 3
    state, _, _ = upcycled(dense, num_experts_per_tok=3, **LOOSE)
    expected = (4 / 3 * mlp["up_proj.weight"].double()).bfloat16()
    assert torch.equal(expert_of(state, 0, 1)["up_proj.weight"], expected)


@pytest.mark.parametrize(
    ("fields", "root"),
    [({}, 3), ({"gated_mlp": False, "hidden_act": "relu2"}, 3), ({"gated_mlp": False, "hidden_act": "gelu"}, 2)],
    ids=str,
)
def test_megatron_formula(fields, root):
    dense = dense_model(**BIASES, **fields)
    state, _, _ = upcycled(dense, **EIGHTHS, **LOOSE, **MEGATRON)
    factor, mlp, block = 16 ** (1 / root), network(dense, 2), slice(15, 20)
    torch.testing.assert_close(
        expert_of(state, 2, 11)["down_proj.weight"], factor * mlp["down_proj.weight"][:, block], rtol=1e-12, atol=0
    )
    prefix = "model.layers.2.mlp.experts."
    parts = ["gate_proj", "up_proj"] if dense.config.gated_mlp else ["up_proj"]
    bias = state[f"{prefix}{'gate_up' if len(parts) == 2 else 'up'}_proj_bias"][11]
    expected = torch.cat([factor * mlp[f"{part}.bias"][block] for part in parts])
    torch.testing.assert_close(bias, expected, rtol=1e-12, atol=0)
    assert torch.equal(state[f"{prefix}down_proj_bias"][11], mlp["down_proj.bias"])
    for part in parts if len(parts) == 2 else []:
        expected = factor * mlp[f"{part}.weight"][block]
        torch.testing.assert_close(expert_of(state, 2, 11)[f"{part}.weight"], expected, rtol=1e-12, atol=0)


def test_shards_share_a_row_of_the_router():
    state, _, _ = upcycled(dense_model(), **GROUPS)
    rows = state["model.layers.0.mlp.gate.weight"].view(3, 4, 32)
    assert torch.equal(rows, rows[:, :1].expand(-1, 4, -1))
    assert rows[0, 0].unique().numel() == 32


def test_layer_subset_stays_dense():
    dense = dense_model()
    state, config, _ = upcycled(dense, layers="0,2")
    assert config.mlp_layer_types == ["sparse", "dense", "sparse"]
    middle = {name: tensor for name, tensor in state.items() if name.startswith("model.layers.1.mlp.")}
    assert middle.keys() == {f"model.layers.1.mlp.{name}" for name in network(dense, 1)}
    assert all(torch.equal(tensor, dense.state_dict()[name]) for name, tensor in middle.items())
    assert list(state)[-1] == "lm_head.weight"


def drawn_anew(dense: MoEForCausalLM, state, layer: int, expert: int, granularity: int) -> list[torch.Tensor]:
    """Returns, for each matrix, which neurons of an expert differ from the dense network's; a neuron differs as a
    whole.
    """
    width = 40 // granularity
    block = slice(expert % granularity * width, (expert % granularity + 1) * width)
    mlp, made, found = network(dense, layer), expert_of(state, layer, expert), []
    for name in WEIGHTS:
        index = (slice(None), block) if name.startswith("down") else block
        old, new = mlp[name][index], made[name]
        if name.startswith("down"):
            old, new = old.T, new.T
        changed = old != new
        assert torch.equal(changed.any(1), changed.all(1))
        found.append(changed.any(1))
    return found


@pytest.mark.parametrize("granularity", [1, 2])
def test_drop_redraws_the_same_neurons_in_all_matrices(granularity):
    dense = dense_model()
    state, _, _ = upcycled(dense, method="drop", drop_ratio=0.3, granularity=granularity, scaling="none")
    chosen = set()
    for layer in (0, 1):
        for expert in range(4):
            gate, up, down = drawn_anew(dense, state, layer, expert, granularity)
            assert torch.equal(gate, up)
            assert torch.equal(gate, down)
            assert gate.sum() == 12 // granularity
            chosen.add(tuple(gate.tolist()))
    assert len(chosen) == 8


def test_drop_draws_from_what_it_replaces():
    """The matrices differ in mean and deviation; each has 400 new neurons."""
    dense = dense_model(intermediate_size=800)
    with torch.no_grad():
        for layer in dense.model.layers:
            for i, name in enumerate(WEIGHTS):
                weight = layer.mlp.get_parameter(name)
                weight.copy_((i + 1) * weight + 0.1 * i)
    state, _, _ = upcycled(dense, method="drop")
    mlp, made = network(dense, 0), expert_of(state, 0, 1)
    dropped = (mlp["up_proj.weight"] != made["up_proj.weight"]).any(1)
    assert dropped.sum() == 400
    for name in WEIGHTS:
        transposed = name.startswith("down")
        old, new = (w.T[dropped] if transposed else w[dropped] for w in (mlp[name], made[name]))
        error = old.std() / old.numel() ** 0.5
        assert (old.mean() - new.mean()).abs() < 4 * error
        torch.testing.assert_close(new.std(), old.std(), rtol=0.03, atol=0)
        assert not torch.equal(old, new)
        correlation = torch.corrcoef(torch.stack([old.flatten(), new.flatten()]))[0, 1]
        assert correlation.abs() < 0.05


@pytest.mark.parametrize("split", ["random", "clustered"])
def test_split_puts_each_neuron_into_one_expert(split):
    dense = dense_model(mlp_bias=True)
    orders = {f"layers.{i}.neurons": torch.randperm(40) for i in range(3)}
    data = {"calibration_data": ["text=file"], "measured": orders} if split == "clustered" else {}
    state, config, _ = upcycled(dense, method="split", split=split, scaling="none", num_experts=5, **data)
    assert config.moe_intermediate_size == 8
    found = []
    for layer in (0, 1):
        mlp, made = network(dense, layer), [expert_of(state, layer, expert) for expert in range(5)]
        up = torch.cat([expert["up_proj.weight"] for expert in made])
        order = (up[:, None] == mlp["up_proj.weight"]).all(-1).int().argmax(1)
        assert sorted(order.tolist()) == list(range(40))
        if split == "clustered":
            assert torch.equal(order, orders[f"layers.{layer}.neurons"])
        assert torch.equal(torch.cat([e["gate_proj.weight"] for e in made]), mlp["gate_proj.weight"][order])
        assert torch.equal(torch.cat([e["down_proj.weight"] for e in made], 1), mlp["down_proj.weight"][:, order])
        bias = state[f"model.layers.{layer}.mlp.experts.gate_up_proj_bias"].unflatten(1, (2, 8))
        assert torch.equal(bias[:, 1].flatten(), mlp["up_proj.bias"][order])
        assert torch.equal(state[f"model.layers.{layer}.mlp.experts.down_proj_bias"][3], mlp["down_proj.bias"])
        found.append(order)
    assert not torch.equal(*found)
    assert not torch.equal(found[0], torch.arange(40))


def test_noise_is_relative_or_absolute():
    dense = dense_model(intermediate_size=400)
    with torch.no_grad():
        dense.model.layers[0].mlp.up_proj.weight.mul_(10)
    mlp = network(dense, 0)
    for options, expected in (
        ({"noise": 0.1}, lambda weight: 0.1 * weight.std()),
        ({"noise_std": 0.05}, lambda weight: torch.tensor(0.05, dtype=torch.float64)),
        ({"noise": 0.03, "noise_std": 0.04}, lambda weight: (0.0009 * weight.var() + 0.0016).sqrt()),
    ):
        made = expert_of(upcycled(dense, **options)[0], 0, 2)
        for name in WEIGHTS:
            noise = made[name] - mlp[name]
            torch.testing.assert_close(noise.std(), expected(mlp[name]), rtol=0.03, atol=0)
            assert noise.mean().abs() < 4 * noise.std() / noise.numel() ** 0.5


def test_noise_is_relative_to_what_is_stored():
    """The scale of a shard is 4 on up and 2 on down, and the noise is scaled alike."""
    dense = dense_model()
    clean, noisy = (expert_of(upcycled(dense, **EIGHTHS, noise=noise)[0], 0, 1) for noise in (0.0, 0.1))
    for name in WEIGHTS:
        torch.testing.assert_close(
            (noisy[name] - clean[name]).std() / clean[name].std(), torch.tensor(0.1).double(), rtol=0.2, atol=0
        )


@pytest.mark.parametrize(
    "options", [{"noise": 0.1}, {"method": "drop"}, {"noise_std": 0.1, "granularity": 2}], ids=str
)
def test_an_expert_depends_on_its_own_seed_alone(options):
    dense = dense_model()
    states = [
        upcycled(dense, **options, seed=seed, num_experts=experts)[0] for seed, experts in ((7, 4), (7, 6), (8, 4))
    ]
    first, more, other = ([expert_of(state, 1, expert) for expert in range(4)] for state in states)
    for expert in range(4):
        for name in WEIGHTS:
            assert torch.equal(first[expert][name], more[expert][name])
            assert not torch.equal(first[expert][name], other[expert][name])
    assert not torch.equal(first[0]["up_proj.weight"], first[1]["up_proj.weight"])
    noise = [
        first[0][name] - network(dense, 1)[name][: first[0][name].shape[0]]
        for name in WEIGHTS[:2]
        if "granularity" not in options
    ]
    assert not noise or not torch.equal(*noise)


def test_shared_expert_is_the_dense_network():
    dense = dense_model(mlp_bias=True)
    state, config, _ = upcycled(dense, shared_expert=True, noise=0.1, noise_std=0.1, **GROUPS)
    mlp, made = network(dense, 0), expert_of(state, 0, 5)
    for name, tensor in mlp.items():
        assert torch.equal(state[f"model.layers.0.mlp.shared_experts.{name}"], tensor)
    assert config.shared_expert_intermediate_size == 40
    assert not made["down_proj.weight"].any()
    assert not state["model.layers.0.mlp.experts.down_proj_bias"].any()
    assert (made["up_proj.weight"] != mlp["up_proj.weight"][10:20]).all()


def test_several_sources():
    """The experts are the sources' networks in blocks; all other tensors, dense layers included, are weighted
    averages.
    """
    models = [dense_model(seed) for seed in (1, 2, 3)]
    weights = [0.5, 0.3, 0.2]
    options = {"num_experts": 12, "granularity": 2, "source_weights": weights, "layers": "0,1", "scaling": "none"}
    state, config, chosen = upcycled(*models, **options)
    assert (reason_not_exact(chosen, config) or "").startswith("several sources")
    assert (loaded(dict(state), config)(IDS).logits - models[0](IDS).logits).abs().max() > 1e-4
    for expert in range(12):
        mlp, shard = network(models[expert // 4], 1), slice(20 * (expert % 2), 20 * (expert % 2) + 20)
        assert torch.equal(expert_of(state, 1, expert)["up_proj.weight"], mlp["up_proj.weight"][shard])
        assert torch.equal(expert_of(state, 1, expert)["down_proj.weight"], mlp["down_proj.weight"][:, shard])
    averaged = {name for name in models[0].state_dict() if ".mlp." not in name or "layers.2" in name}
    assert averaged == {name for name in state if ".mlp." not in name or "layers.2" in name}
    for name in averaged:
        expected = sum(weight * model.state_dict()[name] for weight, model in zip(weights, models, strict=True))
        torch.testing.assert_close(state[name], expected, rtol=1e-12, atol=1e-14)


def test_average_in_fp32_and_the_first_dtype():
    models = [dense_model(1, torch.bfloat16), dense_model(2, torch.float32), dense_model(3, torch.bfloat16)]
    state, _, _ = upcycled(*models, num_experts=6, shared_expert=True)
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}
    first, second, third = (model.state_dict() for model in models)
    for name, key in (
        ("model.embed_tokens.weight",) * 2,
        ("model.layers.0.mlp.shared_experts.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
    ):
        expected = (first[key].double() + second[key].double() + third[key].double()) / 3
        # half a step of bf16, plus the error of fp32
        torch.testing.assert_close(state[name].double(), expected, rtol=2**-8 * 1.01, atol=1e-8)
    assert torch.equal(
        expert_of(state, 0, 2)["up_proj.weight"], second["model.layers.0.mlp.up_proj.weight"].bfloat16()
    )


def test_nothing_is_read_before_it_is_written():
    dense = dense_model(mlp_bias=True)

    def forbidden(index):
        raise AssertionError("read")

    source = {name: LazyTensor(tensor.shape, tensor.dtype, forbidden) for name, tensor in dense.state_dict().items()}
    for method in METHODS:
        options = UpcyclingOptions(method=method, noise=0.1, shared_expert=True)
        state = assemble([source], sparse_config(dense.config, options, torch.float64), options, {})
        with pytest.raises(AssertionError, match="read"):
            state["model.layers.0.mlp.experts.3.up_proj.weight"].read()


def test_a_shard_reads_its_own_rows_alone():
    rows = []

    def load(index):
        rows.append(index)
        return torch.zeros(40, 32)[index]

    dense = dense_model()
    source = lazy(dense) | {"model.layers.0.mlp.up_proj.weight": LazyTensor((40, 32), torch.float32, load)}
    options = UpcyclingOptions(num_experts=8, granularity=4)
    state = assemble([source], sparse_config(dense.config, options, torch.float32), options, {})
    state["model.layers.0.mlp.experts.6.up_proj.weight"].read()
    assert rows == [(slice(20, 30), slice(0, 32))]


def test_mismatching_tensors_are_refused_by_name():
    dense, other = dense_model(), dense_model()
    options = UpcyclingOptions(sources=["./law"])
    config = sparse_config(dense.config, options, torch.float64)
    missing = lazy(other)
    missing.pop("model.layers.1.self_attn.q_proj.weight")
    smaller = lazy(other) | {"model.embed_tokens.weight": LazyTensor.of(torch.zeros(98, 32))}
    for source, message in (
        (missing, r"model.layers.1.self_attn.q_proj.weight is in the first source alone"),
        (lazy(other) | {"extra": LazyTensor.of(torch.zeros(1))}, r"extra is in ./law alone"),
        (smaller, r"model.embed_tokens.weight has shape \(98, 32\) in ./law and \(99, 32\) in the first source"),
    ):
        with pytest.raises(UserError, match=message):
            assemble([lazy(dense), source], config, options, {})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vocab_size": 100}, "vocab_size is 100 in ./law and 99 in ./base"),
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, "rope_parameters is"),
        ({"attention_bias": True}, "attention_bias is True in ./law"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True in ./law"),
    ],
    ids=str,
)
def test_mismatching_configs_are_refused_by_name(fields, message):
    base, same = dense_model().config, dense_model(eos_token_id=5, max_position_embeddings=128).config
    refuse_mismatch([base, same], ["./base", "./same"])
    with pytest.raises(UserError, match=message):
        refuse_mismatch([base, same, dense_model(**fields).config], ["./base", "./same", "./law"])
