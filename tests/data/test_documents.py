"""These tests follow sources to blocks of tokens."""

import json
from itertools import chain

import pytest
from datasets import Dataset

from modeling_moe.data import DataArguments, load_and_pack, load_documents, pack
from modeling_moe.data.documents import cut_documents, hold_out
from modeling_moe.data.packing import pack_conversations
from modeling_moe.utils.errors import UserError
from tests.builders import sample_text, train_tokenizer


EOS = 2
# the first template marks the assistant's text and the end of the text
MARKED = (
    "{% for message in messages %}<bos>{{ message.role }}:"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}<eos>{% endgeneration %}"
    "{% else %}{{ message.content }}<eos>{% endif %}{% endfor %}"
)
PLAIN = (
    "{% for message in messages %}<bos>{{ message.role }}:{{ message.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<bos>assistant:{% endif %}"
)


def documents(*texts: str) -> Dataset:
    return Dataset.from_dict({"text": list(texts)})


def joined(lists) -> list:
    return list(chain.from_iterable(lists))


def test_domains():
    assert DataArguments(data=["a=x.txt", "b=org/name:config"]).domains() == {"a": "x.txt", "b": "org/name:config"}


@pytest.mark.parametrize("entry", ["wiki.txt", "=wiki.txt", "wiki="])
def test_malformed_domain(entry):
    with pytest.raises(UserError, match="write domain=source"):
        DataArguments(data=[entry])


def test_domain_given_twice():
    with pytest.raises(UserError, match="'a' twice"):
        DataArguments(data=["a=x.txt", "a=y.txt"])


def test_max_length_too_small():
    with pytest.raises(UserError, match="max_length is 1"):
        DataArguments(data=["a=x.txt"], max_length=1)


