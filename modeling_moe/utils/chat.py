# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""A chat template turns messages into text, and this module tells which part of the text the assistant wrote.

Some templates mark that by `{% generation %}`. Most do not; there the template's loop over the messages tells it: each pass of
the loop that sees an assistant's message writes a header, which the generation prompt writes too, and then the assistant's turn.
"""

import re
from collections.abc import Sequence
from functools import lru_cache
from itertools import count
from typing import Any

from jinja2 import Environment, TemplateError, TemplateSyntaxError
from transformers import PreTrainedTokenizerBase

from .errors import UserError


MAX_PASSES = 300_000  # of a template's loops and macros, for one conversation: seconds of work
# noncharacters of Unicode, which no text holds
OPEN, CLOSE, END = "\ufdd0", "\ufdd1", "\ufdd2"
TEMPLATE_ERRORS = (
    TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
)
_TAGS = re.compile(
    r"\{#.*?#\}|\{%[-+]?\s*raw\b.*?\bendraw\s*[-+]?%\}"
    r"|\{%(?P<lead>[-+]?)\s*(?P<tag>for|endfor|macro|generation|endgeneration)\b(?:\s+(?P<target>\w+)\s+in\b)?.*?(?P<trim>[-+]?)%\}",
    re.DOTALL,
)
_SPEND = (
    f"{{% set moe_passes.n = moe_passes.n + 1 %}}{{% if moe_passes.n > {MAX_PASSES} %}}"
    f'{{{{ raise_exception("its loops take more than {MAX_PASSES} passes") }}}}{{% endif %}}'
)
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class UnclearTurnsError(UserError):
    """A chat template does not tell which tokens the assistant wrote."""

    def __init__(self, reason: str):
        super().__init__(
            f"the chat template does not tell what the assistant says: {reason}; put {{% generation %}} ... "
            "{% endgeneration %} around it in the template, or set assistant_only false to count all tokens"
        )


class _Instrument:
    """Writes a template anew, so that it counts the passes of loops and macros and marks parts of the text.

    Args:
        mark: `messages` marks what each pass over a message writes, `generation` what the template's own marks enclose.
    """

    def __init__(self, mark: str | None):
        self.mark, self.loops, self.numbers = mark, [], count()

    def __call__(self, match: re.Match) -> str:
        """What takes the place of a tag; the last tag of it trims as that one does."""
        tag, trim = match["tag"], match["trim"]
        if tag is None:  # a comment or raw text
            return match[0]
        if tag == "endgeneration":
            return f"{{%{match['lead']} if true %}}{self._show(f'g{END}', 'generation')}{{% endif %}}{match[0]}"
        if tag == "generation":
            after = self._show(f"g:{CLOSE}", "generation")
        elif tag == "endfor":
            after = self._show(f"{self.loops.pop() if self.loops else 0}{END}", "messages")
        else:
            after = _SPEND + (self._begin(match["target"]) if tag == "for" else "")
        return f"{match[0]}{after}{{% if true %}}{{% endif {trim}%}}"

    def _show(self, mark: str, kind: str) -> str:
        return f'{{{{ "{OPEN}{mark}" }}}}' if self.mark == kind else ""

    def _begin(self, name: str | None) -> str:
        self.loops.append(next(self.numbers))
        if self.mark != "messages" or not name:
            return ""
        role = f'{{{{ "{OPEN}{self.loops[-1]}:" ~ {name}.role ~ "{CLOSE}" }}}}'
        return f"{{% if {name} is mapping and {name}.role is defined %}}{role}{{% endif %}}"


@lru_cache
def _instrument(template: str, mark: str | None) -> str:
    # a comment or a tag without an end, which the pattern would look for from each beginning, takes hours
    kinds = [kind for _, kind, _ in Environment().lex(template)]
    if kinds.count("block_begin") != kinds.count("block_end"):
        raise TemplateSyntaxError("a tag has no end", template.count("\n") + 1)
    # trim_blocks takes the line end after the first tag away
    return "{% set moe_passes = namespace(n=0) %}\n" + _TAGS.sub(_Instrument(mark), template)


def _without_none(value: Any) -> Any:
    """What Arrow filled in, where rows of one column have different keys, is taken away again."""
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None or key == "content"}
    return [_without_none(item) for item in value] if isinstance(value, list) else value


def _apply(tokenizer: PreTrainedTokenizerBase, messages: Any, tools: Any, mark: str | None = None, **options) -> Any:
    if tokenizer.chat_template is None:
        raise UserError(
            "the model's tokenizer has no chat template, which conversations need: save chat_template.jinja beside it, or "
            "give plain text"
        )
    if not isinstance(messages, list) or not all(isinstance(row, dict) and "role" in row for row in messages):
        raise UserError(
            f"the chat template cannot render the messages {messages!r:.200}: they must be a list of dicts with role and "
            "content"
        )
    try:
        template = _instrument(tokenizer.get_chat_template(tools=tools), mark)
        return tokenizer.apply_chat_template(
            _without_none(messages),
            tools=_without_none(tools),
            chat_template=template,
            **({"tokenize": False} | options),
        )
    except TEMPLATE_ERRORS as error:
        raise UserError(f"the chat template cannot render the messages {messages!r:.200}: {error}") from error


def render_chat(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict], tools: list | None = None, prompt: bool = False
) -> str:
    """Renders a conversation by the tokenizer's chat template.

    Args:
        tokenizer: one with a chat template.
        messages: dicts with `role` and `content`.
        tools: JSON schemas of the functions that the assistant may call.
        prompt: append what makes the assistant answer.

    Raises:
        UserError: if there is no template, it fails, or its loops take more than `MAX_PASSES` passes.
    """
    return _apply(tokenizer, messages, tools, add_generation_prompt=prompt)


def _segments(marked: str) -> tuple[str, list[tuple[str, int, int]]]:
    """The text without marks, and of each pass over a message its role and the range of characters that it wrote."""
    text, segments, current = "", [], None
    for part in re.split(f"({OPEN}[^{CLOSE}{END}]*[{CLOSE}{END}])", marked):
        if not part.startswith(OPEN):
            text += part
            continue
        number, _, role = part[1:-1].partition(":")
        if current is not None and current[0] != number:
            continue  # a loop within the pass over a message
        if current is not None and len(text) > current[2]:
            segments.append((current[1], current[2], len(text)))
        current = (number, role, len(text)) if part.endswith(CLOSE) else None
    return text, segments


def _headers(tokenizer: PreTrainedTokenizerBase, before: list[dict], tools: Any) -> list[str]:
    """What can stand before an assistant's turn that follows the messages `before`; the likeliest first."""
    question = before or [{"role": "user", "content": "x"}]
    tails = []
    for prompt in (True, False):
        text, segments = _segments(_apply(tokenizer, question, tools, mark="messages", add_generation_prompt=prompt))
        tails.append(text[segments[-1][2] if segments else 0 :])
    prompts = [tails[0], tails[0].removeprefix(tails[1])]
    # a thinking model's prompt opens the thought, which earlier turns are shown without
    prompts += [prompt.partition("<think>")[0] for prompt in prompts]
    return [lead + prompt for prompt in prompts for lead in ("", tokenizer.bos_token or "")]


