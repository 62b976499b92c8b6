"""These tests read every kind of data file as rows, and check that other files are refused in one line."""

import json
import os

import pytest
from datasets import Dataset

from modeling_moe.data import DataArguments, load_and_pack, load_documents
from modeling_moe.utils.errors import UserError
from tests.builders import train_tokenizer


CHAT = [{"role": "user", "content": "the old"}, {"role": "assistant", "content": "mill"}]


def lines(*rows) -> str:
    return "\n".join(json.dumps(row) for row in rows)


@pytest.mark.parametrize(("name", "sep"), [("a.csv", ","), ("a.tsv", "\t")])
def test_csv_and_tsv_were_refused(name, sep, tmp_path):
    (tmp_path / name).write_text(f'text{sep}n\n"one{sep}two"{sep}1\nNA{sep}2\n{sep}3\n')
    assert load_documents(str(tmp_path / name))["text"][:] == [f"one{sep}two", "NA"]


def test_a_folder_of_source_code_was_refused(tmp_path):
    for name, text in [
        ("a.py", "print(1)\n"),
        ("lib/b.c", "int x;\n"),
        ("README.md", "# it\n"),
        ("package.json", "{}"),
        (".git/c.py", "hidden"),
        ("__pycache__/d.py", "cached"),
    ]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert load_documents(str(tmp_path))["text"][:] == ["# it\n", "print(1)\n", "int x;\n"]
    assert load_documents(f"{tmp_path}/**/*.c")["text"][:] == ["int x;\n"]
    (tmp_path / "rows.csv").write_text("text\na\n")
    with pytest.raises(UserError, match=r"several kinds \(.csv, source code\).*pattern"):
        load_documents(str(tmp_path))


def test_markdown_was_refused(tmp_path):
    (tmp_path / "a.md").write_bytes(b"\xef\xbb\xbf# title\n")
    assert load_documents(str(tmp_path))["text"][:] == ["# title\n"]
    assert load_documents(str(tmp_path / "a.md"))["text"][:] == ["# title\n"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "is empty"),
        ("a.csv", b"", "is empty"),
        ("a.parquet", b"", "is empty"),
        ("a.jsonl", b"\n\n", "has no rows"),
        ("a.csv", b"text,b\n", "has no rows"),
        ("a.jsonl", b'null\n{"text": "a"}\n', "'null' in line 1"),
        ("a.jsonl", b'{"text": "a"}\n3\n', "'3' in line 2"),
        ("a.json", b"[null, {}]", "'null, {}]' in line 1"),
        ("a.json", b"[1, 2]", "in line 1"),
        ("a.json", b"3", "'3' in line 1"),
        ("a.jsonl", b'{"text": "a"}\n{oops\n', "JSON parse error"),
        ("a.jsonl", bytes(range(256)), "is not text in UTF-8"),
        ("a.jsonl", bytes(range(128)), "in line 1"),
        ("a.parquet", b"PAR1xxxx", "cannot be read"),
        ("a.csv", "text\nü\n".encode("latin-1"), "is not text in UTF-8"),
        ("a.csv", "text\nü\n".encode("utf-16"), "is not text in UTF-8"),
        ("a.jsonl", '{"text": "ü"}\n'.encode("latin-1"), "is not text in UTF-8"),
        ("a.txt", "ü".encode("latin-1"), "is not text in UTF-8"),
        ("a.txt", b"a\0b", "is binary"),
        ("a.xlsx", b"PK\x03\x04\xff\x00", "is not text in UTF-8"),
        ("a.csv", b"a,b\n1,2\n1,2,3\n", "Expected 2 fields in line 3"),
        ("a.csv", b"\x1f\x8b\x08\x00", "is not text in UTF-8"),
        ("a.csv", b"text,n\n1,2\n", "choose a column of text"),
        ("a.jsonl", b'{"text": 1}\n{"text": "b"}\n', "choose a column of text"),
        ("a.jsonl", b'{"text": null}\n', "every row of 'text' is null"),
        ("a.jsonl", b'{"text": ""}\n', "holds no text"),
        ("a.jsonl", b'{"messages": null}\n', "not in"),
        ("a.jsonl", b'{"messages": []}\n', "not in|holds no text"),
        ("a.jsonl", b'{"chosen": "a", "rejected": "b"}\n', "choose one of chosen, rejected, or rename columns"),
    ],
)
def test_a_file_that_is_no_data_ended_in_a_traceback(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        load_documents(str(tmp_path / name), conversations=True)
    assert name in str(error.value)
    assert "\n" not in str(error.value).strip()


def test_null_rows_are_left_out(tmp_path):
    (tmp_path / "a.jsonl").write_text(lines({"messages": CHAT}, {"messages": None}, {"messages": []}))
    assert load_documents(str(tmp_path / "a.jsonl"), conversations=True)["messages"][:] == [CHAT]


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"messages": CHAT, "text": "t"}, {"messages": CHAT}),
        ({"prompt": "a", "completion": "b", "id": 3}, {"prompt": "a", "completion": "b"}),
        ({"prompt": CHAT[:1], "completion": CHAT[1:]}, {"prompt": CHAT[:1], "completion": CHAT[1:]}),
        ({"instruction": "", "output": "b", "text": "t"}, None),
        ({"prompt": "a", "completion": ""}, None),
    ],
)
def test_formats_of_chats_were_refused(row, columns, tmp_path):
    full = {"instruction": "a", "output": "b", "prompt": "a", "completion": "b", "text": "t"}
    (tmp_path / "a.jsonl").write_text(lines(row, {name: full[name] for name in row if name in full} | row, row))
    if columns is None:
        with pytest.raises(UserError, match="holds no text"):
            load_documents(str(tmp_path / "a.jsonl"), conversations=True)
        return
    loaded = load_documents(str(tmp_path / "a.jsonl"), conversations=True)
    assert loaded[0] == columns


