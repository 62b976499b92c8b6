# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""Whether more experts learn more at equal compute: upcycled models and the dense one learn facts, a few layers of each.

The states that enter the last layers are computed once; only feed-forward networks and routers of those layers train, in
fp32, on facts (a name, six random digits) and prose. The head knows the tokens of this data alone, so that losses are
lower than a full one's, in all arms by the same rule.

# N facts, M tokens of each, B rows of a batch, S = facts_per_row * M tokens of a row, H hidden, V tokens in the data
"""

import math
import random
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase, get_linear_schedule_with_warmup

from modeling_moe.checkpoints import LazyTensor, State
from modeling_moe.configuration_moe import MoEConfig
from modeling_moe.conversion import load_state, open_checkpoint
from modeling_moe.modeling_moe import MoEForCausalLM
from modeling_moe.upcycling.assembly import upcycle
from modeling_moe.upcycling.options import UpcyclingOptions
from modeling_moe.upcycling.plan import sparse_config
from modeling_moe.utils.errors import UserError
from modeling_moe.utils.loading import load_tokenizer
from modeling_moe.utils.seeds import generator_for

from .router_comparison import python_documents
from .runs import RunsFile, run_all
from .upcycling_initial_loss import refuse_missing_folders, with_own_rows


DIGITS = 6
HELD_OUT_TOPICS = 5
WARMUP = 0.1
# 97.5% points of Student's t by degrees of freedom
T_QUANTILES = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764, 5: 2.5706, 6: 2.4469, 7: 2.3646, 8: 2.3060, 9: 2.2622}

_VG = {"num_experts": 16, "granularity": 4, "num_experts_per_tok": 4}

# arm -> options of its upcycling; None trains the dense networks themselves
ARMS: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "virtual groups, exact": _VG,
    "virtual groups, Megatron": _VG | {"scaling": "megatron"},
    "drop .5": _VG | {"method": "drop", "drop_ratio": 0.5},
    # 1 + 2 / 16 of the dense width, and so fewer steps; shards chosen one by one, for nothing holds them together here
    "drop .1 and shared expert": {
        "method": "drop",
        "drop_ratio": 0.1,
        "shared_expert": True,
        "num_experts": 64,
        "granularity": 16,
        "num_experts_per_tok": 2,
    },
}
OWN_ROWS = ("drop .1 and shared expert",)
PAIRS = (
    *((arm, "dense") for arm in ARMS if arm != "dense"),
    ("virtual groups, exact", "virtual groups, Megatron"),
    ("virtual groups, exact", "drop .5"),
    ("virtual groups, exact", "drop .1 and shared expert"),
    ("virtual groups, Megatron", "drop .5"),
)
METRICS = ("recall_bits", "exact_match", "prose_loss")
# arguments that change no run
FREE_ARGUMENTS = ("rates", "seeds", "only", "workers", "runs_file", "output_json", "trust_remote_code")


@dataclass
class CapacityArguments:
    """Which model, how much data, and how long."""

    model_name_or_path: str = field(metadata={"help": "folder or Hub name of a dense model"})
    gguf_file: str | None = field(default=None, metadata={"help": "name of the GGUF file in the model's folder"})
    layers: int = field(default=4, metadata={"help": "last layers, whose feed-forward networks are trained"})
    facts: int = field(default=512, metadata={"help": "facts to learn, other ones for each seed"})
    facts_per_row: int = field(default=8, metadata={"help": "facts in a row, which do not see each other"})
    fact_rows: int = field(default=4, metadata={"help": "rows of facts in a step"})
    prose_rows: int = field(default=2, metadata={"help": "rows of prose in a step"})
    prose_pool: int = field(default=384, metadata={"help": "rows of prose to train on, in turns"})
    held_out_rows: int = field(default=40, metadata={"help": "rows of held-out prose"})
    steps: int = field(
        default=190, metadata={"help": "optimizer steps of a run; fewer for arms of more compute a token"}
    )
    sweep_steps: int = field(default=60, metadata={"help": "steps of the short runs that find an arm's learning rate"})
    rates: list[float] = field(
        default_factory=lambda: [1e-3, 3e-3, 1e-2], metadata={"help": "learning rates of AdamW to choose from"}
    )
    seeds: int = field(default=3, metadata={"help": "runs of each arm, with a seed of its own each"})
    only: list[str] | None = field(default=None, metadata={"help": "names of the arms to train; all if not given"})
    seed: int = field(default=0, metadata={"help": "of facts, order and all that is drawn"})
    workers: int = field(default=1, metadata={"help": "runs at a time, each by one thread"})
    runs_file: str | None = field(
        default=None, metadata={"help": "JSON lines, one for each run that is finished: those there are not run again"}
    )
    output_json: str | None = field(default=None, metadata={"help": "file for the results"})
    trust_remote_code: bool = field(default=False, metadata={"help": "run Python code that the checkpoint brings"})

    def __post_init__(self):
        names = (
            "layers",
            "facts_per_row",
            "fact_rows",
            "prose_rows",
            "held_out_rows",
            "steps",
            "sweep_steps",
            "workers",
        )
        for name in names:
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if not 2 <= self.seeds <= len(T_QUANTILES) + 1:
            raise UserError(f"seeds is {self.seeds}: an interval needs 2 to {len(T_QUANTILES) + 1}")
        for name, rows in {"facts": self.fact_rows * self.facts_per_row, "prose_pool": self.prose_rows}.items():
            if getattr(self, name) < rows:
                raise UserError(f"{name} is {getattr(self, name)}: it must be {rows} at least, what a step reads")
        if not self.rates or min(self.rates) <= 0:
            raise UserError(f"rates is {self.rates}: give positive learning rates")
        for name in self.only or []:
            if name not in ARMS:
                raise UserError(f"only {name!r} is no arm: choose of {'; '.join(ARMS)}")
        refuse_missing_folders(self, "runs_file", "output_json")

    @property
    def arms(self) -> list[str]:
        """The arms to train."""
        return [arm for arm in ARMS if self.only is None or arm in self.only]


@dataclass(frozen=True)
class Job:
    """One run, on the first `facts` of its seed's; the seed is 0 in the search for a learning rate, above it elsewhere."""

    arm: str
    seed: int
    learning_rate: float
    steps: int
    facts: int


