# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""Importing this package changes nothing of PEFT, `Trainer` or other models, and `disable` undoes what `enable` does.

Each test runs a program in a fresh process, since this one has imported the package and called `enable`.
"""

import os
import subprocess
import sys
from pathlib import Path


ROOT = Path(__file__).parents[1]
# compares the attributes of PEFT's and the Trainer's modules and classes, and Python's import hooks
SNAPSHOT = """
import inspect, sys, warnings
warnings.simplefilter("ignore")
import peft, torch, transformers, transformers.trainer, transformers.trainer_callback, accelerate
import peft.tuners.lora.layer, peft.tuners.lora.model, peft.tuners.tuners_utils, peft.utils.other, peft.peft_model

def holders():
    watched = ("peft", "transformers.trainer", "accelerate")
    modules = [m for name, m in sorted(sys.modules.items()) if name.startswith(watched)]
    classes = {c for m in modules for c in vars(m).values() if inspect.isclass(c) and c.__module__.startswith(watched)}
    return [*modules, *classes, transformers.PreTrainedModel]

def snapshot(owners):
    # Python itself keeps `__warningregistry__`
    names = [(owner, name) for owner in owners for name in vars(owner) if name != "__warningregistry__"]
    found = {(owner, name): id(vars(owner)[name]) for owner, name in names}
    lists = (tuple(sys.meta_path), tuple(sys.path_hooks), tuple(transformers.trainer.DEFAULT_CALLBACKS))
    return found, lists

OWNERS = holders()
BEFORE = snapshot(OWNERS)

def changes():
    now, lists = snapshot(OWNERS)
    before, old_lists = BEFORE
    # a module gains the names of sub-modules that are imported later
    gained = [key for key in now.keys() - before.keys() if not inspect.ismodule(getattr(*key, None))]
    changed = [key for key, value in before.items() if now.get(key) != value]
    return sorted(f"{getattr(owner, '__name__', owner)}.{name}" for owner, name in gained + changed) + [
        str(new) for old, new in zip(old_lists, lists) if old != new
    ]
"""
# one of transformers' models under PEFT: the experts' implementation, logits and gradients
STRANGER = """
import sys
sys.path.insert(0, {tests!r})
from checkpoints import IDS, TARGETS, build, fill
from peft import LoraConfig, get_peft_model

def adapted():
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj"], target_parameters=TARGETS)
    model = get_peft_model(build("mixtral"), config)
    fill(model, 0.2, only="lora_")
    return model

def results(model):
    output = model(IDS, labels=IDS)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [output.logits.detach(), *torch.autograd.grad(output.loss, trained)]

def equal(first, second):
    return all(torch.equal(*pair) for pair in zip(first, second, strict=True))

def implementation(model):
    return {{module.config._experts_implementation for module in model.modules() if hasattr(module, "has_gate")}}
"""


def run(*programs: str) -> None:
    """Runs programs one after the other in one fresh process; a failed assertion there is one here."""
    path = os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", "\n".join(programs)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]


def stranger() -> str:
    return STRANGER.format(tests=str(ROOT / "tests" / "lora"))


def test_imports_change_nothing_and_disable_restores_everything():
    run(
        SNAPSHOT,
        """
import modeling_moe
assert changes() == [], changes()
import modeling_moe.lora, modeling_moe.training, modeling_moe.evaluation, modeling_moe.data
assert changes() == [], changes()
for package in (modeling_moe.lora, modeling_moe.training):
    assert not package.is_enabled()
    package.enable()
    assert package.is_enabled() and changes(), package
    enabled = changes()
    package.enable()
    assert changes() == enabled
    package.disable()
    package.disable()
    assert changes() == [] and not package.is_enabled(), changes()
