# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This experiment measures how far the importance ratio of a rollout in bf16 is from 1, with and without routing replay.

An engine, the policy's copy in bf16, samples answers through its key-value cache. The policy in fp32 then reads the answers as
a trainer does. The two have the same weights up to rounding, so that an exact ratio would be 1 at each token.

# B answers, P tokens of a prompt, N tokens of an answer
"""

import copy
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, MixtralConfig, PreTrainedModel, Qwen3MoeConfig

from modeling_moe import MoEConfig
from modeling_moe.monitoring import LayerPass, observe
from modeling_moe.replay import RoutingStore, record_routing, replay_routing
from modeling_moe.utils.errors import UserError

from .files import refuse_missing_folders


SHAPE: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 96,
    "moe_intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, Any] = {"mixtral": MixtralConfig, "qwen3_moe": Qwen3MoeConfig, "moe": MoEConfig}


@dataclass
class RatioArguments:
    """These arguments say which models sample how many answers."""

    families: list[str] = field(
        default_factory=lambda: list(FAMILIES), metadata={"help": f"model types, of {', '.join(FAMILIES)}"}
    )
    num_experts: int = field(default=32, metadata={"help": "number of experts of a layer"})
    num_experts_per_tok: int = field(default=4, metadata={"help": "number of experts of a token"})
    num_hidden_layers: int = field(default=4, metadata={"help": "number of layers"})
    answers: int = field(default=64, metadata={"help": "number of answers that the engine samples"})
    prompt_tokens: int = field(default=16, metadata={"help": "number of random tokens of each prompt"})
    answer_tokens: int = field(default=48, metadata={"help": "number of tokens of each answer"})
    seeds: int = field(default=3, metadata={"help": "number of seeds of weights, prompts and sampling"})
    output_json: str | None = field(default=None, metadata={"help": "file for the results"})


class Ratio(NamedTuple):
    """What the ratios of all tokens of the answers say.

    Attributes:
        variance: variance of the ratio.
        divergence: Kullback-Leibler divergence of policy and engine in nats per token, by the estimator r - 1 - log r.
        largest: largest absolute logarithm of a ratio.
        flipped: share of the engine's choices that the policy's routers would not make.
        different: share of the engine's choices that the policy did not use.
    """

    variance: float
    divergence: float
    largest: float
    flipped: float
    different: float


class Result(NamedTuple):
    """The ratios of one model and one seed, with its own choices and with those of the engine."""

    family: str
    seed: int
    without: Ratio
    replayed: Ratio


def build(family: str, args: RatioArguments) -> PreTrainedModel:
    """Returns a model in fp32 with random weights."""
    fields = {"num_hidden_layers": args.num_hidden_layers, "num_experts_per_tok": args.num_experts_per_tok}
    fields |= {"num_local_experts" if family == "mixtral" else "num_experts": args.num_experts}
    return AutoModelForCausalLM.from_config(FAMILIES[family](**SHAPE | fields)).eval()


def sample(engine: Any, prompts: torch.Tensor, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns texts (B, P + N), and the engine's log-probabilities (B, N) of the sampled tokens."""
    output = engine.generate(
        input_ids=prompts,
        attention_mask=torch.ones_like(prompts),
        do_sample=True,
        top_k=0,
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        output_logits=True,
        return_dict_in_generate=True,
    )
    written = output.sequences[:, prompts.shape[1] :]
    logits = torch.stack(output.logits, dim=1).float()
    return output.sequences, logits.log_softmax(-1).gather(-1, written[..., None])[..., 0]


@torch.no_grad()
def ratio(
    policy: PreTrainedModel, texts: torch.Tensor, engine: torch.Tensor, store: RoutingStore, replay: bool
) -> Ratio:
    """Compares the policy's probabilities of the answers with the engine's.

    Args:
        policy: the model in fp32.
        texts: (B, P + N) token ids.
        engine: (B, N) log-probabilities.
        store: the engine's choices.
        replay: whether the policy uses them; otherwise the policy chooses by itself.
    """
    recorded = torch.stack([found for row in texts if (found := store.find(row)) is not None]).long()
    chosen: list[torch.Tensor] = []

    def keep(event: LayerPass) -> None:
        chosen.append(event.index.long().view(*texts.shape, -1)[:, :-1])

    with observe(policy, keep):
        if replay:
            with replay_routing(policy, store) as handle:
                logits, flipped = policy(texts, use_cache=False).logits, handle.figures().flipped
        else:
            logits, flipped = policy(texts, use_cache=False).logits, None
    theirs, mine = recorded.transpose(1, 2).transpose(0, 1), torch.stack(chosen)
    different = (~(theirs[..., :, None] == mine[..., None, :]).any(-1)).double().mean().item()
    tokens = engine.shape[1]
    own = logits[:, :-1].log_softmax(-1).gather(-1, texts[:, 1:, None])[:, -tokens:, 0]
    log_ratio = (own - engine).double()
    return Ratio(
        log_ratio.exp().var().item(),
        (log_ratio.exp() - 1 - log_ratio).mean().item(),
        log_ratio.abs().max().item(),
        different if flipped is None else flipped,
        different,
    )


def measure(family: str, seed: int, args: RatioArguments) -> Result:
    """Samples answers in bf16, and reads them in fp32 with and without replay."""
    torch.manual_seed(seed)
    policy = build(family, args)
    engine = copy.deepcopy(policy).bfloat16()
    prompts = torch.randint(3, SHAPE["vocab_size"], (args.answers, args.prompt_tokens))
    with record_routing(engine) as recorder:
        texts, logprobs = sample(engine, prompts, args.answer_tokens)
    without, replayed = (ratio(policy, texts, logprobs, recorder.store, replay) for replay in (False, True))
    return Result(family, seed, without, replayed)


def rollout_ratio(args: RatioArguments) -> list[Result]:
    """Measures each family with each seed.

    Raises:
        UserError: for an unknown family, or a result file in a missing folder.
    """
    refuse_missing_folders(args, "output_json")
    for family in args.families:
        if family not in FAMILIES:
            raise UserError(f"families: {family!r} is none of {', '.join(FAMILIES)}")
    return [measure(family, seed, args) for family in args.families for seed in range(args.seeds)]