@dataclass(frozen=True)
class Run:
    """What came of a [`Job`].

    Attributes:
        arm, seed, learning_rate, steps, facts: of the job.
        initial_prose_loss: nats per token of held-out prose before training.
        prose_loss: the same after it.
        recall_bits: log2(10) less the bits that a digit of a trained fact costs: 3.32 if all are known, 0 for a guess.
        exact_match: share of the facts of which greedy decoding writes all digits.
        seconds: of building, training and evaluation.
    """

    arm: str
    seed: int
    learning_rate: float
    steps: int
    facts: int
    initial_prose_loss: float
    prose_loss: float
    recall_bits: float
    exact_match: float
    seconds: float

    @property
    def job(self) -> Job:
        """What was asked for."""
        return Job(self.arm, self.seed, self.learning_rate, self.steps, self.facts)


@dataclass(frozen=True)
class Comparison:
    """A metric of two arms, the mean of first less second over paired seeds and its 95% interval."""

    metric: str
    first: str
    second: str
    mean: float
    low: float
    high: float

    @property
    def holds(self) -> bool:
        """Whether the interval leaves 0 out."""
        return self.low > 0 or self.high < 0

    @property
    def claim(self) -> str:
        """What may be said of it."""
        interval = f"{self.mean:+.3f} (95% interval {self.low:+.3f} to {self.high:+.3f})"
        if not self.holds:
            return f"no claim on {self.metric}, {self.first} against {self.second}: {interval}"
        return f"{self.metric} of {self.first} is {'above' if self.mean > 0 else 'below'} {self.second}: {interval}"


@dataclass(frozen=True)
class CapacityResult:
    """All that the experiment found.

    Attributes:
        tokens: of one run of an arm with the dense model's compute.
        active_widths: neurons that a token meets in a layer, by arm.
        steps: of the compared runs, by arm.
        rates: learning rate that the short runs chose, by arm.
        sweeps: the short runs.
        runs: the compared runs.
        comparisons: of `PAIRS`, for each metric.
    """

    tokens: int
    active_widths: dict[str, int]
    steps: dict[str, int]
    rates: dict[str, float]
    sweeps: list[Run]
    runs: list[Run]
    comparisons: list[Comparison]


def make_names(seed: int) -> Iterator[str]:
    """Names of two words without end, all different."""
    rng, seen = random.Random(seed), set()
    while True:
        first, last = ("".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(2)) for _ in "ab")
        name = f"{first.title()} {last.title()}"
        if name not in seen:
            seen.add(name)
            yield name


