# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""A chat template turns messages into text; this module renders templates and finds the tokens that the assistant wrote.

Some templates mark the assistant's text by `{% generation %}`. Most do not. For those, the template's loop over the messages
is observed: each pass that sees an assistant's message writes a header, which the generation prompt contains too, and then
the assistant's turn.
"""

import re
from functools import lru_cache
from itertools import count
from typing import Any, NamedTuple

from jinja2 import Environment, TemplateError, TemplateSyntaxError
from transformers import BatchEncoding, PreTrainedTokenizerBase

from .errors import UserError


# passes of a template's loops and macros for one conversation; more would take longer than seconds
MAX_PASSES = 300_000
# Unicode noncharacters, which do not occur in text, delimit the marks that an instrumented template writes
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
    """The chat template does not show which tokens the assistant wrote."""

    def __init__(self, reason: str):
        super().__init__(
            f"the chat template does not show which text the assistant wrote: {reason}; put {{% generation %}} ... "
            "{% endgeneration %} around that text in the template, or set assistant_only false to train on all tokens"
        )


class _Instrument:
    """Rewrites a template's tags so that the template counts passes of loops and macros and marks parts of the text.

    Args:
        mark: `messages` marks the text of each pass over a message, `generation` the text between the template's own
            generation tags; None marks nothing.
    """

    def __init__(self, mark: str | None):
        self.mark, self.numbers = mark, count()
        self.loops: list[int] = []

    def __call__(self, match: re.Match[str]) -> str:
        """Returns the replacement of a tag; the replacement trims the whitespace after it as the tag did."""
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
    # with an unclosed tag, the pattern would search to the end of the template from each opening, which takes hours
    kinds = [kind for _, kind, _ in Environment().lex(template)]
    if kinds.count("block_begin") != kinds.count("block_end"):
        raise TemplateSyntaxError("a tag has no end", template.count("\n") + 1)
    # the line break is removed again by trim_blocks
    return "{% set moe_passes = namespace(n=0) %}\n" + _TAGS.sub(_Instrument(mark), template)


def _without_none(value: Any) -> Any:
    """Removes keys whose value is None, except `content`.

    Arrow adds these keys if the rows of a column have different keys.
    """
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None or key == "content"}
    return [_without_none(item) for item in value] if isinstance(value, list) else value


def _apply(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, Any]],
    tools: list[Any] | None,
    mark: str | None = None,
    prompt: bool = False,
) -> str:
    """Renders messages by the chat template with the marks that [`_Instrument`] adds."""
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
        text = tokenizer.apply_chat_template(
            _without_none(messages),
            tools=_without_none(tools),
            chat_template=template,
            tokenize=False,
            add_generation_prompt=prompt,
        )
    except TEMPLATE_ERRORS as error:
        raise UserError(f"the chat template cannot render the messages {messages!r:.200}: {error}") from error
    if not isinstance(text, str):
        raise TypeError(f"apply_chat_template returned {type(text).__name__} for one conversation")
    return text


def render_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, Any]],
    tools: list[Any] | None = None,
    prompt: bool = False,
) -> str:
    """Renders a conversation as text by the tokenizer's chat template.

    Args:
        tokenizer: tokenizer with a chat template.
        messages: dictionaries with `role` and `content`.
        tools: JSON schemas of the functions that the assistant may call.
        prompt: whether to append the header after which the assistant answers.

    Raises:
        UserError: if there is no template, it fails, or its loops take more than `MAX_PASSES` passes.
    """
    return _apply(tokenizer, messages, tools, prompt=prompt)


class _Segment(NamedTuple):
    """The characters `start` to `stop` of a text, written in one pass over a message of `role`."""

    role: str
    start: int
    stop: int


def _segments(marked: str) -> tuple[str, list[_Segment]]:
    """Returns the text without marks, and one segment for each pass over a message that wrote text."""
    text = ""
    segments: list[_Segment] = []
    current: tuple[str, str, int] | None = None
    for part in re.split(f"({OPEN}[^{CLOSE}{END}]*[{CLOSE}{END}])", marked):
        if not part.startswith(OPEN):
            text += part
            continue
        number, _, role = part[1:-1].partition(":")
        if current is not None and current[0] != number:
            continue  # this mark belongs to a loop inside the pass over a message
        if current is not None and len(text) > current[2]:
            segments.append(_Segment(current[1], current[2], len(text)))
        current = (number, role, len(text)) if part.endswith(CLOSE) else None
    return text, segments


def _headers(tokenizer: PreTrainedTokenizerBase, before: list[dict[str, Any]], tools: list[Any] | None) -> list[str]:
    """Returns possible headers of an assistant's turn after the messages `before`, the likeliest first."""
    question = before or [{"role": "user", "content": "x"}]
    tails = []
    for prompt in (True, False):
        text, segments = _segments(_apply(tokenizer, question, tools, mark="messages", prompt=prompt))
        tails.append(text[segments[-1].stop if segments else 0 :])
    prompts = [tails[0], tails[0].removeprefix(tails[1])]
    # the prompt of a thinking model opens a thought, which templates leave out of earlier turns
    prompts += [prompt.partition("<think>")[0] for prompt in prompts]
    return [lead + prompt for prompt in prompts for lead in ("", tokenizer.bos_token or "")]