def test_text_file_is_one_document(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one\n\ntwo\n")
    assert load_documents(str(path))["text"][:] == ["one\n\ntwo\n"]


@pytest.mark.parametrize("suffix", ["json", "jsonl", "parquet"])
def test_rows_are_documents(suffix, tmp_path):
    path = tmp_path / f"a.{suffix}"
    rows = [{"body": "one", "n": 1}, {"body": "", "n": 2}, {"body": None, "n": 3}, {"body": "zwei", "n": 4}]
    if suffix == "parquet":
        Dataset.from_list(rows).to_parquet(path)
    else:
        path.write_text("\n".join(json.dumps(row) for row in rows))
    loaded = load_documents(str(path), text_column="body")
    assert loaded.column_names == ["text"]
    assert loaded["text"][:] == ["one", "zwei"]


def test_refused_sources(tmp_path):
    rows, empty, table = tmp_path / "a.jsonl", tmp_path / "empty.txt", tmp_path / "a.csv"
    rows.write_text(json.dumps({"body": "one", "n": 1, "chat": [{"role": "user"}], "meta": {"id": 1}}))
    empty.write_text("")
    table.write_text("a,b")
    (tmp_path / "nothing").mkdir()
    for source, column, message in [
        (tmp_path / "missing.txt", "text", "does not exist"),
        (tmp_path, "text", "holds files of several kinds"),
        (tmp_path / "nothing", "text", "is a folder without a .txt"),
        (table, "text", "has no rows"),
        (rows, "text", "text_column 'text' is not in .* choose one of body, n, chat, meta"),
        (rows, "n", "choose a column of text"),
        (rows, "chat", "choose a column of text"),
        (rows, "meta", "choose a column of text"),
        (empty, "text", "holds no text"),
    ]:
        with pytest.raises(UserError, match=message):
            load_documents(str(source), column)


def test_pieces_join_to_their_documents():
    texts = [sample_text(300), "short, no line end", "\n" * 9000]
    pieces = cut_documents(documents(*texts))
    joined, current = [], ""
    for row in pieces:
        current += row["text"]
        if row["end"]:
            joined.append(current)
            current = ""
    assert joined == texts
    assert len(pieces) == 3 + 1 + 3


def test_hold_out_is_a_split_and_depends_on_the_seed_alone():
    rows = documents(*(f"{i}" for i in range(20)))
    train, held = hold_out(rows, 0.2, seed=1)
    assert len(held) == 4
    assert sorted([*train["text"], *held["text"]], key=int) == rows["text"][:]
    assert train["text"][:] == sorted(train["text"], key=int)
    assert hold_out(rows, 0.2, seed=1)[1]["text"][:] == held["text"][:]
    assert hold_out(rows, 0.2, seed=2)[1]["text"][:] != held["text"][:]


def test_hold_out_refuses_to_take_all():
    with pytest.raises(UserError, match=r"eval_fraction 0\.5 leaves nothing"):
        hold_out(documents("one"), 0.5, seed=0)


def test_pack_for_training(tokenizer):
    texts = ["der Weg", "the old mill", "über"]
    ids = []
    for text in texts:
        ids += [*tokenizer(text, add_special_tokens=False)["input_ids"], EOS]
    packed = pack(documents(*texts), tokenizer, max_length=5)
    assert len(packed) == len(ids) // 5
    assert len(ids) % 5
    assert joined(packed["input_ids"]) == ids[: len(ids) // 5 * 5]
    assert packed["labels"][:] == packed["input_ids"][:]


def test_only_a_documents_last_piece_gets_an_eos(tokenizer):
    pieces = Dataset.from_dict({"text": ["der ", "Weg", "mill"], "end": [False, True, True]})
    (block,) = pack(pieces, tokenizer, max_length=100, for_scoring=True)["input_ids"]
    assert block.count(EOS) == 2
    assert tokenizer.decode(block) == "der Weg<eos>mill<eos>"


def test_pack_for_scoring_keeps_all_tokens_and_bytes(tokenizer):
    texts = [sample_text(5), "Brücke 日本🙂 é"]
    packed = pack(documents(*texts), tokenizer, max_length=8, for_scoring=True)
    ids, sizes = joined(packed["input_ids"]), joined(packed["num_bytes"])
    assert tokenizer.decode(ids) == "".join(f"{text}<eos>" for text in texts)
    assert sum(sizes) == sum(len(text.encode()) for text in texts)
    assert [size for token, size in zip(ids, sizes, strict=True) if token == EOS] == [0, 0]
    assert all(len(block) == 8 for block in packed["input_ids"][:-1])


def test_bytes_of_single_tokens(tokenizer):
    text = "the old mill über die Brücke"
    packed = pack(documents(text), tokenizer, max_length=100, for_scoring=True)
    (ids,), (sizes,) = packed["input_ids"], packed["num_bytes"]
    expected = [len(tokenizer.decode([token]).encode()) for token in ids[:-1]]
    assert sizes == [*expected, 0]


def test_a_last_token_alone_is_no_block(tokenizer):
    (ids,) = pack(documents("the old mill"), tokenizer, max_length=100, for_scoring=True)["input_ids"]
    packed = pack(documents("the old mill"), tokenizer, max_length=len(ids) - 1, for_scoring=True)
    assert len(packed) == 1


def test_load_and_pack(tokenizer, text_file, tmp_path):
    other = tmp_path / "b.jsonl"
    other.write_text("\n".join(json.dumps({"text": sample_text(30)}) for _ in range(8)))
    args = DataArguments(data=[f"a={text_file}", f"b={other}"], max_length=16)
    train, held_out = load_and_pack(args, tokenizer, eval_fraction=0.2, seed=0)
    assert set(held_out) == {"a", "b"}
    assert {len(ids) for ids in train["input_ids"]} == {16}
    assert len(train) > 4 * len(held_out["a"]) > 0
    whole, none = load_and_pack(args, tokenizer, eval_fraction=0.0, seed=0)
    assert none == {}
    assert len(whole) > len(train)


def test_text_shorter_than_a_block(tokenizer, text_file):
    args = DataArguments(data=[f"a={text_file}"], max_length=100_000)
    with pytest.raises(UserError, match="max_length 100000 is more than"):
        load_and_pack(args, tokenizer, eval_fraction=0.0, seed=0)


TURNS = [
    [("user", "to the mill"), ("assistant", "der Weg"), ("user", "the old"), ("assistant", "über die Brücke")],
    [("system", "mill"), ("user", "der"), ("assistant", "the 日本")],
]


def messages(turns) -> list[dict]:
    return [{"role": role, "content": content} for role, content in turns]


def write_chats(path, count: int = 2, **columns):
    rows = [{"messages": messages(TURNS[i % 2])} | columns for i in range(count)]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def chatting(template: str | None):
    tokenizer = train_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def conversations(count: int) -> Dataset:
    return Dataset.from_dict({"messages": [messages(TURNS[i % 2]) for i in range(count)]})


def test_a_folder_is_all_its_files(tmp_path):
    (tmp_path / "more").mkdir()
    for name, text in [("b.txt", "two\n"), ("a.txt", "one\n"), ("more/c.txt", "three")]:
        (tmp_path / name).write_text(text)
    (tmp_path / "README.md").write_text("not data")
    assert load_documents(str(tmp_path))["text"][:] == ["one\n", "two\n", "three"]


def test_messages_or_text(tmp_path):
    both = str(write_chats(tmp_path / "a.jsonl", text="one"))
    assert load_documents(both, conversations=True)["messages"][0] == messages(TURNS[0])
    assert load_documents(both)["text"][:] == ["one", "one"]
    assert load_documents(both, "text", conversations=True)["text"][:] == ["one", "one"]


def test_loss_is_on_what_the_assistant_says():
    tokenizer = chatting(MARKED)
    packed = pack_conversations(conversations(2), tokenizer, max_length=5)
    ids, labels = joined(packed["input_ids"]), joined(packed["labels"])
    pieces = []
    for turns in TURNS:
        for role, content in turns:
            counts = role == "assistant"
            pieces += [(token, False) for token in tokenizer(f"<bos>{role}:")["input_ids"]]
            pieces += [(token, counts) for token in tokenizer(f"{content}<eos>")["input_ids"]]
    blocks = [pieces[i : i + 5] for i in range(0, len(pieces) - 4, 5)]
    learnt = [block for block in blocks if any(counts for _, counts in block[1:])]
    assert len(learnt) < len(blocks)
    assert ids == [token for token, _ in joined(learnt)]
    assert labels == [token if counts else -100 for token, counts in joined(learnt)]


def test_an_unmarked_template_learnt_the_users_words_too():
    packed = pack_conversations(conversations(40), chatting(PLAIN), max_length=16)
    marked = pack_conversations(conversations(40), chatting(MARKED), max_length=16)
    assert -100 in joined(marked["labels"])
    assert packed[:] == marked[:]
    everything = pack_conversations(conversations(40), chatting(PLAIN), max_length=16, assistant_only=False)
    assert everything["labels"][:] == everything["input_ids"][:]


@pytest.mark.parametrize(
    "rows", [[{"messages": "hello"}], [{"messages": [{"speaker": "user", "value": "hi"}]}], [{"messages": None}]]
)
def test_messages_that_no_template_renders(rows):
    template = "{% for message in messages %}{{ message['role'] + ': ' + message['content'] }}{% endfor %}"
    with pytest.raises(UserError, match="the chat template cannot render the messages"):
        pack_conversations(Dataset.from_list(rows), chatting(template), max_length=4)


def test_messages_need_a_chat_template():
    with pytest.raises(UserError, match="has no chat template"):
        pack_conversations(conversations(2), chatting(None), max_length=4)


def test_text_and_conversations_together(text_file, tmp_path):
    chats = write_chats(tmp_path / "chats.jsonl", count=60)
    args = DataArguments(data=[f"a={text_file}", f"b={chats}"], max_length=16)
    train, held_out = load_and_pack(args, chatting(MARKED), eval_fraction=0.2, seed=0)
    assert set(held_out) == {"a", "b"}
    assert {len(ids) for ids in train["input_ids"]} == {16}
    assert -100 in joined(held_out["b"]["labels"])
    assert -100 not in joined(held_out["a"]["labels"])
    assert -100 in joined(train["labels"])


def test_conversations_without_an_answer_were_called_too_short(tmp_path):
    rows = [{"messages": [{"role": "system", "content": "be kind " * 50}]}] * 9
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    tokenizer = train_tokenizer()
    tokenizer.chat_template = PLAIN
    with pytest.raises(UserError, match="no conversation there has a turn of the assistant"):
        load_and_pack(DataArguments(data=[f"a={tmp_path}/a.jsonl"], max_length=8), tokenizer, 0.0, seed=0)
