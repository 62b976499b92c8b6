"""These tests compare the figures of two gloo processes with those of one process."""

import pytest
import torch
import torch.distributed as dist
import transformers
from packaging.version import Version
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from modeling_moe import watch
from tests.builders import tiny_model
from tests.ranks import run_ranks
from tests.training.families import tiny


RANKS = 2
IDS = torch.arange(3, 59).view(4, 14)
MASK = torch.ones_like(IDS)
MASK[0, :5] = MASK[3, :2] = 0
# before 5.23 there was one exchange
CHOOSES = hasattr(DistributedConfig(), "ep_implementation")
HAS_EXPERT_PARALLELISM = Version(transformers.__version__) >= Version("5.19")


def build(kind: str):
    if kind == "moe":
        return tiny_model(num_experts=6, num_null_experts=2, capacity_factor=0.9)
    return tiny(kind)


def close(figures, expected) -> None:
    for got, want in zip(figures.layers, expected.layers, strict=True):
        assert got.tokens == want.tokens
        assert torch.equal(got.load, want.load)
        assert got.scoring == want.scoring
        torch.testing.assert_close(got.co_activation, want.co_activation, atol=1e-12, rtol=0)
    assert figures.overall == pytest.approx(expected.overall, rel=1e-5, abs=1e-7)


def one_process(model, rows=slice(None)):
    with watch(model) as routing:
        model(input_ids=IDS[rows], attention_mask=MASK[rows])
    return routing.read(across_ranks=False)


def distributed(model, wrapper: str):
    if wrapper == "ddp":
        return DistributedDataParallel(model)
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def data_parallel(rank: int) -> None:
    rows = slice(2 * rank, 2 * rank + 2)
    for kind, wrapper in (("moe", "ddp"), ("mixtral", "fsdp")):
        expected, mine = one_process(build(kind)), one_process(build(kind), rows)
        model = distributed(build(kind), wrapper)
        with watch(model) as routing:
            model(input_ids=IDS[rows], attention_mask=MASK[rows]).logits.sum().backward()
        close(routing.read(), expected)
        close(routing.read(across_ranks=False), mine)
    one_rank_without_tokens(rank)


def one_rank_without_tokens(rank: int) -> None:
    model = build("mixtral")
    routing = watch(model)
    assert routing.read().layers[0].tokens == 0  # no rank has a pass
    if rank == 1:
        model(input_ids=IDS, attention_mask=MASK)
    figures = routing.read(reset=True)
    assert figures.layers[0].tokens == MASK.sum()
    assert routing.read().scalars() == {}


def expert_parallel(rank: int, folder: str, kind: str, implementation: str | None) -> None:
    chosen = {"ep_implementation": implementation} if CHOOSES else {}
    plan = DistributedConfig(tp_size=RANKS, ep_size=RANKS, **chosen)
    model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=plan, experts_implementation="moe")
    with watch(model) as routing:
        model(input_ids=IDS, attention_mask=MASK)
    expected = one_process(AutoModelForCausalLM.from_pretrained(folder))
    close(routing.read(), expected)
    assert all(layer.num_experts == len(layer.load) for layer in expected.layers)
    dist.barrier()


# up to 5.23 some families hide the ids of other processes' experts from a process
KINDS = [("mixtral", "all_to_all"), ("moe", "all_reduce")] if CHOOSES else [("qwen3_moe", None), ("moe", None)]


def both(rank: int, folder: str) -> None:
    data_parallel(rank)
    if HAS_EXPERT_PARALLELISM:
        expert_parallel(rank, folder, *KINDS[0])


def test_figures_are_those_of_all_ranks_and_a_shared_batch_counts_once(tmp_path):
    build(KINDS[0][0]).save_pretrained(tmp_path)
    run_ranks(both, RANKS, str(tmp_path))


@pytest.mark.slow
@pytest.mark.skipif(not HAS_EXPERT_PARALLELISM, reason="expert parallelism needs transformers 5.19")
def test_a_batch_that_ranks_of_the_other_implementation_share_counts_once(tmp_path):
    kind, implementation = KINDS[1]
    build(kind).save_pretrained(tmp_path)
    run_ranks(expert_parallel, RANKS, str(tmp_path), kind, implementation)
