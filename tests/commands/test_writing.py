# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""`moe generate` and `moe chat` write the texts, answers and samples that `generate` of transformers returns."""

import io
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, set_seed

from modeling_moe import MoEForCausalLM
from modeling_moe.commands.main import run_command
from modeling_moe.generation import SamplingArguments
from tests.builders import tiny_config, train_tokenizer
from tests.data.test_documents import PLAIN


TINY = {
    "vocab_size": 300,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}


def save(folder: Path, kind: str = "moe", template: str | None = None) -> Path:
    """Saves a tiny model, equal in each call, with a tokenizer."""
    tokenizer = train_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    torch.manual_seed(3)
    ours = MoEForCausalLM(tiny_config(vocab_size=300, max_position_embeddings=64))
    if kind == "adapter":
        ours.save_pretrained(folder / "base")
        base = AutoModelForCausalLM.from_pretrained(folder / "base")
        get_peft_model(base, LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).save_pretrained(folder)
        return folder
    configs = {"llama": LlamaConfig(**TINY), "mixtral": MixtralConfig(**TINY, num_local_experts=4)}
    model = AutoModelForCausalLM.from_config(configs[kind]) if kind in configs else ours
    model.save_pretrained(folder)
    return folder


def generate(monkeypatch, *flags, command: str = "generate") -> None:
    monkeypatch.setattr(sys, "argv", sys.argv)  # which the command replaces
    run_command(command, [f"moe {command}", *map(str, flags)])


def chat(monkeypatch, *flags) -> None:
    generate(monkeypatch, *flags, command="chat")


def greedy(folder: Path, text: str, tokens: int, **options) -> str:
    """Returns the continuation of a text by `generate` of transformers."""
    tokenizer, model = train_tokenizer(), AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    written = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        eos_token_id=2,
        pad_token_id=2,
        **{"do_sample": False} | options,
    )
    return tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("kind", ["moe", "llama", "mixtral", "adapter"])
def test_each_prompt_goes_on_greedily(kind, tmp_path, monkeypatch, capsys):
    folder = save(tmp_path, kind)
    generate(monkeypatch, "--model_name_or_path", folder, "--prompt", "the old", "der", "--max_new_tokens", 5)
    output, errors = capsys.readouterr()
    assert output == "".join(f"{prompt}{greedy(folder, prompt, 5)}\n\n" for prompt in ("the old", "der"))
    assert (
        len(re.findall(r"^5 new tokens in [\d.]+ s: the first after .*\), then [\d.]+ tokens/s$", errors, re.M)) == 2
    )


def test_a_chat_has_several_turns(tmp_path, monkeypatch, capsys):
    folder = save(tmp_path, template=PLAIN)
    flags = ["--model_name_or_path", folder, "--system", "to", "--max_new_tokens", 4]
    chat(monkeypatch, *flags, "--prompt", "the old", "mill")
    lead = "<bos>system:to<eos><bos>user:the old<eos><bos>assistant:"
    one = greedy(folder, lead, 4).strip()
    two = greedy(folder, f"{lead}{one}<eos><bos>user:mill<eos><bos>assistant:", 4).strip()
    lead, first, second = capsys.readouterr().out.split("user: ")
    assert lead == ""
    assert [part.strip() for part in first.split("\nassistant: ")] == ["the old", one]
    assert [part.strip() for part in second.split("\nassistant: ")] == ["mill", two]

    monkeypatch.setattr(sys, "stdin", io.StringIO("the old\n\nmill\n"))
    chat(monkeypatch, *flags)
    answers = [answer.strip() for answer in capsys.readouterr().out.split("assistant: ")[1:]]
    assert answers == [one, two]


@pytest.mark.parametrize(("own", "ends"), [(5, [5, 2]), ([7, 2], [7, 2]), (None, [2])])
def test_a_text_ends_at_the_tokenizers_eos_too(own, ends):
    model = MoEForCausalLM(tiny_config(vocab_size=300))
    model.generation_config.eos_token_id = own
    config = SamplingArguments().config(model, train_tokenizer(), 32)
    assert config.eos_token_id == ends
    assert config.pad_token_id is not None
    assert model.generation_config.eos_token_id == own


def test_sampling_depends_on_the_seed_alone(tmp_path, monkeypatch, capsys):
    folder = save(tmp_path)
    flags = ["--model_name_or_path", folder, "--prompt", "the old", "--max_new_tokens", 12, "--do_sample", "true"]
    flags += ["--temperature", 1.5, "--top_k", 50, "--top_p", 0.9]
    texts = []
    for seed in (1, 1, 2):
        generate(monkeypatch, *flags, "--seed", seed)
        texts.append(capsys.readouterr().out.removesuffix("\n\n"))
    assert texts[0] == texts[1] != texts[2]
    set_seed(1)
    assert texts[0] == "the old" + greedy(folder, "the old", 12, do_sample=True, temperature=1.5, top_k=50, top_p=0.9)


