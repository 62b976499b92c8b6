"""This module builds small models of transformers with weights by formula.

As a script, it trains and loads adapters by PEFT alone, in a process that does not import this package.
"""

import sys

import torch
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AutoConfig, AutoModelForCausalLM


TARGETS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
IDS = torch.arange(3, 39).view(2, 18)


def build(model_type: str, **kwargs):
    """Builds a model whose weights are sines, so that no random number generator matters."""
    config = AutoConfig.for_model(
        model_type, hidden_size=16, intermediate_size=8, moe_intermediate_size=8, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, head_dim=8, num_local_experts=4, num_experts=4,
        num_experts_per_tok=2, vocab_size=64, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **kwargs)
    fill(model, 0.3)
    return model


@torch.no_grad()
def fill(model, scale: float, only: str = "") -> None:
    for number, (name, parameter) in enumerate(model.named_parameters()):
        if only in name:
            steps = torch.arange(parameter.numel(), dtype=torch.float64) * (1 + number / 7) + number
            values = (steps.sin() * scale).view(parameter.shape).to(parameter.dtype)
            if isinstance(parameter, DTensor):
                values = distribute_tensor(values, parameter.device_mesh, parameter.placements)
            parameter.copy_(values)


def train(model, steps: int = 3) -> None:
    """Trains a few steps of plain gradient descent."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    ids = IDS.to(model.device)
    for _ in range(steps):
        gradients = torch.autograd.grad(model(ids, labels=ids).loss, parameters)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter -= 0.5 * gradient


def main(base: str, trained_elsewhere: str, trained_here: str, results: str) -> None:
    """Saves the logits of a given adapter, and of an adapter that this process trains and saves."""
    from peft import LoraConfig, PeftModel, get_peft_model

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), trained_elsewhere)
    logits = {"elsewhere": model(IDS).logits}
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj"], target_parameters=TARGETS)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    fill(model, 0.2, only="lora_")
    train(model)
    model.save_pretrained(trained_here)
    logits["here"] = model(IDS).logits
    torch.save({name: tensor.detach() for name, tensor in logits.items()}, results)
    assert not any(name.partition(".")[0] == "modeling_moe" for name in sys.modules)


if __name__ == "__main__":
    main(*sys.argv[1:])
