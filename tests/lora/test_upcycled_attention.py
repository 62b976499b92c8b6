"""LoRA trains the experts of upcycled attention, from the dense function on, and merges into them."""

import torch
from peft import LoraConfig, get_peft_model

from tests.upcycling.test_attention import EXACT, upcycled
from tests.upcycling.test_upcycle import IDS, save_source


def test_lora_trains_the_experts_of_upcycled_attention_and_merges(tmp_path):
    save_source("llama", tmp_path / "dense")
    _, model = upcycled(tmp_path, num_experts=3, attention_experts=3)
    expected = model(IDS).logits
    targets = [f"self_attn.experts.{name}" for name in ("up_proj", "down_proj")]
    peft_model = get_peft_model(model, LoraConfig(r=2, target_modules=[], target_parameters=targets))
    torch.testing.assert_close(peft_model(IDS).logits, expected, **EXACT)
    peft_model.train()
    optimizer = torch.optim.SGD([p for p in peft_model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        peft_model(IDS, labels=IDS).loss.backward()
        optimizer.step()
    trained = peft_model.eval()(IDS).logits
    assert (trained - expected).abs().max() > 1e-3
    merged = peft_model.merge_and_unload()
    torch.testing.assert_close(merged(IDS).logits, trained, atol=1e-4, rtol=1e-4)