def test_alpaca_and_dolly_are_turns_or_a_prompt(tmp_path):
    (tmp_path / "a.csv").write_text("instruction,input,output\nAdd,1 2,3\nSing,,la\n")
    (tmp_path / "b.jsonl").write_text(lines({"instruction": "Add", "context": "1 2", "response": "3"}))
    first, second = load_documents(str(tmp_path / "a.csv"), conversations=True)
    assert first["messages"] == [{"role": "user", "content": "Add\n\n1 2"}, {"role": "assistant", "content": "3"}]
    assert first["prompt"].endswith("### Instruction:\nAdd\n\n### Input:\n1 2\n\n### Response:\n")
    assert second["prompt"].endswith("the request.\n\n### Instruction:\nSing\n\n### Response:\n")
    assert load_documents(str(tmp_path / "b.jsonl"), conversations=True)[0] == first


def test_naming_the_column_of_messages_was_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text(lines({"chat": CHAT}))
    assert load_documents(str(tmp_path / "a.jsonl"), "chat", conversations=True)["messages"][:] == [CHAT]


TEMPLATE = "{% for m in messages %}<bos>{{ m.role }}:{{ m.content }}<eos>{% endfor %}{% if add_generation_prompt %}<bos>assistant:{% endif %}"
ALPACA = {"instruction": "the old", "input": "", "output": "mill"}


@pytest.mark.parametrize(
    ("row", "template", "learnt", "whole"),
    [
        ({"messages": CHAT}, TEMPLATE, "mill<eos>", "<bos>user:the old<eos><bos>assistant:mill<eos>"),
        ({"prompt": CHAT[:1], "completion": CHAT[1:]}, TEMPLATE, "mill<eos>", "<bos>user:the old<eos><bos>assistant:mill<eos>"),
        ({"prompt": "the old ", "completion": "mill"}, None, "mill<eos>", "the old mill<eos>"),
        ({"prompt": "the old ", "completion": "mill"}, TEMPLATE, "mill<eos>", "the old mill<eos>"),
        (ALPACA, TEMPLATE, "mill<eos>", "<bos>user:the old<eos><bos>assistant:mill<eos>"),
        (ALPACA, None, "mill<eos>", None),
        (
            {"conversations": [{"from": "human", "value": "der"}, {"from": "gpt", "value": "Weg"}], "system": "to"},
            TEMPLATE,
            "Weg<eos>",
            "<bos>system:to<eos><bos>user:der<eos><bos>assistant:Weg<eos>",
        ),
    ],
)  # fmt: skip
@pytest.mark.parametrize("assistant_only", [True, False])
def test_the_loss_was_on_the_prompt_too(row, template, learnt, whole, assistant_only, tmp_path):
    (tmp_path / "a.jsonl").write_text(lines(*[row] * 30))
    tokenizer = train_tokenizer()
    tokenizer.chat_template = template
    args = DataArguments(data=[f"a={tmp_path / 'a.jsonl'}"], max_length=64, assistant_only=assistant_only)
    train, _ = load_and_pack(args, tokenizer, eval_fraction=0, seed=0)
    block = train[0]
    text = tokenizer.decode(block["input_ids"])
    assert whole is None or text.startswith(whole)
    kept = [label for label in block["labels"] if label != -100]
    if not assistant_only:
        assert kept == block["input_ids"]
        return
    said = tokenizer.decode(kept)
    assert said.startswith(learnt)
    assert said.replace(learnt, "") == learnt[: len(said) % len(learnt)]


