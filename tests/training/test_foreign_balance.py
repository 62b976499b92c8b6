"""These tests train transformers' own MoE models with this package's router losses; the oracle is this package's model."""

import json
import pickle
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, LlamaConfig, Trainer, TrainerCallback

from modeling_moe.conversion import to_moe
from modeling_moe.monitoring import sparse_layers
from modeling_moe.training import MoECallback, balance, balances_of
from modeling_moe.utils.errors import UserError
from tests.builders import SHAPE, tiny_model, training_arguments
from tests.training.families import tiny


FAMILIES = ("mixtral", "qwen3_moe", "olmoe", "deepseek_v3")
LOSSES = {
    "batch": {"router_aux_loss_coef": 2.0, "router_z_loss_coef": 0.3},
    "sequence": {
        "router_aux_loss_coef": 2.0,
        "router_aux_loss_scope": "sequence",
        "router_seq_aux_loss_coef": 1.0,
        "router_entropy_loss_coef": 0.5,
    },
}
SUMS = LOSSES["sequence"] | {"router_z_loss_coef": 0.3}
CHECKPOINTING = {"none": None, "non_reentrant": False, "reentrant": True}
ITEMS = 40  # labels of an optimizer step, of which a batch here has some


def foreign(family: str, seed: int = 0, **fields):
    """Returns a tiny model of transformers in float64 and training mode, whose router logits are not small."""
    model = tiny(family, **fields)
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    model.set_experts_implementation("eager")  # serves float64
    return model.double().train()


def skip_unread(model) -> None:
    """Skips the test if the installed release of transformers does not declare the model's router logits."""
    if any(layer.router is None for layer in sparse_layers(model)):
        pytest.skip(f"transformers {transformers.__version__} declares no router logits of {type(model).__name__}")


def padded_batch(seed: int = 0) -> dict:
    """Returns three rows, padded on either side, with a prompt, and a step that counts its labels."""
    torch.manual_seed(seed)
    ids = torch.randint(3, 64, (3, 9))
    mask = torch.ones_like(ids)
    mask[0, 6:], mask[2, : 2 + seed] = 0, 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[1, :4] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "num_items_in_batch": ITEMS}


def gradients(model) -> dict[str, torch.Tensor]:
    """Takes the gradients of a model."""
    taken = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return taken


def assert_close(got: dict, expected: dict, limit: float = 1e-10) -> None:
    """Compares tensors by name, relative to the largest entry of each."""
    assert got.keys() == expected.keys()
    assert got
    for name, tensor in expected.items():
        atol = limit * max(tensor.abs().max().item(), 1e-3)
        torch.testing.assert_close(got[name], tensor, rtol=0, atol=atol, msg=lambda text, name=name: f"{name} {text}")


def step(model, batch: dict) -> dict[str, torch.Tensor]:
    """Returns the gradients of one batch."""
    model(**batch).loss.backward()
    return gradients(model)


def packed_batch() -> dict:
    """Returns two rows of two sequences each, which only the positions tell, with labels of unequal number."""
    batch = padded_batch()
    positions = torch.stack([torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 4]), torch.tensor([0, 1, 2, 3, 4, 5, 0, 1, 2])])
    labels = batch["input_ids"][:2].clone()
    labels[0, :3] = labels[:, 4] = labels[1, 6] = -100
    return {
        "input_ids": batch["input_ids"][:2],
        "position_ids": positions,
        "use_cache": False,  # with a cache, transformers lets packed sequences attend to each other
        "labels": labels,
        "num_items_in_batch": ITEMS,
    }


def counted_passes(handle) -> int:
    """Returns the number of layers' passes since the losses were read last."""
    return handle._means._counts["balance"]


BATCHES = {"padded": padded_batch, "packed": packed_batch}
ORACLES = [(family, losses, "padded") for family in FAMILIES for losses in LOSSES]
ORACLES += [("mixtral", "sequence", "packed"), ("qwen3_moe", "batch", "packed")]