def _turns(tokenizer: PreTrainedTokenizerBase, messages: list[dict], tools: Any) -> tuple[str, list[tuple[int, int]]]:
    """The text of a conversation, and the ranges of its characters that hold the assistant's turns with their headers."""
    text, segments = _segments(_apply(tokenizer, messages, tools, mark="messages"))
    if text != render_chat(tokenizer, messages, tools):
        raise UnclearTurnsError("it changes what its loop over the messages wrote")
    found = [(start, end) for role, start, end in segments if role == "assistant"]
    turns = sum(message["role"] == "assistant" for message in messages)
    if len(found) != turns:
        raise UnclearTurnsError(f"its loops write {len(found)} of {turns} turns")
    return text, found


def _spans(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict], tools: Any, first: int
) -> tuple[str, list[tuple[int, int]]]:
    """The text of a conversation, and the ranges of its characters that the assistant wrote from message `first` on."""
    text, turns = _turns(tokenizer, messages, tools)
    indices = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    spans, headers = [], {}
    for i, (start, end) in zip(indices, turns, strict=True):
        before = messages[i - 1]["role"] if i else None
        if before not in headers:
            headers[before] = _headers(tokenizer, messages[:i], tools)
        header = next((header for header in headers[before] if text.startswith(header, start, end)), None)
        if header is None:
            raise UnclearTurnsError(f"a turn begins {text[start : start + 40]!r}, unlike {headers[before][0]!r}")
        if i >= first:
            spans.append((start + len(header), end))
    # some templates end the text, and not each turn, with the eos
    eos = tokenizer.eos_token
    if spans and messages[-1]["role"] == "assistant" and eos and text[spans[-1][1] :].strip() == eos:
        spans[-1] = (spans[-1][0], len(text))
    return text, spans


