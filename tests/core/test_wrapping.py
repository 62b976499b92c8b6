"""These tests check wrapped gates and experts: PEFT layers, forward hooks, and weights that accelerate offloads."""

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from peft import LoraConfig, get_peft_model

from tests.core.test_catalogue import ALL, ALL_NAMES, IDS, batch_of, model_of


# routers with a gate matrix
GATED = [name for name, fields in ALL.items() if fields.get("router_type") not in ("hash", "uniform")]
OFFLOADED = {
    "cpu": lambda model, folder: cpu_offload(model, execution_device="cpu", offload_buffers=True),
    "disk": lambda model, folder: disk_offload(model, folder, execution_device="cpu", offload_buffers=True),
    "device_map": lambda model, folder: dispatch_model(
        model,
        {"model.embed_tokens": "cpu", "model.layers.0": "cpu",
         **{f"model.layers.{i}": "disk" for i in range(1, model.config.num_hidden_layers)},
         "model.norm": "cpu", "model.rotary_emb": "cpu", "model.router_totals": "cpu", "lm_head": "disk"},
        offload_dir=folder, main_device="cpu",
    ),
}  # fmt: skip


def run(model, name: str, training: bool = False, **fields):
    torch.manual_seed(7)
    return model.train(training)(**batch_of(name), use_cache=False, **fields)


def lora(model, target: str):
    """Wraps a model in LoRA with random factors, which change the model."""
    config = LoraConfig(target_parameters=[target], target_modules=[], lora_alpha=16, r=2)
    wrapped = get_peft_model(model, config)
    with torch.no_grad():
        for key, parameter in wrapped.named_parameters():
            if "lora_" in key:
                parameter.normal_(std=0.3)
    return wrapped


@pytest.mark.parametrize("name", GATED)
def test_stock_lora_on_the_router_computes_what_merging_makes(name):
    model = model_of(name).double()
    before = run(model, name).logits.detach()
    wrapped = lora(model, "mlp.gate.weight")
    for training in (False, True):
        got = run(wrapped, name, training, labels=IDS)
        got.loss.backward()
        factors = {key: p.grad for key, p in wrapped.named_parameters() if "lora_" in key}
        assert len(factors) >= 2
        assert all(grad.isfinite().all() for grad in factors.values())
        # in evaluation an expert that is chosen alone in its group has the weight 1 and no gradient
        assert sum(grad.abs().sum() for grad in factors.values()) > 0 or (name == "hierarchical" and not training)
        wrapped.zero_grad()
    if model.config.controller is not None:
        model.update_routers()  # reaches through the wrapper
        run(wrapped, name, training=True, labels=IDS).loss.backward()
        model.update_routers()
    got = run(wrapped, name).logits
    expected = run(wrapped.merge_and_unload(), name).logits
    torch.testing.assert_close(got, expected, atol=1e-8, rtol=1e-6)
    if name != "deepseek_v4":  # its other layer hashes
        assert not torch.allclose(got, before)


@pytest.mark.parametrize("implementation", ["eager", "moe"])
@pytest.mark.parametrize("name", ["lory", "soft_moe", "dense_gradient", "null_and_copy"])
def test_stock_lora_on_the_experts_computes_what_merging_makes(name, implementation):
    """LoRA on the experts equals merged weights; `lory` merges updated experts, the dense gradient reaches the router alone."""
    model = model_of(name, experts_implementation=implementation).double()
    wrapped = lora(model, "experts.gate_up_proj")
    got = run(wrapped, name, training=True).logits
    got.square().sum().backward()
    factors = [p.grad.clone() for key, p in wrapped.named_parameters() if "lora_" in key]
    assert all(grad.abs().sum() > 0 for grad in factors)
    if name == "dense_gradient":
        wrapped.zero_grad()
        for block in model.model.sparse_blocks():
            block.gate.gradient = "topk"
        run(wrapped, name, training=True).logits.square().sum().backward()
        last = [p.grad for key, p in wrapped.named_parameters() if "layers.2" in key and "lora_" in key]
        for plain, grad in zip(last, factors[-2:], strict=True):
            torch.testing.assert_close(grad, plain, atol=1e-9, rtol=1e-7)
    expected = run(wrapped.merge_and_unload(), name).logits
    torch.testing.assert_close(run(wrapped, name).logits, expected, atol=1e-8, rtol=1e-6)


@ALL_NAMES
def test_hooks_that_return_plain_tuples_change_nothing(name):
    model = model_of(name)
    expected = run(model, name, training=True, labels=IDS)

    def plain(module, args, output):
        return tuple(output) if isinstance(output, tuple) else (output,)

    for layer in model.model.layers:
        layer.register_forward_hook(plain)
        if layer.is_sparse:
            layer.mlp.register_forward_hook(plain)
            layer.mlp.gate.register_forward_hook(plain)
    got = run(model, name, training=True, labels=IDS)
    assert torch.equal(got.logits, expected.logits)
    assert torch.equal(got.loss, expected.loss)
    run(model, name)


@pytest.mark.parametrize("where", OFFLOADED)
@ALL_NAMES
def test_offloaded_weights_give_the_same_bits(name, where, tmp_path):
    model = model_of(name).eval()
    expected = run(model, name, output_router_logits=True)
    model = OFFLOADED[where](model, tmp_path)
    assert any(parameter.is_meta for parameter in model.parameters())
    got = run(model, name, output_router_logits=True)
    assert torch.equal(got.logits, expected.logits)
    for logits, reference in zip(got.router_logits, expected.router_logits, strict=True):
        assert torch.equal(logits, reference)


@pytest.mark.parametrize("name", ["softmax", "lory", "soft_moe", "dense_gradient", "null_and_copy", "hierarchical"])
def test_gradients_of_weights_in_use_reach_them_where_gates_and_experts_are_offloaded(name):
    """Gates get their gradients while frozen experts are offloaded."""
    model = model_of(name)
    for block in model.model.sparse_blocks():
        block.experts.requires_grad_(False)
    gates = [block.gate.weight for block in model.model.sparse_blocks()]
    run(model, name, training=True).logits.square().sum().backward()
    expected = [gate.grad.clone() for gate in gates]
    model.zero_grad()
    for block in model.model.sparse_blocks():
        cpu_offload(block.experts, execution_device="cpu")
    run(model, name, training=True).logits.square().sum().backward()
    for gate, grad in zip(gates, expected, strict=True):
        assert torch.equal(gate.grad, grad)
