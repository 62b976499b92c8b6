"""`moe serve` answers an OpenAI client as `generate` answers, in a real process."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager

import openai
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from modeling_moe import MoEForCausalLM
from modeling_moe.commands.serve import ServeArguments, serve
from modeling_moe.utils.errors import UserError
from tests.builders import tiny_config, train_tokenizer


TEMPLATE = "{% for message in messages %}<{{ message.role }}>{{ message.content }}\n{% endfor %}<assistant>"
QUESTION = [{"role": "user", "content": "to the old mill"}]
NEW_TOKENS = 8


def save_model(folder, **fields):
    """Saves a tiny model, and a tokenizer with a chat template."""
    torch.manual_seed(0)
    model = MoEForCausalLM(tiny_config(vocab_size=300, eos_token_id=None, **fields))
    model.save_pretrained(folder)
    tokenizer = train_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return model.eval(), tokenizer


def expected(model, tokenizer, text):
    """Returns the greedy continuation that `generate` writes."""
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    ids = model.generate(inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    return tokenizer.decode(ids[0, inputs.shape[1] :], skip_special_tokens=True)


def ended(text):
    """Removes a last character that is not complete, which a stream never sends."""
    return text.rstrip("\N{REPLACEMENT CHARACTER}")


@contextmanager
def server(folder, log, *flags):
    """Runs `moe serve` in a process of its own, and gives an OpenAI client of it."""
    with socket.socket() as place:
        place.bind(("localhost", 0))
        port = place.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "modeling_moe",
        "serve",
        "--model_name_or_path",
        folder,
        "--port",
        str(port),
        *flags,
    ]
    # the list of models of the oldest supported releases fails where the Hub's cache does not exist
    cache = log.with_name("hub")
    cache.mkdir()
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env=os.environ | {"HF_HUB_CACHE": str(cache)}
        )
    try:
        client = openai.OpenAI(base_url=f"http://localhost:{port}/v1", api_key="none", max_retries=0, timeout=60)
        for _ in range(600):
            assert process.poll() is None, log.read_text()
            try:
                client.models.list()
                break
            except openai.APIConnectionError:
                time.sleep(0.2)
        yield client
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 0, log.read_text()
        assert "Traceback" not in log.read_text()
    finally:
        process.kill()
        process.wait(timeout=30)


def check_answers(client, folder, model, tokenizer):
    """Compares chat and completions, whole and streamed, with `generate`."""
    options = {"model": str(folder), "temperature": 0, "max_tokens": NEW_TOKENS}
    wanted = expected(model, tokenizer, "the old mill")
    assert wanted.strip()
    whole = client.completions.create(prompt="the old mill", **options)
    assert whole.choices[0].text == wanted
    parts = [part.choices[0].text for part in client.completions.create(prompt="the old mill", stream=True, **options)]
    assert ended("".join(parts)) == ended(wanted)
    wanted = expected(
        model, tokenizer, tokenizer.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True)
    )
    whole = client.chat.completions.create(messages=QUESTION, **options)
    assert whole.choices[0].message.content == wanted
    stream = client.chat.completions.create(messages=QUESTION, stream=True, **options)
    parts = [part.choices[0].delta.content or "" for part in stream if part.choices]
    assert ended("".join(parts)) == ended(wanted)


def test_a_client_gets_what_generate_writes(tmp_path):
    model, tokenizer = save_model(tmp_path / "moe")
    with server(tmp_path / "moe", tmp_path / "log", "--device", "cpu") as client:
        check_answers(client, tmp_path / "moe", model, tokenizer)


def test_another_family_is_served_in_bfloat16(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=300, eos_token_id=None, **sizes))
    model.save_pretrained(tmp_path / "llama")
    tokenizer = train_tokenizer()
    tokenizer.save_pretrained(tmp_path / "llama")
    with server(tmp_path / "llama", tmp_path / "log", "--device", "cpu", "--dtype", "bfloat16") as client:
        options = {"model": str(tmp_path / "llama"), "temperature": 0, "max_tokens": NEW_TOKENS}
        whole = client.completions.create(prompt="the old mill", **options)
    assert whole.choices[0].text == expected(model.bfloat16(), tokenizer, "the old mill")
    assert "no chat template" in (tmp_path / "log").read_text()


@pytest.mark.slow
def test_a_client_gets_what_generate_writes_with_continuous_batching(tmp_path):
    model, tokenizer = save_model(tmp_path / "moe")
    flags = ("--device", "cpu", "--continuous_batching", "true")
    with server(tmp_path / "moe", tmp_path / "log", *flags) as client:
        check_answers(client, tmp_path / "moe", model, tokenizer)


def test_routing_that_depends_on_neighbours_is_refused_with_continuous_batching(tmp_path):
    save_model(tmp_path / "moe", eval_capacity_factor=1.0)
    with pytest.raises(UserError, match="eval_capacity_factor counts the tokens of a row"):
        serve(ServeArguments(str(tmp_path / "moe"), continuous_batching=True))


def test_missing_packages_are_named_with_the_command_that_installs_them(tmp_path, monkeypatch):
    save_model(tmp_path / "moe")
    monkeypatch.setattr("modeling_moe.commands.serve.is_serve_available", lambda: False)
    with pytest.raises(UserError, match=re.escape("pip install 'modeling-moe[serving]'")):
        serve(ServeArguments(str(tmp_path / "moe")))


def test_a_port_that_no_socket_has_is_refused():
    with pytest.raises(UserError, match="port is 70000"):
        ServeArguments("moe", port=70000)


def test_a_port_in_use_is_refused_before_the_model_is_loaded(tmp_path):
    save_model(tmp_path / "moe")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port}: .*choose another --host or --port"):
            serve(ServeArguments(str(tmp_path / "moe"), host="127.0.0.1", port=port))