@pytest.mark.parametrize(("family", "losses", "kind"), ORACLES)
def test_gradients_are_those_of_our_model(family, losses, kind):
    theirs = foreign(family)
    skip_unread(theirs)
    ours = to_moe(deepcopy(theirs)).double().train()
    ours.set_experts_implementation("eager")
    for name, value in ({"router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.0} | LOSSES[losses]).items():
        setattr(ours.config, name, value)
    batch = BATCHES[kind]()
    expected = step(ours, batch)
    with balance(theirs, **LOSSES[losses]):
        got = step(theirs, batch)
    without = step(theirs, batch)
    # a conversion permutes and stacks weights, gradients alike
    as_weights = deepcopy(theirs)
    for name, parameter in as_weights.named_parameters():
        parameter.data = got.get(name, torch.zeros_like(parameter))
    converted = to_moe(as_weights).state_dict()
    assert_close({name: converted[name].double() for name in expected}, expected, 1e-6)
    # the losses are not lost beside the cross entropy
    router = next(name for name in got if name.endswith("gate.weight"))
    assert (got[router] - without[router]).norm() > 0.1 * without[router].norm()


def loss_by_hand(model, batch: dict, coefficient: float, scoring: str) -> torch.Tensor:
    """Returns the cross entropy plus the balance loss of each layer, from the router's matrix and a count of its choices."""
    layers, states, chosen, hooks = sparse_layers(model), {}, {}, []
    for layer in layers:
        block = model.get_submodule(layer.name.rpartition(".")[0])

        def keep_states(module, args, name=layer.name):
            states[name] = args[0].reshape(-1, args[0].shape[-1])

        def keep_choice(module, args, name=layer.name):
            chosen[name] = args[1].reshape(len(states[name]), -1)

        hooks += [block.register_forward_pre_hook(keep_states), layer.experts.register_forward_pre_hook(keep_choice)]
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    for hook in hooks:
        hook.remove()
    labels = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100).flatten()
    real = batch["attention_mask"].flatten().double()
    total = torch.zeros((), dtype=torch.float64)
    for layer in layers:
        matrix = next(weight for weight in layer.router.parameters() if weight.dim() == 2)
        scores = states[layer.name] @ matrix.T
        if hasattr(layer.router, "bias"):
            scores = scores + layer.router.bias
        probs = scores.softmax(-1) if scoring == "softmax" else scores.sigmoid()
        probs = probs / probs.sum(-1, keepdim=True)
        share = torch.zeros_like(probs).scatter(1, chosen[layer.name], 1.0) * real[:, None] / real.sum()
        total = total + probs.shape[-1] * (share.sum(0) * (probs * real[:, None]).sum(0) / real.sum()).sum() / len(
            layers
        )
    entropy = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels, ignore_index=-100, reduction="sum")
    return (entropy + coefficient * (labels != -100).sum() * total) / batch["num_items_in_batch"]


@pytest.mark.parametrize(
    ("family", "scoring"),
    [("gpt_oss", "softmax"), ("glm4_moe", "sigmoid"), ("minimax_m2", "sigmoid"), ("ernie4_5_moe", "softmax")],
)
def test_gradients_are_those_of_a_loss_written_by_hand(family, scoring):
    model, batch = foreign(family), padded_batch()
    skip_unread(model)
    for name, tensor in [*model.named_buffers(), *model.named_parameters()]:
        if "correction_bias" in name:
            torch.nn.init.normal_(
                tensor.data, std=0.3
            )  # the chosen experts are not those of the largest probabilities
    loss_by_hand(model, batch, 0.7, scoring).backward()
    expected = gradients(model)
    with balance(model, router_aux_loss_coef=0.7):
        got = step(model, batch)
    assert_close(got, expected, 1e-5)  # transformers' routers compute in fp32
    router = sparse_layers(model)[-1].name.rpartition(".")[0]
    without = step(model, batch)
    assert any(
        (got[name] - without[name]).norm() > 0.1 * without[name].norm() for name in got if name.startswith(router)
    )


def test_losses_are_those_that_transformers_computes_for_one_layer():
    model = foreign("mixtral", num_hidden_layers=1)
    batch = padded_batch()
    expected = model(**batch, output_router_logits=True).aux_loss.item()
    with balance(model, router_aux_loss_coef=1.0) as handle:
        model(**batch)
        model(**batch)
        assert handle.losses() == {"balance": pytest.approx(expected, rel=1e-6)}
        assert handle.losses() == {}