modeling_moe.lora.enable()
assert changes() == sorted([
    "LoraModel._inject_parameters", "ModulesToSaveWrapper.update", "ParamWrapper._activate_lora", "ParamWrapper.merge",
    "peft.tuners.lora.model.add_lora_tp_hooks_dtensor", "peft.tuners.lora.model.get_tp_plan_and_mesh",
]), changes()
""",
    )


def test_a_trainer_made_before_enable_stays_as_it_is_and_our_entry_points_enable_lora():
    run(
        SNAPSHOT,
        stranger(),
        """
import tempfile
import modeling_moe.training
from modeling_moe.training import MoECallback

def callbacks():
    args = transformers.TrainingArguments(tempfile.mkdtemp(), report_to="none", use_cpu=True)
    trainer = transformers.Trainer(torch.nn.Linear(1, 1), args)
    return trainer.callback_handler.callbacks

before = callbacks()
assert not any(isinstance(callback, MoECallback) for callback in before)
modeling_moe.training.enable()
assert sum(isinstance(callback, MoECallback) for callback in callbacks()) == 1
assert not any(isinstance(callback, MoECallback) for callback in before)
modeling_moe.training.disable()
assert not any(isinstance(callback, MoECallback) for callback in callbacks())

import modeling_moe.lora as lora
model = build("mixtral")

lora.moe_lora_config(model)
assert lora.is_enabled()
lora.disable()
lora.MoELoraConfig()
assert lora.is_enabled()
lora.disable()

folder = tempfile.mkdtemp()
adapted().save_pretrained(folder)
lora.apply_adapter(build("mixtral"), folder)
assert lora.is_enabled()
""",
    )


def test_a_model_of_transformers_keeps_its_experts_and_its_bits():
    run(
        SNAPSHOT,
        stranger(),
        """
model, base = adapted(), build("mixtral")
expected, plain = results(model), base(IDS).logits
import modeling_moe, modeling_moe.lora, modeling_moe.training
assert implementation(model) == implementation(adapted()) == {"grouped_mm"}
assert equal(results(model), expected) and equal(results(adapted()), expected)

modeling_moe.lora.enable()
calls = []
from modeling_moe.dispatch import interface
operator = interface.experts_forward
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
ALL_EXPERTS_FUNCTIONS.register("moe", lambda *args: calls.append(1) or operator(*args))
served = results(model)
assert len(calls) == 2 and not equal(served, expected)
for got, tensor in zip(served, expected, strict=True):
    torch.testing.assert_close(got, tensor, atol=2e-5 * tensor.abs().max().item(), rtol=0)

experts = [module for module in model.modules() if hasattr(module, "has_gate")]
assert all("low_rank" not in vars(module) and module.config is model.config for module in experts)
assert implementation(model) == {"grouped_mm"}
with model.disable_adapter():
    assert torch.equal(model(IDS).logits, plain)
model.add_adapter("other", model.peft_config["default"])
model.delete_adapter("default")
assert implementation(model) == {"grouped_mm"}
assert torch.equal(model.unload()(IDS).logits, plain)
merged = adapted().merge_and_unload()
assert implementation(merged) == {"grouped_mm"}
assert len(calls) == 2

modeling_moe.lora.disable()
assert changes() == [], changes()
assert equal(results(adapted()), expected)
""",
    )


def test_without_enable_peft_computes_adapters_on_our_model():
    run(
        SNAPSHOT,
        stranger(),
        """
import modeling_moe, modeling_moe.lora
from modeling_moe import MoEConfig, MoEForCausalLM

def make():
    config = MoEConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8,
                       num_experts=4, num_experts_per_tok=2, num_null_experts=2)
    model = MoEForCausalLM(config)
    fill(model, 0.3)
    model = get_peft_model(model, LoraConfig(r=2, lora_alpha=3, target_parameters=TARGETS, target_modules=["q_proj"]))
    fill(model, 0.2, only="lora_")
    return model

alone = results(make())
assert changes() == []
modeling_moe.lora.enable()
served = results(make())
assert not equal(served, alone)
for got, tensor in zip(served, alone, strict=True):
    torch.testing.assert_close(got, tensor, atol=2e-5 * tensor.abs().max().item(), rtol=0)
""",
    )