def make_facts(tokenizer: PreTrainedTokenizerBase, facts: int, sets: int, seed: int) -> torch.Tensor:
    """Facts of equal length: the end-of-text token if there is one, a name and a colon, six random digits.

    Of the drawn names those with the commonest number of tokens are taken.

    Returns:
        (sets, N, M) int64, no name twice; the first sets are the same however many are asked for.

    Raises:
        UserError: if the tokenizer has no token for each digit.
    """
    digits = [tokenizer(str(digit), add_special_tokens=False).input_ids for digit in range(10)]
    if any(len(ids) != 1 for ids in digits):
        raise UserError(
            "the tokenizer has not one token for each digit, by which recall is measured: use another model"
        )
    begin = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    names = make_names(seed)

    def prompt() -> list[int]:
        return begin + tokenizer(f"{next(names)}:", add_special_tokens=False).input_ids

    probe = [prompt() for _ in range(200)]
    length = Counter(map(len, probe)).most_common(1)[0][0]
    prompts = [ids for ids in probe if len(ids) == length]
    while len(prompts) < sets * facts:
        if len(ids := prompt()) == length:
            prompts.append(ids)
    rng = random.Random(f"digits {seed}")
    rows = [ids + [digits[rng.randrange(10)][0] for _ in range(DIGITS)] for ids in prompts[: sets * facts]]
    return torch.tensor(rows).view(sets, facts, -1)