def test_only_the_completion_of_messages_counts(tmp_path):
    history = [*CHAT, {"role": "user", "content": "der"}]
    rows = [{"prompt": history, "completion": [{"role": "assistant", "content": "Weg"}]}] * 30
    (tmp_path / "a.jsonl").write_text(lines(*rows))
    marked = TEMPLATE.replace("{{ m.content }}<eos>", "{% generation %}{{ m.content }}<eos>{% endgeneration %}")
    for template in (TEMPLATE, marked.replace("{% generation %}", "{% if m.role == 'assistant' %}{% generation %}").replace(
        "{% endgeneration %}", "{% endgeneration %}{% else %}{{ m.content }}<eos>{% endif %}"
    )):  # fmt: skip
        tokenizer = train_tokenizer()
        tokenizer.chat_template = template
        args = DataArguments(data=[f"a={tmp_path / 'a.jsonl'}"], max_length=64)
        train, _ = load_and_pack(args, tokenizer, eval_fraction=0, seed=0)
        said = tokenizer.decode([label for label in train[0]["labels"] if label != -100])
        assert said.startswith("Weg<eos>")
        assert "mill" not in said


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"conversations": [{"from": "narrator", "value": "x"}]}], "a message is from 'narrator'"),
        ([{"messages": [{"speaker": "user", "content": "x"}]}], "must be a list of dicts with role and content"),
        ([{"messages": ["hello"]}], "must be a list of dicts"),
        ([{"messages": [{"role": "user", "content": "x"}], "tools": "{oops"}], "tools are not JSON"),
    ],
)
def test_messages_of_an_unknown_form_are_refused(rows, message, tmp_path):
    Dataset.from_list(rows).to_json(tmp_path / "a.jsonl")
    tokenizer = train_tokenizer()
    tokenizer.chat_template = TEMPLATE
    with pytest.raises(UserError, match=message):
        load_and_pack(DataArguments(data=[f"a={tmp_path / 'a.jsonl'}"], max_length=4), tokenizer, 0, 0)


def test_a_device_or_a_pipe_ended_or_hung_the_process(tmp_path):
    os.mkfifo(tmp_path / "rows.jsonl")
    for source in ("/dev/zero", str(tmp_path / "rows.jsonl")):
        with pytest.raises(UserError, match="is a device or a pipe"):
            load_documents(source)


def test_a_home_folder_was_not_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("words")
    assert load_documents("~/a.txt")["text"][:] == load_documents("~/*.txt")["text"][:] == ["words"]


@pytest.mark.parametrize(
    ("name", "text"), [("a.jsonl", '{{"text": "x", "a": {}}}\n'), ("a.json", '[{{"text": "x", "a":\n{}}}]')]
)
def test_nested_json_crashed_the_process(name, text, tmp_path):
    (tmp_path / name).write_text(text.format("[" * 20000 + "]" * 20000))
    with pytest.raises(UserError, match="more than 100 deep"):
        load_documents(str(tmp_path / name))
    (tmp_path / name).write_text(text.format(json.dumps('[{\\"' * 300)))
    assert load_documents(str(tmp_path / name))["text"][:] == ["x"]


@pytest.mark.parametrize(
    ("text", "message"),
    [("text,b\nshifted,right,one\n", "first row does not fit the header"), ("text,text\na,b\n", "'text' twice")],
)
def test_a_csv_gave_another_column_than_its_header_says(text, message, tmp_path):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        load_documents(str(tmp_path / "a.csv"))
