"""This module has the configurations of routed attention that several tests share, and oracles of what the variants have in common."""

import math

import torch
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, rotate_half

from modeling_moe import MoEForCausalLM
from modeling_moe.attention_catalogue import attention_class
from tests.builders import tiny_config


# sizes that share no factor with each other
VARIANTS = {
    "moa": {
        "routed_attention": "moa",
        "attention_experts": 5,
        "attention_experts_per_tok": 3,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
    },
    "switch_head": {
        "routed_attention": "switch_head",
        "attention_experts": 4,
        "attention_experts_per_tok": 2,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
    },
    "moh": {
        "routed_attention": "moh",
        "attention_experts": 4,
        "attention_experts_per_tok": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
    },
    "routing_transformer": {
        "routed_attention": "routing_transformer",
        "attention_experts": 3,
        "attention_experts_per_tok": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}
ROWS, LENGTH, HIDDEN = 2, 7, 32


def model_of(variant: str, **fields) -> MoEForCausalLM:
    """Returns a tiny model with routed attention in all layers."""
    torch.manual_seed(0)
    return MoEForCausalLM(tiny_config(**(VARIANTS[variant] | fields)))


def attention_of(variant: str, layer: int = 1, **fields):
    """Returns the attention of a layer in float64, with random weights."""
    torch.manual_seed(0)
    config = tiny_config(**(VARIANTS[variant] | fields))
    # transformers' eager attention computes the softmax in fp32
    config._attn_implementation = "sdpa"
    attention = attention_class(config)(config, layer)
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return attention.double()


def inputs_of(attention, masked: bool = False) -> dict:
    """Returns the arguments of attention for whole rows; with `masked` the causal mask is a tensor of numbers to add."""
    torch.manual_seed(1)
    states = torch.randn(ROWS, LENGTH, HIDDEN, dtype=torch.float64, requires_grad=True)
    positions = torch.arange(LENGTH)[None]
    rotary = tuple(x.double() for x in LlamaRotaryEmbedding(attention.config)(torch.zeros(1), positions))
    hidden = positions > positions.T
    mask = torch.zeros(LENGTH, LENGTH, dtype=torch.float64).masked_fill(hidden, -math.inf)[None, None]
    return {
        "hidden_states": states,
        "position_embeddings": rotary,
        "attention_mask": mask if masked else None,
    }


def heads_of(states: torch.Tensor, heads: int, rotary=None) -> torch.Tensor:
    """Returns projections (B, S, heads * D) as heads (B, S, heads, D), rotated if `rotary` is given."""
    states = states.unflatten(-1, (heads, -1))
    if rotary is None:
        return states
    cos, sin = (x[:, :, None] for x in rotary)
    return states * cos + rotate_half(states) * sin


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, allowed=None) -> torch.Tensor:
    """Computes attention of (B, S, n, D) queries on (B, S, G, D) keys and values head by head, from its definition.

    Args:
        allowed: (B, n, S, S) bool, keys that each query may attend to beside the causal mask; None for all.
    """
    outputs = []
    for head in range(query.shape[2]):
        group = head * key.shape[2] // query.shape[2]
        scores = torch.einsum("bsd,btd->bst", query[:, :, head], key[:, :, group]) * query.shape[-1] ** -0.5
        seen = torch.ones(scores.shape[1:], dtype=torch.bool).tril().expand_as(scores)
        if allowed is not None:
            seen = seen & allowed[:, head]
        scores = scores.masked_fill(~seen, -math.inf)
        outputs.append(torch.einsum("bst,btd->bsd", scores.softmax(dim=-1), value[:, :, group]))
    return torch.stack(outputs, dim=2)


def gradients(output: torch.Tensor, attention, states: torch.Tensor) -> dict[str, torch.Tensor]:
    """Returns the gradients of a weighted sum of the output, by the names of the parameters, and that of the states."""
    upstream = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    named = dict(attention.named_parameters()) | {"x": states}
    found = torch.autograd.grad((output * upstream).sum(), list(named.values()), allow_unused=True)
    return {name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(named.items(), found, strict=True)}


def assert_equal(attention, arguments: dict, expected: torch.Tensor, **options) -> None:
    """Compares an attention's output and all of its gradients with an oracle's."""
    states = arguments["hidden_states"]
    output = attention(**arguments, **options)[0]
    torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-12)
    mine, theirs = gradients(output, attention, states), gradients(expected, attention, states)
    for key, gradient in theirs.items():
        torch.testing.assert_close(
            mine[key], gradient, rtol=1e-8, atol=1e-11, msg=lambda text, key=key: f"{key}: {text}"
        )