def test_balanced_router_has_the_loss_k_by_hand():
    model = foreign("mixtral", num_hidden_layers=1, num_local_experts=4, num_experts_per_tok=2)
    gate = model.model.layers[0].mlp.gate
    with torch.no_grad():
        gate.weight.zero_()
    with balance(model, router_aux_loss_coef=1.0) as handle:
        model(**padded_batch())
        assert handle.losses()["balance"] == pytest.approx(2.0)  # N sum f_i / N = sum f_i = K


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
@pytest.mark.parametrize("order", ["together", "first_in_first_out"])
@pytest.mark.parametrize("kind", CHECKPOINTING)
def test_checkpointing_and_two_batches_before_backward(kind, order, family):
    """Each repeated layer needs the padding and the share of its batch, not those of the batch that ran last."""
    model = foreign(family)
    skip_unread(model)
    batches = [padded_batch(0), padded_batch(3)]
    with balance(model, **LOSSES["sequence"]) as handle:
        separate = [step(model, batch) for batch in batches]
        expected = {name: separate[0][name] + separate[1][name] for name in separate[0]}
        if kind != "none":
            model.gradient_checkpointing_enable({"use_reentrant": CHECKPOINTING[kind]})
            model.enable_input_require_grads()
        handle.losses()
        losses = [model(**batch).loss for batch in batches]
        if order == "together":
            sum(losses).backward()
        else:
            for loss in losses:
                loss.backward()
        assert_close(gradients(model), expected)
        assert counted_passes(handle) == 2 * len(handle._observation.layers)  # a repeated layer counts once


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_a_batch_that_an_error_ends_leaves_nothing_for_the_next(error):
    model = foreign("mixtral")

    def stop(*_):
        raise error

    with balance(model, **SUMS):
        expected = step(model, padded_batch(3))
        hook = model.model.layers[1].mlp.register_forward_pre_hook(stop)
        with pytest.raises(error), torch.no_grad():
            model(**padded_batch())
        hook.remove()
        assert_close(step(model, padded_batch(3)), expected)


def test_another_checkpointing_is_refused():
    model = foreign("mixtral")
    layer = model.model.layers[0]
    forward = layer.forward
    layer.forward = lambda *args, **kwargs: checkpoint(forward, *args, use_reentrant=False, **kwargs)
    with balance(model, router_aux_loss_coef=1.0), pytest.raises(RuntimeError, match="gradient_checkpointing_enable"):
        model(**padded_batch(), use_cache=False).loss.backward()


def test_passes_without_gradient_and_evaluation_count_nothing():
    model = foreign("deepseek_v3")
    skip_unread(model)
    with balance(model, router_aux_loss_coef=1.0, router_bias_update_rate=0.1) as handle:
        with torch.no_grad():
            model(**padded_batch())
        model.eval()(**padded_batch()).loss.backward()
        evaluated = gradients(model)
        handle.step()
        assert handle.losses() == {}
        assert not any(bias.tensor.any() for bias in handle.biases)
    assert_close(step(model, padded_batch()), evaluated)


def test_a_copy_of_the_model_is_not_balanced():
    model = foreign("mixtral")
    with balance(model, router_aux_loss_coef=1.0) as handle:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        step(model, padded_batch())
        handle.losses()
        copy = deepcopy(model)
        got = step(copy, padded_batch())
        assert handle.losses() == {}
    assert_close(got, step(model, padded_batch()))