def test_flags_that_are_not_given_come_from_the_generation_config(tmp_path, monkeypatch, capsys):
    folder = save(tmp_path)
    model = MoEForCausalLM.from_pretrained(folder)
    model.generation_config.update(do_sample=True, temperature=1.7, top_k=7)
    model.save_pretrained(folder)
    flags = ["--model_name_or_path", folder, "--prompt", "the old", "--max_new_tokens", 12]
    generate(monkeypatch, *flags)
    assert capsys.readouterr().out == f"the old{greedy(folder, 'the old', 12)}\n\n"
    generate(monkeypatch, *flags, "--do_sample", "true")
    set_seed(0)
    drawn = greedy(folder, "the old", 12, do_sample=True, temperature=1.7, top_k=7)
    assert capsys.readouterr().out == f"the old{drawn}\n\n"


def test_the_text_is_written_token_by_token(tmp_path, monkeypatch):
    folder, pieces = save(tmp_path), []

    class Out(io.StringIO):
        def write(self, text):
            pieces.append(text)
            return len(text)

    monkeypatch.setattr(sys, "stdout", Out())
    generate(monkeypatch, "--model_name_or_path", folder, "--prompt", "the old", "--max_new_tokens", 12)
    assert "".join(pieces) == f"the old{greedy(folder, 'the old', 12)}\n\n"
    assert len([piece for piece in pieces if piece.strip()]) > 1


def test_a_chat_template_is_mentioned_once(tmp_path, monkeypatch, capsys):
    flags = ["--model_name_or_path", save(tmp_path, template=PLAIN), "--prompt", "a", "b", "--max_new_tokens", 1]
    generate(monkeypatch, *flags)
    assert capsys.readouterr().err.count("moe chat applies it") == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--temperature", "0.5"], "temperature needs sampling: set do_sample true"),
        (["--do_sample", "true", "--temperature", "0"], "temperature is 0.0: it must be a positive number"),
        (["--do_sample", "true", "--temperature", "nan"], "temperature is nan"),
        (["--do_sample", "true", "--top_p", "1.5"], "top_p is 1.5"),
        (["--do_sample", "true", "--top_k", "0"], "top_k is 0"),
        (["--seed", "-1"], "seed is -1"),
        (["--max_new_tokens", "70"], "the prompt has .* and max_new_tokens is 70, more than the model's 64 positions"),
        (["--prompt", "the old mill " * 40], "more than the model's 64 positions"),
        (["--prompt", ""], "the prompt has no token"),
        (["--chat", "true"], "--chat belongs to moe chat"),
        (["--system=x"], "--system belongs to moe chat"),
        (["--device", "nowhere"], "device nowhere cannot be used"),
        (["--device", "meta"], "device meta cannot be used"),
        (["--prompt", "\udcff"], "is not UTF-8"),
        (["--stats"], "stats needs a memory for experts: set budget"),
        (["--expert_policy", "lru"], "expert_policy needs a memory for experts: set budget"),
        (["--expert_prefetch", "0"], "expert_prefetch needs a memory for experts: set budget"),
        (["--expert_policy", "mru", "--budget", "1GiB"], "mru"),
        (["--budget", "1GiB", "--gguf_file", "x.gguf"], "not from GGUF"),
        (["--budget", "much"], "is no size: write a number of bytes"),
        (["--draft_tokens", "3"], "draft_tokens needs a draft model: set draft"),
        (["--draft", "auto", "--draft_tokens", "0"], "draft_tokens is 0"),
        (["--dtype", "int3"], "dtype 'int3' is unknown"),
    ],
)
def test_mistakes(flags, message, tmp_path, monkeypatch, capsys):
    folder = save(tmp_path)
    with pytest.raises(SystemExit) as stop:
        generate(monkeypatch, "--model_name_or_path", folder, "--prompt", "the", *flags)
    assert stop.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("moe generate: ")]
    assert re.search(message, line)


def test_a_chat_needs_a_template_and_text(tmp_path, monkeypatch, capsys):
    folder = save(tmp_path)
    for flags, message in ((["--system", "x"], "the tokenizer has none"), (["--system", "\udcff"], "is not UTF-8")):
        with pytest.raises(SystemExit) as stop:
            chat(monkeypatch, "--model_name_or_path", folder, "--prompt", "the", *flags)
        assert stop.value.code == 2
        assert message in capsys.readouterr().err


def test_a_generation_config_with_beams_or_stop_strings_runs(tmp_path, monkeypatch, capsys):
    folder = save(tmp_path)
    flags = ["--model_name_or_path", folder, "--prompt", "the old", "--max_new_tokens", 4]
    generate(monkeypatch, *flags)
    expected = capsys.readouterr().out
    file = Path(folder) / "generation_config.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps(values | {"num_beams": 3, "stop_strings": ["never written"]}))
    generate(monkeypatch, *flags)
    assert capsys.readouterr().out == expected
    file.write_text(json.dumps(values | {"cache_implementation": "quantized"}))
    with pytest.raises(SystemExit) as stop:
        generate(monkeypatch, *flags)
    assert stop.value.code == 2
    assert "needs a package that is not installed" in capsys.readouterr().err


def test_a_chat_of_a_model_with_few_positions_is_shortened(tmp_path, monkeypatch, capsys):
    folder = save(tmp_path, template=PLAIN)
    chat(monkeypatch, "--model_name_or_path", folder, "--prompt", "the old mill")
    assert "assistant: " in capsys.readouterr().out
