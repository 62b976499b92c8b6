# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module says which servers compute a checkpoint of transformers' own families exactly, and why the others do not.

A server often answers fluently and wrongly where a format or a field is not supported. The conditions come from runs in which
the server's greedy tokens and log-probabilities were compared with transformers' in fp32, and from the servers' source code
(vLLM 0.32.0, llama.cpp as in llama-cpp-python 0.3.36). A server without a known exact run of a format is not named for it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from transformers import CONFIG_MAPPING, PreTrainedConfig


class Server(NamedTuple):
    """A way to serve a checkpoint.

    Attributes:
        name: the server.
        commands: shell commands, in which `{name}` stands for the quoted name of the checkpoint.
    """

    name: str
    commands: str


VLLM = Server("vLLM", "vllm serve {name}")
VLLM_BY_CODE = Server("vLLM, by its Transformers back end", "vllm serve {name} --model-impl transformers")
LLAMA_CPP = Server(
    "llama.cpp",
    "python convert_hf_to_gguf.py {name} --outfile model.gguf  # from llama.cpp's repository, with a local folder\n"
    "llama-server -m model.gguf",
)
TRANSFORMERS = Server("transformers", "transformers serve {name}")
# names that a command takes -> servers
SERVERS = {"vllm": VLLM, "vllm-transformers": VLLM_BY_CODE, "llama.cpp": LLAMA_CPP, "transformers": TRANSFORMERS}


class Condition(NamedTuple):
    """A condition under which a server computes a checkpoint of a format exactly.

    Attributes:
        holds: tells from the values of config.json whether the condition holds.
        otherwise: what the server does if not, as the end of a sentence that begins with the server's name.
    """

    holds: Callable[[Any], bool]
    otherwise: str


