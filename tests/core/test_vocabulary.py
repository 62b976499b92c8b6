"""Tests of routers that read token ids when the vocabulary grows, and of tasks that are given for each token in `generate`."""

import pytest
import torch

from modeling_moe import MoEForCausalLM
from modeling_moe.router_assigned import HashRouter
from tests.builders import tiny_config


@pytest.mark.parametrize(
    "fields", [{"router_type": "hash"}, {"router_type": "hash_scored"}, {"num_hash_layers": 2}], ids=str
)
def test_a_token_added_to_the_vocabulary_has_experts(fields, tmp_path):
    model = MoEForCausalLM(tiny_config(**fields)).eval()
    ids = torch.arange(1, 11)[None]
    with torch.no_grad():
        before = model(ids).logits
        model.resize_token_embeddings(104, mean_resizing=False)
        torch.testing.assert_close(model(ids).logits[..., :99], before, rtol=1e-5, atol=1e-5)
        tables = [module.table for module in model.modules() if isinstance(module, HashRouter)]
        assert tables
        for table in tables:
            assert table.shape == (104, 3)
            assert all(len(set(row)) == 3 for row in table[99:].tolist())
            assert 0 <= table.min() <= table.max() < 5
        new = torch.tensor([[1, 99, 103]])
        expected = model(new).logits
        assert expected.isfinite().all()
        model.save_pretrained(tmp_path)
        assert torch.equal(MoEForCausalLM.from_pretrained(tmp_path).eval()(new).logits, expected)
        model.resize_token_embeddings(50)
        for old, module in zip(tables, (m for m in model.modules() if isinstance(m, HashRouter)), strict=True):
            assert torch.equal(module.table, old[:50])


def test_a_balanced_table_keeps_its_old_rows_when_it_grows():
    router = HashRouter(tiny_config(router_type="hash"))
    router.set_counts(torch.arange(99))
    old = router.table.clone()
    router.resize_vocabulary(120)
    assert torch.equal(router.table[:99], old)


@pytest.mark.parametrize("router_type", ["task", "mmoe"])
def test_generate_takes_a_task_for_each_token_of_the_prompt(router_type):
    model = MoEForCausalLM(tiny_config(router_type=router_type, num_tasks=3, eos_token_id=None)).eval()
    ids, tasks = torch.arange(1, 11).view(2, 5), torch.tensor([[0, 0, 1, 2, 1], [2, 2, 2, 2, 0]])
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    expected, each = ids, tasks
    for _ in range(4):
        with torch.no_grad():
            new = model(expected, task_ids=each, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
        expected, each = torch.cat([expected, new], 1), torch.cat([each, tasks[:, -1:]], 1)
    assert torch.equal(model.generate(ids, task_ids=tasks, **options), expected)
    assert torch.equal(model.generate(ids, task_ids=tasks, use_cache=False, **options), expected)
    uniform = tasks[:, -1:].expand(-1, 5)
    assert torch.equal(
        model.generate(ids, task_ids=uniform, **options), model.generate(ids, task_ids=tasks[:, -1], **options)
    )


@pytest.mark.parametrize("num_tasks", [1, 3, 8])
@pytest.mark.parametrize("hidden_size", [24, 33])
def test_a_task_router_gives_equal_logits_after_loading(num_tasks, hidden_size, tmp_path):
    model = MoEForCausalLM(tiny_config(router_type="task", num_tasks=num_tasks, hidden_size=hidden_size)).eval()
    ids, tasks = torch.arange(1, 19).view(2, 9), {"task_ids": torch.tensor([0, num_tasks - 1])}
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        loaded = MoEForCausalLM.from_pretrained(tmp_path).eval()
        assert torch.equal(loaded(ids, **tasks).logits, model(ids, **tasks).logits)
