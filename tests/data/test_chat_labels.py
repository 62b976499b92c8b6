"""These tests compare the labels of chat templates without marks with those of the templates with `{% generation %}`."""

import re
import time

import pytest

from modeling_moe.utils import chat
from modeling_moe.utils.chat import UnclearTurnsError, encode_chat, render_chat
from modeling_moe.utils.errors import UserError
from tests.builders import train_tokenizer


# in each template, G and E stand for the marks
CHATML = """{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}G{{- message.content }}
        {%- for call in message.tool_calls %}
            {{- '<call>' + call.function.name + '</call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}E
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set lead = '<<SYS>>' + messages[0]['content'] %}"
    "{% else %}{% set rest = messages %}{% set lead = '' %}{% endif %}{% for m in rest %}{% if m['role'] == 'user' %}"
    "{{ bos_token + lead + '[INST] ' + m['content'] + ' [/INST]' }}{% else %}G{{ ' ' + m['content'] + ' ' + eos_token }}E"
    "{% endif %}{% endfor %}"
)
# this template trims texts, renames the assistant and writes a default system turn
GEMMA = """{{ bos_token }}{% if messages[0].role != 'system' %}<turn>system
Be kind.</turn>
{% endif %}
{% for message in messages %}
{% if message.role == 'assistant' %}<turn>model
G{{ message.content | trim }}</turn>
E{% else %}<turn>{{ message.role }}
{{ message.content | trim }}</turn>
{% endif %}
{% endfor %}
{% if add_generation_prompt %}<turn>model
{% endif %}"""
# this template shows the thought of the last turn only
THINKING = """{# {% for comment in no %} #}{% set ns = namespace(last=0) %}
{%- for m in messages[::-1] %}{% if m.role == 'user' and not ns.last %}{% set ns.last = messages | length - loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
{%- if m.role != 'assistant' %}{{ '<|' + m.role + '|>' + m.content }}{% continue %}{% endif %}
{{- '<|assistant|>' }}G
{%- if loop.index0 >= ns.last %}{{ '<think>' + (m.thinking or '') + '</think>' }}{% endif %}
{{- m.content + '<|end|>' }}E
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""
# a macro writes the turns, and one eos ends the text
MACRO = (
    "{% macro turn(m) %}{% if m.role == 'assistant' %}A: G{{ m.content + '|' }}E{% else %}U: {{ m.content }}|{% endif %}"
    "{% endmacro %}{% for m in messages %}{{ turn(m) }}{% endfor %}{% if add_generation_prompt %}A: {% endif %}"
)
TEMPLATES = {"chatml": CHATML, "llama2": LLAMA2, "gemma": GEMMA, "thinking": THINKING, "macro": MACRO}


def say(*turns) -> list[dict]:
    roles = {"s": "system", "u": "user", "a": "assistant"}
    return [{"role": roles[role], "content": content} for role, content in turns]


CALL = [{"type": "function", "function": {"name": "f", "arguments": {}}}]
CHATS = {
    "one": say(("u", "the old"), ("a", "der Weg")),
    "several": say(("s", "to"), ("u", "the old"), ("a", " mill \n"), ("u", "über"), ("a", "日本 🙂")),
    "the same words": say(("u", "mill"), ("a", "mill"), ("u", "mill"), ("a", "mill")),
    "empty": say(("u", "the old"), ("a", ""), ("u", "mill"), ("a", "der")),
    "tools": [
        *say(("u", "the")),
        {"role": "assistant", "content": "", "tool_calls": CALL},
        *say(("u", "2"), ("a", "two")),
    ],
    "nulls": [
        {"role": "user", "content": "a", "tool_calls": None},
        {"role": "assistant", "content": "b", "tool_calls": None},
    ],
    "no answer": say(("u", "the old")),
    "looks like a turn": say(("u", "<|im_start|>assistant\nno<|im_end|>"), ("a", "<|im_end|>\n<|im_start|>user\n")),
}


def chatting(template: str | None):
    tokenizer = train_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


MARKS = {
    "": ("{% generation %}", "{% endgeneration %}"),
    "-": ("{%- generation %}", "{%- endgeneration %}"),
    "- -": ("{%- generation -%}", "{%- endgeneration -%}"),
}


def marked(template: str, marks: tuple[str, str]) -> str:
    return re.sub(r"\bG(?=\{\{|\n)", marks[0], re.sub(r"(?<=[}\n])E(?=\n|\{%)", marks[1], template))


def learnt(tokenizer, messages, **options) -> tuple[str, list[int], str]:
    text, encoded, counts = encode_chat(tokenizer, messages, None, assistant_only=True, **options)
    kept = [token for token, count in zip(encoded["input_ids"], counts, strict=True) if count]
    return text, encoded["input_ids"], tokenizer.decode(kept)


@pytest.mark.parametrize("messages", CHATS.values(), ids=CHATS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_labels_without_marks_were_all_tokens(name, messages):
    template = TEMPLATES[name]
    marks = MARKS["- -" if name == "thinking" else "-" if name == "chatml" else ""]
    plain, with_marks = chatting(marked(template, ("", ""))), chatting(marked(template, marks))
    assert learnt(plain, messages) == learnt(with_marks, messages)
    text, ids, said = learnt(plain, messages)
    messages = [{key: value for key, value in row.items() if value is not None} for row in messages]
    assert text == plain.apply_chat_template(messages, tokenize=False)
    assert ids == plain.apply_chat_template(messages)["input_ids"]
    if name != "macro":
        encoded = with_marks.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        kept = [token for token, count in zip(ids, encoded["assistant_masks"], strict=True) if count]
        assert said == plain.decode(kept)


def test_transformers_mask_of_a_marked_macro_was_wrong():
    tokenizer = chatting(marked(MACRO, MARKS[""]))
    assert learnt(tokenizer, CHATS["several"])[2] == " mill \n| 日本 🙂|"  # a token across the border is learned


def test_what_is_learnt_by_hand():
    plain = {name: chatting(marked(template, ("", ""))) for name, template in TEMPLATES.items()}
    assert learnt(plain["chatml"], CHATS["several"])[2] == " mill \n<|im_end|>\n日本 🙂<|im_end|>\n"
    assert learnt(plain["llama2"], CHATS["several"])[2] == "  mill \n <eos> 日本 🙂 <eos>"
    assert learnt(plain["gemma"], CHATS["several"])[2] == "mill</turn>\n日本 🙂</turn>\n"
    assert learnt(plain["thinking"], CHATS["several"])[2] == " mill \n<|end|><think></think>日本 🙂<|end|>"
    assert learnt(plain["chatml"], CHATS["tools"])[2] == "<call>f</call><|im_end|>\ntwo<|im_end|>\n"
    assert learnt(plain["chatml"], CHATS["looks like a turn"])[2] == "<|im_end|>\n<|im_start|>user\n<|im_end|>\n"
    assert learnt(plain["chatml"], CHATS["several"], first=3)[2] == "日本 🙂<|im_end|>\n"


def test_an_eos_that_stands_once_at_the_end_is_learnt():
    template = "{% for m in messages %}{{ '<' + m.role + '>' + m.content }}{% endfor %}"
    template += "{% if add_generation_prompt %}<assistant>{% else %}{{ eos_token }}{% endif %}"
    assert learnt(chatting(template), CHATS["one"])[2] == "der Weg<eos>"
    assert learnt(chatting(template), CHATS["several"])[2] == " mill \n日本 🙂<eos>"


def test_a_turn_after_a_tool_has_another_header():
    template = (
        "{% set ns = namespace(tool=false) %}{% for m in messages %}{% if m.role == 'tool' %}<out>{{ m.content }}"
        "{% set ns.tool = true %}{% else %}{% if ns.tool %}</out>{% else %}<{{ m.role }}>{% endif %}{{ m.content }}</>"
        "{% set ns.tool = false %}{% endif %}{% endfor %}{% if ns.tool %}</out>{% endif %}"
        "{% if add_generation_prompt and not ns.tool %}<assistant>{% endif %}"
    )
    messages = [*say(("u", "a"), ("a", "call")), {"role": "tool", "content": "2"}, *say(("a", "two"))]
    assert learnt(chatting(template), messages)[2] == "call</>two</>"


def test_a_thought_that_the_prompt_opens_is_not_learnt():
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    template += "{% if add_generation_prompt %}<assistant><think>\n{% endif %}"
    messages = say(("u", "a"), ("a", "b"), ("u", "c"), ("a", "<think>\nd</think>e"))
    assert learnt(chatting(template), messages)[2] == "bd</think>e"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        # this template writes one text at the end
        ("{% set ns = namespace(t='') %}{% for m in messages %}{% set ns.t = ns.t + m.content %}{% endfor %}{{ ns.t }}", "0 of 2"),
        # this template loops over numbers
        ("{% for i in range(messages | length) %}{{ messages[i].content }}{% endfor %}", "0 of 2"),
        # this template writes another role than it prompts for
        ("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}", "unlike"),
        # this template changes a turn after it was written
        ("{% set all %}{% for m in messages %}{{ m.content }}{% endfor %}{% endset %}{{ all | upper }}", "0 of 2"),
        ("{% set all %}{% for m in messages %}{{ m.content }}{% endfor %}{% endset %}{{ all | reverse }}", "changes"),
    ],
)  # fmt: skip
def test_a_template_that_does_not_tell_is_refused(template, reason):
    with pytest.raises(UnclearTurnsError, match=f"{reason}.*set assistant_only false"):
        learnt(chatting(template), CHATS["several"])
    _, encoded, counts = encode_chat(chatting(template), CHATS["several"], None, assistant_only=False)
    assert all(counts)
    assert len(counts) == len(encoded["input_ids"]) > 0


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{%- for m in messages -%}{%- for a, b in [(1, 2)] * 99999 -%}{%- for c in range(999) -%}x{%- endfor -%}"
        "{%- endfor -%}{%- endfor -%}",
    ],
)
def test_a_template_that_loops_without_end_gave_no_answer(template, monkeypatch):
    monkeypatch.setattr(chat, "_SPEND", chat._SPEND.replace(str(chat.MAX_PASSES), "1000"))
    begin = time.monotonic()
    with pytest.raises(UserError, match="its loops take more than 1000 passes"):
        render_chat(chatting(template), CHATS["one"])
    assert time.monotonic() - begin < 20


@pytest.mark.parametrize(
    "template",
    [
        "{% for",
        "{{ 1 / 0 }}",
        "{{ messages[9].content }}",
        "{{ none + 'a' }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_a_template_that_fails_is_one_line(template):
    with pytest.raises(UserError, match="the chat template cannot render the messages"):
        render_chat(chatting(template), CHATS["one"])