def _turns(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], tools: list[Any] | None
) -> tuple[str, list[tuple[int, int]]]:
    """Returns the text of a conversation, and the character ranges of the assistant's turns including headers."""
    text, segments = _segments(_apply(tokenizer, messages, tools, mark="messages"))
    if text != render_chat(tokenizer, messages, tools):
        raise UnclearTurnsError("it changes what its loop over the messages wrote")
    found = [(start, end) for role, start, end in segments if role == "assistant"]
    turns = sum(message["role"] == "assistant" for message in messages)
    if len(found) != turns:
        raise UnclearTurnsError(f"its loops write {len(found)} of {turns} turns")
    return text, found


def _spans(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], tools: list[Any] | None, first: int
) -> tuple[str, list[tuple[int, int]]]:
    """Returns the text of a conversation, and the character ranges that the assistant wrote from message `first` on."""
    text, turns = _turns(tokenizer, messages, tools)
    indices = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    spans: list[tuple[int, int]] = []
    headers: dict[str | None, list[str]] = {}
    for i, (start, end) in zip(indices, turns, strict=True):
        before = messages[i - 1]["role"] if i else None
        if before not in headers:
            headers[before] = _headers(tokenizer, messages[:i], tools)
        header = next((header for header in headers[before] if text.startswith(header, start, end)), None)
        if header is None:
            raise UnclearTurnsError(f"a turn begins {text[start : start + 40]!r}, unlike {headers[before][0]!r}")
        if i >= first:
            spans.append((start + len(header), end))
    # some templates write the end-of-text token once after all messages, where it still ends the assistant's turn
    eos = tokenizer.eos_token
    if spans and messages[-1]["role"] == "assistant" and eos and text[spans[-1][1] :].strip() == eos:
        spans[-1] = (spans[-1][0], len(text))
    return text, spans


def _marked_spans(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], tools: list[Any] | None, first: int
) -> tuple[str, list[tuple[int, int]]]:
    """Returns the result of [`_spans`] for a template with generation tags.

    transformers' own mask is not used because it is wrong for tags inside a macro.
    """
    text, segments = _segments(_apply(tokenizer, messages, tools, mark="generation"))
    if text != render_chat(tokenizer, messages, tools):
        raise UnclearTurnsError("it changes what it marked")
    earlier = sum(message["role"] == "assistant" for message in messages[:first])
    begin = _turns(tokenizer, messages, tools)[1][earlier - 1][1] if earlier else 0
    return text, [(start, end) for _, start, end in segments if start >= begin]


class EncodedChat(NamedTuple):
    """A tokenised conversation.

    Attributes:
        text: the rendered conversation.
        encoding: token ids, with character offsets if the tokenizer is a fast one.
        is_target: for each token, whether a model is trained to predict it.
    """

    text: str
    encoding: BatchEncoding
    is_target: list[bool]


def encode_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, Any]],
    tools: list[Any] | None,
    assistant_only: bool,
    first: int = 0,
) -> EncodedChat:
    """Tokenises a conversation and finds the tokens that the assistant wrote.

    Args:
        tokenizer: tokenizer with a chat template; it must be a fast one if `assistant_only` is set.
        messages: dictionaries with `role` and `content`.
        tools: JSON schemas of the functions that the assistant may call.
        assistant_only: whether only the assistant's tokens are targets.
        first: index of the first message whose tokens are targets, if `assistant_only` is set.

    Returns:
        Text, encoding and targets. The mark that ends a turn is a target; the header that opens a turn, such as
        `<|im_start|>assistant`, is not.

    Raises:
        UnclearTurnsError: if template or tokenizer do not show which text the assistant wrote.
        UserError: if there is no template, it fails, or its loops take more than `MAX_PASSES` passes.
    """

    def encode(text: str) -> BatchEncoding:
        return tokenizer(text, add_special_tokens=False, return_offsets_mapping=tokenizer.is_fast, verbose=False)

    if not assistant_only:
        text = render_chat(tokenizer, messages, tools)
        encoding = encode(text)
        return EncodedChat(text, encoding, [True] * len(encoding["input_ids"]))
    if not tokenizer.is_fast:
        raise UnclearTurnsError(
            "the tokenizer is a slow one, and only a fast tokenizer gives the position of each token in the text"
        )
    # the rendering below raises the error if there is no template
    template = tokenizer.get_chat_template(tools=tools) if tokenizer.chat_template else ""
    find = _marked_spans if _GENERATION.search(template) else _spans
    text, spans = find(tokenizer, messages, tools, first)
    encoding = encode(text)
    # a token across the border of a span is a target, as in transformers' own mask
    is_target = [
        any(begin < stop and end > start for start, stop in spans) for begin, end in encoding["offset_mapping"]
    ]
    return EncodedChat(text, encoding, is_target)