@pytest.mark.parametrize("copied", [deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"])
def test_a_copy_of_the_model_has_the_loss_of_transformers(copied):
    fields = {"output_router_logits": True, "router_aux_loss_coef": 3.0}
    model = foreign("mixtral", **fields)
    with balance(model, router_aux_loss_coef=1.0) as handle:
        got = step(copied(model), padded_batch())
        assert handle.losses() == {}
    assert_close(got, step(foreign("mixtral", **fields), padded_batch()))


def test_the_evaluation_loss_is_that_of_transformers():
    model = foreign("mixtral", output_router_logits=True, router_aux_loss_coef=3.0).eval()
    expected = model(**padded_batch()).loss
    with balance(model, router_aux_loss_coef=1.0):
        assert torch.equal(model(**padded_batch()).loss, expected)


def test_a_decoder_without_head_returns_router_logits_without_gradient():
    model = foreign("mixtral").model
    batch = {name: padded_batch()[name] for name in ("input_ids", "attention_mask")}
    with balance(model, router_aux_loss_coef=1.0):
        assert not any(logits.requires_grad for logits in model(**batch, output_router_logits=True).router_logits)
    assert all(logits.requires_grad for logits in model(**batch, output_router_logits=True).router_logits)


@pytest.mark.parametrize("rows", [1, 3])
def test_a_classifier_of_sequences_counts_one_label_for_each_row(rows):
    config = foreign("mixtral", num_labels=3).config
    model = transformers.MixtralForSequenceClassification(config).double().train()
    batch = {name: padded_batch()[name][:rows] for name in ("input_ids", "attention_mask")}
    batch["labels"] = torch.arange(rows)
    with balance(model, router_aux_loss_coef=1.0):
        assert_close(step(model, batch | {"num_items_in_batch": rows}), step(model, batch))


def test_a_model_that_reads_the_factor_from_its_configuration_returns_the_plain_loss():
    """Vision-language models do so, and have no factor of their own."""
    model = foreign("mixtral", router_aux_loss_coef=3.0, output_router_logits=True)
    del model.router_aux_loss_coef
    model.__class__ = type(
        "Reads", (type(model),), {"router_aux_loss_coef": property(lambda self: self.config.router_aux_loss_coef)}
    )
    plain = model(**padded_batch(), output_router_logits=False).loss
    assert model(**padded_batch()).loss > plain
    with balance(model, router_aux_loss_coef=1.0):
        torch.testing.assert_close(model(**padded_batch()).loss, plain)
        assert model.config.router_aux_loss_coef == 3.0

        def interrupt(*_):
            raise KeyboardInterrupt

        hook = model.model.layers[1].mlp.register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(**padded_batch())
        hook.remove()
    assert model.config.router_aux_loss_coef == 3.0


@pytest.mark.parametrize("output_router_logits", [True, False])
def test_the_loss_of_transformers_is_off_and_comes_back(output_router_logits):
    model = foreign("mixtral", router_aux_loss_coef=5.0, output_router_logits=output_router_logits)
    before = step(model, padded_batch())
    model.config.output_router_logits = False
    plain = step(model, padded_batch())
    model.config.output_router_logits = output_router_logits
    handle = balance(model, router_aux_loss_coef=0.0, router_z_loss_coef=1e-12)
    assert_close(step(model, padded_batch()), plain)
    explicit = model(**padded_batch(), output_router_logits=True)
    assert explicit.aux_loss is not None
    torch.testing.assert_close(explicit.loss, model(**padded_batch(), output_router_logits=False).loss)
    handle.detach()
    assert_close(step(model, padded_batch()), before)


def test_detaching_leaves_no_trace():
    model = foreign("deepseek_v3")
    skip_unread(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})

    def state() -> dict:
        hooks = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_always_called", "_forward_hooks_with_kwargs")
        found = {(name, hook): dict(getattr(module, hook)) for name, module in model.named_modules() for hook in hooks}
        kept = {name: {k: v for k, v in vars(m).items() if "hooks" not in k} for name, m in model.named_modules()}
        return found | kept | {"config": model.config.to_dict()}

    before = state()
    handle = balance(model, router_aux_loss_coef=1.0, router_bias_update_rate=0.1)
    step(model, padded_batch())
    handle.detach()
    handle.detach()
    assert state() == before
    assert balances_of(model) == []


def test_mistakes_have_one_clear_line():
    dense = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE))
    with pytest.raises(ValueError, match="LlamaForCausalLM is a dense model"):
        balance(dense, router_aux_loss_coef=1.0)
    with pytest.raises(UserError, match="trains its router losses and selection biases itself"):
        balance(tiny_model(), router_aux_loss_coef=1.0)
    with pytest.raises(ValueError, match="does not follow transformers' experts interface"):
        balance(tiny("jetmoe"), router_aux_loss_coef=1.0)
    with pytest.raises(UserError, match="neither softmax nor sigmoid"):
        balance(tiny("phimoe"), router_aux_loss_coef=1.0)
    model = foreign("mixtral", router_aux_loss_coef=0.0)
    with pytest.raises(UserError, match="nothing to balance"):
        balance(model)
    with pytest.raises(UserError, match="router_z_loss_coef is -1"):
        balance(model, router_z_loss_coef=-1)
    with pytest.raises(UserError, match="router_aux_loss_scope is 'global'"):
        balance(model, router_aux_loss_coef=1.0, router_aux_loss_scope="global")
    with pytest.raises(UserError, match="no router of MixtralForCausalLM has a selection bias"):
        balance(model, router_bias_update_rate=0.1)
    assert balances_of(model) == []
    with balance(model, router_aux_loss_coef=1.0), pytest.raises(UserError, match="balanced already"):
        balance(model, router_aux_loss_coef=1.0)