def _usual_heads(config: Any) -> bool:
    return getattr(config, "head_dim", None) in (None, config.hidden_size // config.num_attention_heads)


def _sparse_throughout(config: Any) -> bool:
    return not getattr(config, "mlp_only_layers", None) and getattr(config, "decoder_sparse_step", 1) == 1


def _alternates(config: Any) -> bool:
    kinds = ("sliding_attention", "full_attention")
    return config.sliding_window is not None and config.layer_types == [
        kinds[layer % 2] for layer in range(config.num_hidden_layers)
    ]


def _never(config: Any) -> bool:
    return False


SILU = Condition(
    lambda config: getattr(config, "hidden_act", None) in ("silu", "swish"),
    "computes its experts with SiLU, whatever hidden_act is",
)
NO_BIAS = Condition(
    lambda config: not getattr(config, "attention_bias", False), "computes attention_bias wrongly, or refuses it"
)
NO_WINDOW = Condition(
    lambda config: getattr(config, "sliding_window", None) is None or not getattr(config, "use_sliding_window", True),
    "ignores sliding_window",
)
USUAL_HEADS = Condition(_usual_heads, "takes head_dim to be hidden_size / num_attention_heads")
SPARSE_THROUGHOUT = Condition(_sparse_throughout, "refuses dense layers (mlp_only_layers)")
RENORMALISED = Condition(lambda config: config.norm_topk_prob, "renormalises, whatever norm_topk_prob is")
NOT_RENORMALISED = Condition(
    lambda config: not config.norm_topk_prob, "never renormalises, whatever norm_topk_prob is"
)
QKV_BIAS = Condition(lambda config: getattr(config, "qkv_bias", True), "answers NaN where qkv_bias is false")
SIGMOID = Condition(
    lambda config: getattr(config, "scoring_func", None) == "sigmoid",
    'takes softmax scores unless config.json says "scoring_func": "sigmoid"',
)
ALTERNATING = Condition(_alternates, "gives every other layer a sliding window, whatever layer_types is")
EPSILON = Condition(lambda config: config.rms_norm_eps == 1e-5, "takes rms_norm_eps to be 1e-5, whatever it is")
QUERY_RANK = Condition(
    lambda config: (config.q_lora_rank is None) == (config.num_hidden_layers in (26, 27)),
    "takes q_lora_rank to be null in models of 26 or 27 layers and set in all others, and refuses the rest",
)
TIED = Condition(
    lambda config: not config.tie_word_embeddings,
    "does not load this format where tie_word_embeddings is true",
)
UNCLIPPED = Condition(lambda config: getattr(config, "clip_qkv", None) is None, "ignores clip_qkv")
NOT_SEEN_EXACT = Condition(_never, "has not been seen to compute this format exactly")
DISAGREED = Condition(_never, "disagreed with transformers; its Transformers back end did not")
GLM_TOKENIZER = Condition(_never, "converts only checkpoints with GLM's own tokenizer")

GRANITE: dict[Server, tuple[Condition, ...]] = {VLLM: (SILU, NO_BIAS, USUAL_HEADS), LLAMA_CPP: (SILU, USUAL_HEADS)}
# model_type -> server -> conditions that together make the server exact
SERVED: dict[str, dict[Server, tuple[Condition, ...]]] = {
    # no server was tried
    "jetmoe": {},
    "mixtral": {VLLM: (SILU,), LLAMA_CPP: (SILU, NO_WINDOW)},
    "granitemoe": GRANITE,
    "granitemoeshared": GRANITE,
    "qwen3_moe": {
        VLLM: (SILU, NO_BIAS),
        LLAMA_CPP: (SILU, NO_BIAS, NO_WINDOW, RENORMALISED, SPARSE_THROUGHOUT),
    },
    "qwen2_moe": {
        VLLM: (SILU, QKV_BIAS),
        LLAMA_CPP: (SILU, NO_WINDOW, NOT_RENORMALISED, SPARSE_THROUGHOUT, TIED),
    },
    "deepseek_v3": {VLLM: (DISAGREED,), VLLM_BY_CODE: (SILU,), LLAMA_CPP: (SILU, SIGMOID, NO_BIAS, QUERY_RANK)},
    "glm4_moe": {VLLM: (SILU, TIED), LLAMA_CPP: (GLM_TOKENIZER,)},
    "minimax_m2": {VLLM: (NOT_SEEN_EXACT,), LLAMA_CPP: (SILU, TIED)},
    "gpt_oss": {VLLM: (ALTERNATING, NOT_SEEN_EXACT), LLAMA_CPP: (ALTERNATING, NOT_SEEN_EXACT)},
    "olmoe": dict.fromkeys((VLLM, LLAMA_CPP), (SILU, NO_BIAS, NOT_RENORMALISED, EPSILON, UNCLIPPED, TIED)),
}


class Verdict(NamedTuple):
    """What is known of a server and a checkpoint.

    Attributes:
        server: the server.
        faults: texts that say what the server does otherwise; empty if it computes the checkpoint exactly.
    """

    server: Server
    faults: tuple[str, ...]


def verdicts(config: PreTrainedConfig) -> list[Verdict]:
    """Returns what is known of each server that was tried with a checkpoint's format, and of transformers.

    Args:
        config: configuration as config.json gives it, of one of transformers' own families.
    """
    found = [
        Verdict(server, tuple(condition.otherwise for condition in conditions if not condition.holds(config)))
        for server, conditions in SERVED.get(config.model_type, {}).items()
    ]
    return [*found, Verdict(TRANSFORMERS, ())] if config.model_type in CONFIG_MAPPING else found


def servers(config: PreTrainedConfig) -> list[Server]:
    """Returns the servers that are known to compute a checkpoint of transformers' own families exactly."""
    return [verdict.server for verdict in verdicts(config) if not verdict.faults]


def faults(config: PreTrainedConfig, server: Server) -> tuple[str, ...]:
    """Returns what a server does otherwise than transformers with a checkpoint; empty if it computes the checkpoint exactly.

    A server that was never tried with the format has one fault: it has not been seen to be exact.
    """
    found = {verdict.server: verdict.faults for verdict in verdicts(config)}
    return found.get(server, (NOT_SEEN_EXACT.otherwise,))