def _marked_spans(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict], tools: Any, first: int
) -> tuple[str, list[tuple[int, int]]]:
    """What [`_spans`] returns, by the marks that the template has.

    transformers' own mask is wrong for marks within a macro.
    """
    text, segments = _segments(_apply(tokenizer, messages, tools, mark="generation"))
    if text != render_chat(tokenizer, messages, tools):
        raise UnclearTurnsError("it changes what it marked")
    earlier = sum(message["role"] == "assistant" for message in messages[:first])
    begin = _turns(tokenizer, messages, tools)[1][earlier - 1][1] if earlier else 0
    return text, [(start, end) for _, start, end in segments if start >= begin]


def encode_chat(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict], tools: list | None, assistant_only: bool, first: int = 0
) -> tuple[str, Any, Sequence[int | bool]]:
    """Tokenises a conversation and tells which tokens the assistant wrote.

    Args:
        tokenizer: one with a chat template, and with `assistant_only` a fast one.
        messages: dicts with `role` and `content`.
        tools: JSON schemas of the functions that the assistant may call.
        assistant_only: count the assistant's tokens alone.
        first: with `assistant_only`, count only from that message on.

    Returns:
        The text; its encoding, with offsets if the tokenizer is a fast one; for each token, whether it counts. A turn's end
        mark counts, and what opens the turn, such as `<|im_start|>assistant`, does not.

    Raises:
        UnclearTurnsError: if the template or the tokenizer does not tell what the assistant wrote.
        UserError: if there is no template, it fails, or its loops take more than `MAX_PASSES` passes.
    """
    options = {"add_special_tokens": False, "return_offsets_mapping": tokenizer.is_fast, "verbose": False}
    if not assistant_only:
        text = render_chat(tokenizer, messages, tools)
        encoded = tokenizer(text, **options)
        return text, encoded, [True] * len(encoded["input_ids"])
    if not tokenizer.is_fast:
        raise UnclearTurnsError(
            "the tokenizer is not a fast one, which alone knows where its tokens stand in the text"
        )
    # without a template the rendering says so
    template = tokenizer.get_chat_template(tools=tools) if tokenizer.chat_template else ""
    find = _marked_spans if _GENERATION.search(template) else _spans
    text, spans = find(tokenizer, messages, tools, first)
    encoded = tokenizer(text, **options)
    counts = [False] * len(encoded["input_ids"])
    for i, (begin, end) in enumerate(encoded["offset_mapping"]):
        # a token across the border counts, as in transformers' own mask
        counts[i] = any(begin < stop and end > start for start, stop in spans)
    return text, encoded, counts