def test_the_coefficient_of_the_configuration_is_the_default():
    with balance(foreign("mixtral", router_aux_loss_coef=0.25)) as handle:
        assert handle.settings.router_aux_loss_coef == 0.25


@pytest.mark.slow
def test_compiled_model_has_the_gradients_of_the_plain_one():
    model = foreign("mixtral", num_hidden_layers=1)
    model.set_experts_implementation("grouped_mm")
    model.float()
    with balance(model, **SUMS):
        expected = step(model, padded_batch())
        torch.compile(model, backend="aot_eager")(**padded_batch()).loss.backward()
        assert_close(gradients(model), expected, 1e-4)


# with a Trainer ------------------------------------------------------------------------------------------------------

ROWS = 8


def rows() -> list[dict]:
    """Returns sequences of unequal lengths with labels after prompts of unequal lengths."""
    torch.manual_seed(1)
    found = []
    for i in range(ROWS):
        ids = torch.randint(3, 64, (5 + 2 * i,)).tolist()
        found.append({"input_ids": ids, "labels": [-100] * (1 + i) + ids[1 + i :]})
    return found


def pad(batch: list[dict]) -> dict[str, torch.Tensor]:
    """Pads on the right to the longest sequence of the micro-batch."""
    columns = {name: [torch.tensor(row[name]) for row in batch] for name in ("input_ids", "labels")}
    columns["attention_mask"] = [torch.ones_like(ids) for ids in columns["input_ids"]]
    values = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    return {name: pad_sequence(columns[name], True, value) for name, value in values.items()}


class Recorder(TrainerCallback):
    """Keeps the gradients of the last step."""

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        """Copies the gradients."""
        self.gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def train(model, folder, **fields) -> Recorder:
    """Returns the gradients of one step of a Trainer."""
    recorder = Recorder()
    Trainer(
        model=model,
        args=training_arguments(folder, **fields),
        train_dataset=Dataset.from_list(rows()),
        data_collator=pad,
        callbacks=[recorder],
    ).train()
    return recorder


