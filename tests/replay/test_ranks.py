"""These tests replay recorded experts in two gloo processes, and compare gradients and figures with those of one process."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.distributed import DistributedConfig

from modeling_moe.replay import RoutingReplayCallback, RoutingStore, record_routing, replay_routing
from tests.builders import tiny_model
from tests.monitoring.test_callback import make_trainer
from tests.ranks import needs_transformers, run_ranks
from tests.training.families import tiny


RANKS = 2
IDS = torch.arange(3, 59).view(4, 14)
KINDS = ["moe", "mixtral"]
# transformers has a choice of exchanges from 5.23 on, and the expert parallelism of these tests from 5.19 on
CHOOSES = hasattr(DistributedConfig(), "ep_implementation")
EXCHANGES = ["all_reduce", "all_to_all"] if CHOOSES else [None]
IS_SPLIT = Version(transformers.__version__) >= Version("5.19")


def build(kind: str) -> PreTrainedModel:
    """Returns a model with equal weights on every rank."""
    if kind == "moe":
        return tiny_model(num_experts=6, router_aux_loss_coef=0.0, router_z_loss_coef=0.0)
    return tiny(kind)


def recorded(kind: str) -> RoutingStore:
    """Returns the choices of a model with other weights for three of the four texts."""
    other, store = build(kind), RoutingStore()
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.5 * parameter.std() * torch.randn_like(parameter) if parameter.numel() > 1 else 0
        with record_routing(other, store):
            other(IDS[:3], use_cache=False)
    return store


def backward(model, ids: torch.Tensor) -> None:
    model(input_ids=ids, use_cache=False).logits.square().sum().backward()


def gradients(model) -> dict[str, torch.Tensor]:
    found = {name.removeprefix("module."): parameter.grad for name, parameter in model.named_parameters()}
    return {name: grad.full_tensor() if hasattr(grad, "full_tensor") else grad for name, grad in found.items()}


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def in_one_process(kind: str) -> tuple[dict[str, torch.Tensor], tuple]:
    """Returns gradients and figures, of a replay that matters."""
    model = build(kind)
    backward(model, IDS)
    plain = gradients(model)
    model.zero_grad()
    with replay_routing(model, recorded(kind)) as replay:
        backward(model, IDS)
        figures = replay.figures()
    assert figures.coverage == 0.75
    assert figures.flipped > 0.1
    found = gradients(model)
    assert any(not torch.allclose(found[name], plain[name], rtol=0.1) for name in found)
    return found, tuple(figures)


def ddp(model):
    return DistributedDataParallel(model, find_unused_parameters=True)


def fsdp(model):
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


# where the replay is attached: outside the wrapper, or on the model before DDP wraps it
WRAPPERS = {"ddp": ddp, "ddp, replay first": ddp, "fsdp": fsdp}


def data_parallel(rank: int, folder: Path) -> None:
    for kind in KINDS:
        for wrapper, wrap in WRAPPERS.items():
            model = build(kind)
            inside = "first" in wrapper
            replay = replay_routing(model, recorded(kind)) if inside else None
            wrapped = wrap(model)
            replay = replay or replay_routing(wrapped, recorded(kind))
            rows = IDS[2 * rank : 2 * rank + 2]
            backward(wrapped, rows)
            alone = tuple(replay.figures(across_ranks=False))
            backward(wrapped, rows)
            torch.save((gradients(wrapped), tuple(replay.figures()), alone), folder / f"{kind}, {wrapper}{rank}.pt")


def train(folder: Path, batch: int) -> list[dict]:
    """Returns the figures that two steps of a Trainer log, of a model that does not move."""
    callback = RoutingReplayCallback(recorded("mixtral"))
    fields = {"max_steps": 2, "report_to": "none", "learning_rate": 0.0, "per_device_train_batch_size": batch}
    trainer = make_trainer(build("mixtral"), folder, [callback], ids=IDS.repeat(2, 1), **fields)
    trainer.train()
    logs = [{key: entry[key] for key in entry if key.startswith("replay/")} for entry in trainer.state.log_history]
    assert logs.pop() == {}
    return logs


def rank_main(rank: int, folder: Path) -> None:
    data_parallel(rank, folder)
    (folder / f"trainer{rank}.json").write_text(json.dumps(train(folder, 4)))
    for implementation in EXCHANGES if IS_SPLIT else ():
        expert_parallel(rank, folder, implementation)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Returns a folder with what two processes computed, which are started once, because their imports take longest."""
    folder = tmp_path_factory.mktemp("ranks")
    for kind in KINDS:
        build(kind).save_pretrained(folder / kind)
    run_ranks(rank_main, RANKS, folder)
    return folder


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("kind", KINDS)
def test_two_data_parallel_ranks_replay_what_one_process_does(kind, wrapper, folder):
    expected, figures = in_one_process(kind)
    alone = []
    for rank in range(RANKS):
        got, together, own = torch.load(folder / f"{kind}, {wrapper}{rank}.pt")
        assert together == pytest.approx(figures)
        alone.append(own)
        for name, tensor in expected.items():
            # both wrappers average over the ranks, and each rank ran its texts twice
            close(got[name], tensor)
    assert [coverage for coverage, _ in alone] == [1, 0.5]


def test_a_trainer_logs_the_figures_of_both_ranks(folder, tmp_path):
    one, other = (json.loads((folder / f"trainer{rank}.json").read_text()) for rank in range(RANKS))
    assert one == other
    alone = train(tmp_path, 8)
    assert alone[0]["replay/coverage"] == 0.75
    assert [entry == pytest.approx(wanted) for entry, wanted in zip(one, alone, strict=True)] == [True, True]


def expert_parallel(rank: int, folder: Path, implementation: str | None) -> None:
    chosen = {"ep_implementation": implementation} if CHOOSES else {}
    plan = DistributedConfig(tp_size=RANKS, ep_size=RANKS, **chosen)
    for kind in KINDS:
        model = AutoModelForCausalLM.from_pretrained(
            folder / kind, distributed_config=plan, experts_implementation="moe"
        )
        with record_routing(model) as recorder, torch.no_grad():
            model(IDS, use_cache=False)
        mine = [recorder.store.find(row) for row in IDS]
        with replay_routing(model, recorded(kind)) as replay:
            backward(model, IDS)
            found = (gradients(model), tuple(replay.figures()), mine)
            torch.save(found, folder / f"{kind}, {implementation}{rank}.pt")


@needs_transformers("5.19", "expert parallelism")
@pytest.mark.parametrize("implementation", EXCHANGES)
@pytest.mark.parametrize("kind", KINDS)
def test_two_expert_parallel_ranks_record_and_replay_what_one_process_does(kind, implementation, folder):
    expected, figures = in_one_process(kind)
    with record_routing(build(kind)) as recorder, torch.no_grad():
        recorder._model(IDS, use_cache=False)
    for rank in range(RANKS):
        got, together, mine = torch.load(folder / f"{kind}, {implementation}{rank}.pt")
        assert together == pytest.approx(figures)
        for row, experts in zip(IDS, mine, strict=True):
            assert torch.equal(experts, recorder.store.find(row))
        for name, tensor in expected.items():
            close(got[name], tensor)