def prose_rows(
    tokenizer: PreTrainedTokenizerBase, length: int, counts: Sequence[int], seed: int
) -> list[torch.Tensor]:
    """Rows (count, S) int64 of Python's language reference, to train on and held out: other topics.

    Raises:
        UserError: if there are not so many.
    """
    topics = list(python_documents()["documentation"]["text"])
    training = "\n".join(text for i, text in enumerate(topics) if i % HELD_OUT_TOPICS)
    # topics quote each other
    paragraphs = "\n".join(topics[::HELD_OUT_TOPICS]).split("\n\n")
    held_out = "\n\n".join(paragraph for paragraph in paragraphs if paragraph not in training)
    parts = []
    for name, text, count in zip(("prose_pool", "held_out_rows"), (training, held_out), counts, strict=True):
        ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
        rows = ids[: len(ids) // length * length].view(-1, length)
        if len(rows) < count:
            raise UserError(f"{name} is {count}, but the text has {len(rows)} rows of {length} tokens: lower it")
        parts.append(rows[torch.randperm(len(rows), generator=generator_for(seed, name))[:count]])
    return parts


def cut(config: MoEConfig, state: State, first: int, last: int) -> tuple[MoEConfig, State]:
    """The layers `first` ... `last - 1` of a model as a model of their own, with all its other tensors.

    Raises:
        UserError: if a layer would compute something else elsewhere.
    """
    if config.position_embedding_type != "rope" or config.scale_attn_by_inverse_layer_idx:
        raise UserError(
            "a model whose layers depend on their place cannot be cut in two: take one with rotary embeddings"
        )
    kept = {f"model.layers.{i}.": f"model.layers.{i - first}." for i in range(first, last)}
    tensors = {}
    for name, tensor in state.items():
        prefix = ".".join(name.split(".")[:3]) + "."
        if prefix in kept:
            tensors[kept[prefix] + name.removeprefix(prefix)] = tensor
        elif not name.startswith("model.layers."):
            tensors[name] = tensor
    changes: dict[str, Any] = {"num_hidden_layers": last - first}
    for name in ("layer_types", "mlp_layer_types", "no_rope_layers"):
        if (values := getattr(config, name)) is not None:
            changes[name] = values[first:last]
    if "sliding_attention" not in changes["layer_types"]:
        changes["sliding_window"] = None
    return MoEConfig(**(config.to_dict() | changes)), tensors


@torch.no_grad()
def entering_states(config: MoEConfig, state: State, layer: int, ids: torch.Tensor) -> torch.Tensor:
    """What enters a layer of a dense model, (N, S, H), for sequences (N, S)."""
    model = load_state(*cut(config, state, 0, layer))
    seen: list[torch.Tensor] = []
    model.model.norm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    for rows in tqdm(ids.split(max(1, 1024 // ids.shape[1])), desc="states"):
        model.model(input_ids=rows, use_cache=False)
    return torch.cat(seen)


def tail_model(config: MoEConfig, state: State, layer: int, kept: torch.Tensor) -> tuple[MoEConfig, State]:
    """The layers from `layer` on, as a dense model that is given states and knows the tokens `kept` (V,) alone."""
    config, state = cut(config, state, layer, config.num_hidden_layers)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in state:
            state[name] = LazyTensor.of(state[name].read()[kept])
    changes = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    # the states are scaled already
    changes |= {"vocab_size": len(kept), "embedding_multiplier": 1.0}
    return MoEConfig(**(config.to_dict() | changes)), state


def prepare(args: CapacityArguments) -> dict[str, Any]:
    """All that the runs share: the dense tail, and the data as states (..., H) and labels in the words of its head.

    Labels are -100 where nothing is to be learned: the names. `facts` has a set for each seed, 0 being the search's.

    Raises:
        UserError: for a model or a number that cannot work.
    """
    trust = {"trust_remote_code": args.trust_remote_code}
    checkpoint = open_checkpoint(args.model_name_or_path, args.gguf_file, "float32", **trust)
    config = checkpoint.config
    if "sparse" in config.mlp_layer_types or not args.layers < config.num_hidden_layers:
        raise UserError(
            f"layers is {args.layers}: it must be less than the {config.num_hidden_layers} of a model that is dense"
        )
    for arm in args.arms:
        # refuses, before anything is computed, an arm that this width cannot be cut for
        arm_model(arm, config, checkpoint.state, args.seed)
    tokenizer = load_tokenizer(str(checkpoint.source.folder), checkpoint.source.gguf_file, **trust)
    facts = make_facts(tokenizer, args.facts, 1 + args.seeds, args.seed)  # (1 + seeds, N, M)
    length = args.facts_per_row * facts.shape[-1]
    pool, held_out = prose_rows(tokenizer, length, (args.prose_pool, args.held_out_rows), args.seed)
    kept = torch.cat([facts[..., -DIGITS:].flatten(), pool.flatten(), held_out.flatten()]).unique()
    first = config.num_hidden_layers - args.layers
    states = {
        "facts": entering_states(config, checkpoint.state, first, facts.flatten(0, 1)).unflatten(0, facts.shape[:2]),
        "prose": entering_states(config, checkpoint.state, first, pool),
        "held_out": entering_states(config, checkpoint.state, first, held_out),
    }
    digits = torch.searchsorted(kept, facts[..., -DIGITS:].contiguous())
    names = digits.new_full((*facts.shape[:2], facts.shape[-1] - DIGITS), -100)
    labels = {
        "facts": torch.cat([names, digits], dim=-1),
        "prose": torch.searchsorted(kept, pool),
        "held_out": torch.searchsorted(kept, held_out),
    }
    tail_config, tail_state = tail_model(config, checkpoint.state, first, kept)
    weights = {name: tensor.read() for name, tensor in tail_state.items()}
    return {"config": tail_config.to_dict(), "weights": weights, "states": states, "labels": labels}


def arm_model(arm: str, config: MoEConfig, state: State, seed: int) -> tuple[MoEConfig, State]:
    """Configuration and checkpoint that an arm starts with."""
    fields = ARMS[arm]
    if fields is None:
        return config, state
    options = UpcyclingOptions(**fields, seed=seed)
    made_config = sparse_config(config, options, torch.float32)
    made = upcycle([state], made_config, options, {})
    return made_config, with_own_rows(made, made_config, options) if arm in OWN_ROWS else made


def active_width(arm: str, width: int) -> int:
    """Neurons of a layer that a token meets, of a dense network of `width`; the routers' few products are not counted."""
    fields = ARMS[arm]
    if fields is None:
        return width
    options = UpcyclingOptions(**fields)
    return options.num_experts_per_tok * width // options.granularity + options.shared_expert * width


def steps_of(arm: str, steps: int, width: int) -> int:
    """Steps that cost what `steps` of the dense model do, in the feed-forward networks."""
    return max(1, round(steps * width / active_width(arm, width)))


def shuffled(count: int, size: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Indices (size,) without end: all `count` in random order, then again in another."""
    order = torch.empty(0, dtype=torch.long)
    while True:
        while len(order) < size:
            order = torch.cat([order, torch.randperm(count, generator=generator)])
        yield order[:size]
        order = order[size:]


def positions(rows: int, length: int, facts_per_row: int) -> torch.Tensor:
    """Positions (rows, S) that begin anew at each fact, which keeps facts from seeing each other."""
    return torch.arange(length // facts_per_row).repeat(rows, facts_per_row)


def batches(data: dict[str, Any], args: CapacityArguments, job: Job) -> Iterator[dict[str, torch.Tensor]]:
    """Arguments of the model for each step: rows of facts, then rows of prose; the same for all arms of a seed."""
    states, labels = data["states"], data["labels"]
    count = args.fact_rows * args.facts_per_row
    facts = shuffled(job.facts, count, generator_for(args.seed, "facts", job.seed))
    prose = shuffled(args.prose_pool, args.prose_rows, generator_for(args.seed, "prose", job.seed))
    length = states["prose"].shape[1]
    at = torch.cat(
        [positions(args.fact_rows, length, args.facts_per_row), torch.arange(length).expand(args.prose_rows, -1)]
    )
    for _, some, rows in zip(range(job.steps), facts, prose, strict=False):
        fact_states = states["facts"][job.seed, some].reshape(args.fact_rows, length, -1)
        fact_labels = labels["facts"][job.seed, some].reshape(args.fact_rows, length)
        yield {
            "inputs_embeds": torch.cat([fact_states, states["prose"][rows]]),
            "labels": torch.cat([fact_labels, labels["prose"][rows]]),
            "position_ids": at,
        }


@torch.no_grad()
def prose_loss(model: MoEForCausalLM, data: dict[str, Any]) -> float:
    """Nats per token of held-out prose."""
    model.eval()
    rows = zip(data["states"]["held_out"].split(8), data["labels"]["held_out"].split(8), strict=True)
    total, count = 0.0, 0
    for states, labels in rows:
        logits = model(inputs_embeds=states, use_cache=False).logits[:, :-1].flatten(0, 1)
        total += nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum").item()
        count += labels[:, 1:].numel()
    return total / count


@torch.no_grad()
def recall(model: MoEForCausalLM, data: dict[str, Any], seed: int, facts: int) -> tuple[float, float]:
    """Bits recalled of a digit, and the share of facts whose digits are each the likeliest token; of the first `facts` of a seed's."""
    model.eval()
    bits, exact = [], []
    parts = (data[kind]["facts"][seed, :facts].split(64) for kind in ("states", "labels"))
    for states, labels in zip(*parts, strict=True):
        logits = model(inputs_embeds=states, use_cache=False).logits[:, -DIGITS - 1 : -1]  # (N, DIGITS, V)
        digits = labels[:, -DIGITS:]
        bits.append(nn.functional.cross_entropy(logits.transpose(1, 2), digits, reduction="none") / math.log(2))
        exact.append((logits.argmax(dim=-1) == digits).all(dim=1))
    return math.log2(10) - torch.cat(bits).mean().item(), torch.cat(exact).float().mean().item()


def trainable(model: MoEForCausalLM) -> list[nn.Parameter]:
    """Freezes all but feed-forward networks and routers, and returns these."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".mlp." in name)
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def train(job: Job, data: dict[str, Any], args: CapacityArguments) -> Run:
    """Trains an arm on cached states and measures it."""
    began = time.perf_counter()
    torch.manual_seed(job.seed)
    # a copy, which training changes
    state = {name: LazyTensor.of(tensor).map(torch.clone) for name, tensor in data["weights"].items()}
    model = load_state(*arm_model(job.arm, MoEConfig(**data["config"]), state, job.seed))
    parameters = trainable(model)
    initial = prose_loss(model, data)
    optimizer = torch.optim.AdamW(parameters, lr=job.learning_rate, weight_decay=0.0, fused=True)
    schedule = get_linear_schedule_with_warmup(optimizer, math.ceil(WARMUP * job.steps), job.steps)
    model.train()
    for batch in batches(data, args, job):
        model(**batch, use_cache=False).loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    bits, exact = recall(model, data, job.seed, job.facts)
    final = prose_loss(model, data)
    return Run(
        **asdict(job),
        initial_prose_loss=initial,
        prose_loss=final,
        recall_bits=bits,
        exact_match=exact,
        seconds=time.perf_counter() - began,
    )


def train_from_file(job: Job, path: str, args: CapacityArguments) -> Run:
    """[`train`] on one thread, the data from a file that all processes share."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return train(job, torch.load(path, mmap=True), args)
    finally:
        torch.set_num_threads(threads)


def settings_of(args: CapacityArguments) -> dict[str, Any]:
    """The arguments that a run depends on, beside its job."""
    return {
        name: value for name, value in asdict(args).items() if name not in (*FREE_ARGUMENTS, "steps", "sweep_steps")
    }


def finished_runs(args: CapacityArguments) -> dict[Job, Run]:
    """The runs in `runs_file`.

    Raises:
        UserError: if they are of other arguments, or it is not such a file.
    """
    file = RunsFile(args.runs_file, settings_of(args))
    return {run.job: run for run in file.read(lambda run: Run(**run))}


def run_jobs(
    jobs: Sequence[Job], path: str, args: CapacityArguments, done: dict[Job, Run], file: RunsFile, desc: str
) -> list[Run]:
    """Runs what is not in `done`, adds it there and to `file`; results in the order of `jobs`."""

    def finish(run: Run) -> None:
        done[run.job] = run
        file.add(asdict(run))

    missing = [(job, path, args) for job in jobs if job not in done]
    run_all(missing, train_from_file, args.workers, finish, file, desc)
    return [done[job] for job in jobs]


def interval(differences: Sequence[float]) -> tuple[float, float, float]:
    """Mean and 95% confidence interval by Student's t, for 2 to 10 numbers."""
    mean = statistics.fmean(differences)
    half = T_QUANTILES[len(differences) - 1] * statistics.stdev(differences) / math.sqrt(len(differences))
    return mean, mean - half, mean + half


def compare(runs: Sequence[Run]) -> list[Comparison]:
    """The pairs of `PAIRS` whose arms were run, seed by seed."""
    by_arm: dict[str, list[Run]] = {}
    for run in sorted(runs, key=lambda run: run.seed):
        by_arm.setdefault(run.arm, []).append(run)
    return [
        Comparison(
            metric,
            first,
            second,
            *interval(
                [getattr(a, metric) - getattr(b, metric) for a, b in zip(by_arm[first], by_arm[second], strict=True)]
            ),
        )
        for metric in METRICS
        for first, second in PAIRS
        if first in by_arm and second in by_arm
    ]


def best_rates(sweeps: Sequence[Run]) -> dict[str, float]:
    """The learning rate with the most recall, by arm; a run that diverged comes last."""

    def worth(run: Run) -> float:
        return run.recall_bits if math.isfinite(run.recall_bits) else -math.inf

    best: dict[str, Run] = {}
    for run in sweeps:
        if run.arm not in best or worth(run) > worth(best[run.arm]):
            best[run.arm] = run
    return {arm: run.learning_rate for arm, run in best.items()}


def capacity_experiment(args: CapacityArguments) -> CapacityResult:
    """Finds each arm's learning rate by short runs, then trains it with `seeds` seeds.

    Raises:
        UserError: for an argument, a model or a `runs_file` that cannot work, before anything is trained.
    """
    file, done = RunsFile(args.runs_file, settings_of(args)), finished_runs(args)
    data = prepare(args)
    width = data["config"]["intermediate_size"]
    row = data["states"]["prose"].shape[1]
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "data.pt")
        torch.save(data, path)
        del data
        # as few facts as steps, so that each is met as often as in the long runs
        least = args.fact_rows * args.facts_per_row
        some = min(args.facts, max(least, round(args.facts * args.sweep_steps / args.steps)))
        short = [
            Job(arm, 0, rate, steps_of(arm, args.sweep_steps, width), some) for arm in args.arms for rate in args.rates
        ]
        sweeps = run_jobs(short, path, args, done, file, "search for rates")
        rates = best_rates(sweeps)
        steps = {arm: steps_of(arm, args.steps, width) for arm in args.arms}
        seeds = range(1, args.seeds + 1)
        jobs = [Job(arm, seed, rates[arm], steps[arm], args.facts) for seed in seeds for arm in args.arms]
        runs = run_jobs(jobs, path, args, done, file, "runs")
    return CapacityResult(
        tokens=args.steps * (args.fact_rows + args.prose_rows) * row,
        active_widths={arm: active_width(arm, width) for arm in args.arms},
        steps=steps,
        rates=rates,
        sweeps=sweeps,
        runs=runs,
        comparisons=compare(runs),
    )