@pytest.mark.parametrize("smoothing", [0.0, 0.1], ids=["labels", "label_smoothing"])
def test_gradient_of_a_step_does_not_depend_on_the_split(smoothing, tmp_path):
    steps = {}
    for split, kind in ((1, "none"), (2, "none"), (4, "reentrant"), (8, "non_reentrant")):
        fields = {} if kind == "none" else {"gradient_checkpointing": True}
        if fields:
            fields["gradient_checkpointing_kwargs"] = {"use_reentrant": CHECKPOINTING[kind]}
        model = foreign("mixtral")
        with balance(model, **SUMS):
            sizes = {"per_device_train_batch_size": ROWS // split, "gradient_accumulation_steps": split}
            steps[split] = train(model, tmp_path, label_smoothing_factor=smoothing, **sizes, **fields).gradients
    for split in (2, 4, 8):
        assert_close(steps[split], steps[1], 1e-6)
    router = "model.layers.0.mlp.gate.weight"
    without = train(foreign("mixtral"), tmp_path, label_smoothing_factor=smoothing).gradients[router]
    assert (steps[1][router] - without).norm() > 0.1 * without.norm()


def test_trainer_adds_our_loss_once_beside_that_of_the_configuration(tmp_path):
    model = foreign("mixtral", router_aux_loss_coef=3.0, output_router_logits=True)
    with balance(model, router_aux_loss_coef=3.0):
        got = train(model, tmp_path).gradients
    ours = to_moe(foreign("mixtral")).double().train()
    ours.set_experts_implementation("eager")
    ours.config.router_aux_loss_coef, ours.config.router_z_loss_coef = 3.0, 0.0
    expected = step(ours, pad(rows()))
    for layer in range(2):
        gate = f"model.layers.{layer}.mlp.gate.weight"
        assert_close({gate: got[gate]}, {gate: expected[gate]}, 1e-6)


def test_callback_sets_fp16_scales_and_skips_what_the_scaler_skips(tmp_path):
    """The scaler of fp16 training is a stand-in: it runs on GPUs only."""
    model = foreign("minimax_m2")
    args = training_arguments(tmp_path, gradient_accumulation_steps=4)
    optimizer = SimpleNamespace(scaler=SimpleNamespace(get_scale=lambda: 1024.0), step_was_skipped=True)
    given = {"model": model, "optimizer": optimizer, "train_dataloader": [None] * 4}
    callback, state = MoECallback(), SimpleNamespace(global_step=0)
    with balance(model, router_aux_loss_coef=1.0, router_bias_update_rate=0.1) as handle:
        callback.on_step_begin(args, state, None, **given)
        assert (handle.scale, handle.token_scale) == (256.0, 1024.0)
        for skipped in (True, False):
            optimizer.step_was_skipped = skipped
            model(**padded_batch())
            callback.on_optimizer_step(args, state, None, **given)
            assert any(bias.tensor.any() for bias in handle.biases) != skipped


@pytest.mark.parametrize("when", ["before", "after"], ids=["balanced_first", "adapted_first"])
def test_lora_on_routers_and_experts(when, tmp_path):
    config = LoraConfig(target_parameters=["mlp.gate.weight", "mlp.experts.down_proj"], r=2, init_lora_weights=False)
    steps = {}
    for split in (1, 4):
        torch.manual_seed(3)
        model = foreign("mixtral")
        handle = balance(model, **SUMS) if when == "before" else None
        adapted = get_peft_model(model, config)
        handle = handle or balance(adapted, **SUMS)
        sizes = {"per_device_train_batch_size": ROWS // split, "gradient_accumulation_steps": split}
        steps[split] = train(adapted, tmp_path, **sizes).gradients
        handle.detach()
    assert any("gate" in name for name in steps[1])
    assert_close(steps[4], steps[1], 1e-6)


trl = pytest.importorskip("trl")


@pytest.mark.parametrize("split", [1, 4])
def test_sft_adds_our_loss_once_and_saves_the_configuration_unchanged(split, tmp_path, tokenizer):
    def sft(**losses):
        model = foreign("mixtral", router_aux_loss_coef=2.0, vocab_size=300).float()
        handle = balance(model, **losses) if losses else None
        recorder = Recorder()
        args = training_arguments(tmp_path).to_dict()
        names = ("output_dir", "use_cpu", "max_steps", "max_grad_norm", "optim", "save_strategy", "disable_tqdm")
        own = {} if losses else {"router_aux_loss_coef": 0.0}
        config = trl.SFTConfig(
            **{name: args[name] for name in names},
            **own,
            per_device_train_batch_size=ROWS // split,
            gradient_accumulation_steps=split,
            report_to="none",
            bf16=False,
            gradient_checkpointing=False,
        )
        trainer = trl.SFTTrainer(
            model=model,
            args=config,
            train_dataset=Dataset.from_list([{"input_ids": row["input_ids"]} for row in rows()]),
            processing_class=tokenizer,
            callbacks=[recorder],
        )
        trainer.train()
        trainer.save_model(str(tmp_path / "saved"))
        if handle is not None:
            handle.detach()
        return recorder.gradients

    sums = {"router_aux_loss_coef": 2.0, "router_aux_loss_scope": "sequence"}
    got = sft(**sums)
    assert not json.loads((tmp_path / "saved" / "config.json").read_text()).get("output_router_logits", False)
    without = sft()
    ours = to_moe(foreign("mixtral", vocab_size=300).float()).train()
    ours.config.router_z_loss_coef = 0.0
    for name, value in sums.items():
        setattr(ours.config, name, value)
    for row in rows():
        (ours.model(torch.tensor([row["input_ids"]]), attach_router_loss=False).router_loss / ROWS).backward()
    expected = gradients(ours)
    for layer in range(2):
        gate = f"model.layers.{layer}.mlp.gate.weight"
        assert_close({gate: got[gate] - without[gate]}, {gate: expected[gate]}, 1e-4)


@pytest.mark.slow
def test_the_reference_model_of_dpo_is_not_balanced(tmp_path, tokenizer):
    model = foreign("mixtral", vocab_size=300).float()
    args = trl.DPOConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        max_steps=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        save_strategy="no",
        report_to="none",
        bf16=False,
        gradient_checkpointing=True,
        disable_tqdm=True,
    )
    pairs = [{"prompt": "to the old", "chosen": " mill" * i, "rejected": " Weg"} for i in range(1, 9)]
    with balance(model, **SUMS) as handle:
        trl.DPOTrainer(
            model=model,
            ref_model=deepcopy(model),
            args=args,
            train_dataset=Dataset.from_list(pairs),
            processing_class=tokenizer,
        ).train()
        # one pass of the policy for each of two micro-batches of two steps
        assert counted_passes(handle) == 2 * 2 * len(handle._observation.layers)
        assert handle.losses()["balance"] >= 1
