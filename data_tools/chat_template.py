"""A tokenizer's chat template: what a conversation looks like as text, and which of its characters are learned.

Learned is what the assistant says, with the token that ends its turn. Where it begins and ends is what a template marks
with `{% generation %}` or, where it marks nothing, what lies between its text up to the turn and up to the turn's end.
How every turn begins ("<|im_start|>assistant") stands in every prompt and is never learned, whatever is marked.
"""

import datetime
import itertools
import json
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_tools.conversations import Conversation, Message, NoConversationError
from data_tools.pieces import one_line
from pretrain.config.errors import ConfigError
from pretrain.silo.shards import TEMPLATE_FILE
from pretrain.silo.template import CONFIG_FILE, own_template, read_template, sha256_of, special_tokens

MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
# As "<|im_end|>", also with the wide bars that some have.
TOKEN = re.compile(r"<[|\uff5c][^\s<>]{1,40}[|\uff5c]>")
TODAY = "strftime_now"  # what a template calls to write today's date

Span = tuple[int, int]
"""Begin and end, in characters."""

# What is rendered to see what a template does with content, calls and tools; each word occurs in no template.
_ASKED, _SAID, _RESULT = "qaskedq", "qsaidq", "qresultq"
_PROBE: list[Message] = [{"role": "user", "content": _ASKED}, {"role": "assistant", "content": _SAID}]
_CALL: dict[str, Any] = {"type": "function", "function": {"name": "qcalledq", "arguments": {"city": "qcityq"}}}
_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "qcalledq",
        "description": "It tells.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "Where."}}},
    },
}
_CALLING: list[Message] = [
    _PROBE[0],
    {"role": "assistant", "content": "", "tool_calls": [_CALL]},
    {"role": "tool", "name": "qcalledq", "content": _RESULT},
    _PROBE[1],
]
_ALL = "a template that renders all of it"
_MARKED = "a template with {% generation %} marks, or one that does not"


@dataclass(kw_only=True, frozen=True)
class Template:
    """A chat template as every worker is told of it."""

    source: str
    """Its Jinja text."""
    name: str
    """The file it is from, for messages."""
    special_tokens: tuple[tuple[str, str], ...]
    """bos_token, eos_token and so on, as the template may name them."""
    date: str = ""
    """The day that a template which writes today's date is given, YYYY-MM-DD."""

    @property
    def sha256(self) -> str:
        """Of its text, in hexadecimal."""
        return sha256_of(self.source)


@dataclass(kw_only=True, frozen=True)
class Rendered:
    """A conversation as text."""

    text: str
    """What the template made of it."""
    learned: tuple[Span, ...]
    """Rising, apart from each other: the characters that the assistant says and is to learn."""


def find_template(tokenizer_file: Path, given: Path | None, date: str) -> Template:
    """The template that `given` holds, or that lies beside the tokenizer. Raises ConfigError.

    `date` is the day for templates that write today's: without one these are refused, as no two days would give the
    same bytes.
    """
    special = tuple(special_tokens(tokenizer_file, key="--tokenizer").items())
    if given:
        source, name = read_template(given, key="--chat-template"), str(given)
    elif own := own_template(tokenizer_file, key="--tokenizer"):
        source, name = own[0], str(own[1])
    else:
        raise ConfigError(
            f"--chat: {tokenizer_file.parent} has no chat template ({TEMPLATE_FILE}, or chat_template in "
            f"{CONFIG_FILE}); allowed: a tokenizer's folder that has one, --chat-template FILE, or what atoll data "
            "tokenizer --chat makes"
        )
    if date:
        try:
            datetime.date.fromisoformat(date)
        except ValueError:
            raise ConfigError(f"--chat-date: {date!r} given; allowed: a day as YYYY-MM-DD") from None
    if TODAY in source and not date:
        raise ConfigError(
            f"--chat-date: nothing given, and {name} writes today's date, so that every day would give other bytes; "
            "allowed: a day as YYYY-MM-DD"
        )
    return Template(source=source, name=name, special_tokens=special, date=date if TODAY in source else "")


class Renderer:
    """Renders conversations; one a process."""

    def __init__(self, template: Template, added_tokens: Collection[str]) -> None:
        """`added_tokens` are those that the tokenizer has beside its vocabulary of text. Raises ConfigError for a
        template that cannot be used, or not with them."""
        self.template = template
        self.has_marks = bool(MARK.search(template.source))
        self._as_parts = self._as_json = False
        try:
            knows_calls = self._choose_form()
            self._set_date()
            prompts = [(self._render(_PROBE[:1], None, prompt=True)[0], _ASKED)]
            if knows_calls:
                prompts.append((self._render(_CALLING[:3], [_TOOL], prompt=True)[0], _RESULT))
            end_of_turn = self._render(_PROBE, None)[0].rpartition(_SAID)[2]
        except NoConversationError as error:
            raise ConfigError(f"--chat: {template.name}: it renders no question and answer: {error.what}") from None
        headers = [text.rpartition(said)[2] for text, said in prompts if said in text]
        self._whole_headers = tuple(filter(None, headers))
        self._headers = _pieces(headers, added_tokens, end_of_turn)
        self._check_tokens(set(added_tokens))

    def _check_tokens(self, added_tokens: set[str]) -> None:
        """Whether a turn ends with a token that nothing but the end of a turn is, and what looks like one is one."""
        name, rendered = self.template.name, self.render(Conversation(messages=_PROBE))
        advice = "allowed: a tokenizer that has it (atoll data tokenizer --chat makes one), or another --chat-template"
        for written in TOKEN.findall(rendered.text):
            if written not in added_tokens:
                raise ConfigError(
                    f"--chat: {name}: it writes {written!r}, which is no token of the tokenizer; {advice}"
                )
        begin, end = rendered.learned[-1] if rendered.learned else (0, 0)
        ending = rendered.text[begin:end].strip().rpartition(_SAID)[2]
        self.end_of_turn = max((one for one in added_tokens if one and ending.endswith(one)), key=len, default="")
        if not self.end_of_turn:
            what = f"ends the assistant's turn with {ending!r}, which is no token" if ending else "does not end a turn"
            raise ConfigError(f"--chat: {name}: it {what}, so that the model would not learn to stop; {advice}")

    def render(self, conversation: Conversation) -> Rendered:
        """A conversation as text, and what of it is learned.

        Raises NoConversationError where the template refuses the conversation, and ConfigError where the template
        cannot be learned from.
        """
        rendered = (self.by_marks if self.has_marks else self.by_prefixes)(conversation)
        self._check_nothing_dropped(conversation, rendered)
        return rendered

    def prompt(self, conversation: Conversation) -> str:
        """What stands before the assistant's next turn. Raises as `render` does."""
        text, _ = self._render(conversation.messages, conversation.tools, prompt=True)
        self._check_tools(conversation, text)
        return text

    def by_marks(self, conversation: Conversation) -> Rendered:
        """The same from the template's marks."""
        text, marked = self._render(conversation.messages, conversation.tools, marks=True)
        spans = list(_joined(marked))
        if conversation.untrained:
            places = [place for place, one in enumerate(conversation.messages) if one["role"] == "assistant"]
            if len(spans) != len(places):
                why = f"it marks {len(spans)} pieces of {len(places)} turns, and not all of these are to be learned"
                raise self._refused(why, "a template that marks each turn once")
            chosen = zip(places, spans, strict=True)
            spans = [span for place, span in chosen if place not in conversation.untrained]
        return Rendered(text=text, learned=self._without_headers(text, spans))

    def by_prefixes(self, conversation: Conversation) -> Rendered:
        """The same from what is rendered up to each turn and up to its end."""
        messages, tools = conversation.messages, conversation.tools
        text, _ = self._render(messages, tools)
        spans = []
        for place, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before, _ = self._render(messages[:place], tools, prompt=True)
            until = self._render(messages[: place + 1], tools)[0] if place + 1 < len(messages) else text
            for begins, whole, what in (
                (before, until, "begins the assistant's turn otherwise than its prompt"),
                (until, text, "writes a turn of the assistant otherwise once more follows"),
            ):
                if not whole.startswith(begins):
                    raise self._refused(f"it {what}: {_difference(begins, whole)}", _MARKED)
            if place not in conversation.untrained:
                spans.append((len(before), len(until)))
        return Rendered(text=text, learned=self._without_headers(text, spans))

    def _without_headers(self, text: str, spans: Sequence[Span]) -> tuple[Span, ...]:
        """The spans without what prompts give of a turn, wherever in or before its beginning that begins."""
        begins = [self._after_header(text, begin) for begin, _ in spans]
        return tuple((begin, end) for begin, (_, end) in zip(begins, spans, strict=True) if begin < end)

    def _after_header(self, text: str, begin: int) -> int:
        if text.endswith(self._whole_headers, 0, begin):  # nothing of a prompt comes after
            return begin
        sizes = (
            (len(header), text.find(header, max(0, begin - len(header)), begin + len(header)))
            for header in self._headers
        )
        return max([begin, *(at + size for size, at in sizes if at >= 0)])

    def _check_nothing_dropped(self, conversation: Conversation, rendered: Rendered) -> None:
        """Some templates leave out what they do not know, and nothing would be learned of it."""
        learned = "".join(rendered.text[begin:end] for begin, end in rendered.learned)
        self._check_tools(conversation, rendered.text)
        for place, message in enumerate(conversation.messages):
            role, text = message["role"], rendered.text if place in conversation.untrained else learned
            for call in message.get("tool_calls", ()):
                if call["function"]["name"] not in text:
                    raise self._refused(f"it leaves out calls, as of {one_line(call['function']['name'])!r}", _ALL)
            for said in ("content", "reasoning_content") if role != "tool" else ():
                words = message.get(said, "").rsplit(None, 1)
                if words and words[-1] not in (text if role == "assistant" else rendered.text):
                    what = "the reasoning" if said != "content" else f"what {role} says"
                    raise self._refused(f"it leaves out {what}, as {one_line(words[-1])[:40]!r}", _ALL)

    def _check_tools(self, conversation: Conversation, text: str) -> None:
        for tool in conversation.tools or ():
            if tool["function"]["name"] not in text:
                raise self._refused(f"it leaves out the tools, as {one_line(tool['function']['name'])!r}", _ALL)

    def _refused(self, why: str, allowed: str) -> ConfigError:
        return ConfigError(f"--chat: {self.template.name}: {why}; allowed: {allowed}: name one with --chat-template")

    # --- rendering ----------------------------------------------------------------------------------------------------

    def _set_date(self) -> None:
        if self.template.date:
            from transformers.utils.chat_template_utils import _compile_jinja_template

            # The one that transformers keeps, and renders with.
            day = datetime.date.fromisoformat(self.template.date)
            _compile_jinja_template(self.template.source).globals[TODAY] = day.strftime

    def _choose_form(self) -> bool:
        """Whether the template wants content as text or in parts, and calls' arguments as objects or as JSON.

        Returns whether it renders calls at all.
        """
        if not (
            self._renders(_PROBE, None, _ASKED, _SAID) or self._renders(_PROBE, None, _ASKED, _SAID, as_parts=True)
        ):
            self._as_parts = False
            self._render(_PROBE, None)  # says what is wrong
            raise NoConversationError("template", "it leaves out what is said")
        words = ("qcalledq", "qcityq", _RESULT)
        return self._renders(_CALLING, [_TOOL], *words) or self._renders(_CALLING, [_TOOL], *words, as_json=True)

    def _renders(
        self, messages: Sequence[Message], tools: Any, *words: str, as_parts: bool = False, as_json: bool = False
    ) -> bool:
        """Whether all words are in what is rendered in a form, which is kept if so."""
        before = self._as_parts, self._as_json
        self._as_parts, self._as_json = as_parts or self._as_parts, as_json
        try:
            text, _ = self._render(messages, tools)
            found = all(word in text for word in words)
        except NoConversationError:
            found = False
        if not found:
            self._as_parts, self._as_json = before
        return found

    def _render(
        self,
        messages: Sequence[Message],
        tools: list[dict[str, Any]] | None,
        *,
        prompt: bool = False,
        marks: bool = False,
    ) -> tuple[str, list[Span]]:
        """The text and, with `marks`, what is marked. Raises NoConversationError for what the template raises."""
        import jinja2
        from transformers.utils.chat_template_utils import render_jinja_template

        formed = [self._formed(message) for message in messages] if self._as_parts or self._as_json else list(messages)
        try:
            texts, marked = render_jinja_template(
                [formed],
                tools=tools,
                chat_template=self.template.source,
                return_assistant_tokens_mask=marks,
                add_generation_prompt=prompt,
                **dict(self.template.special_tokens),
            )
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            raise NoConversationError("refused by the template", f"the template says: {one_line(error)}") from None
        return texts[0], list(marked[0]) if marks else []

    def _formed(self, message: Message) -> Message:
        formed = dict(message)
        if self._as_parts:
            formed["content"] = [{"type": "text", "text": message["content"]}]
        if self._as_json and "tool_calls" in message:
            formed["tool_calls"] = [
                call | {"function": call["function"] | {"arguments": _as_json(call["function"]["arguments"])}}
                for call in message["tool_calls"]
            ]
        return formed


def _as_json(arguments: dict[str, Any]) -> str:
    return json.dumps(arguments, ensure_ascii=False)


def _joined(spans: Iterable[Span]) -> Iterator[Span]:
    """The spans that are not empty, those that touch as one."""
    begin = end = 0
    for one in spans:
        if one[0] != end:
            if begin < end:
                yield begin, end
            begin = one[0]
        end = one[1]
    if begin < end:
        yield begin, end


def _pieces(headers: Iterable[str], added_tokens: Iterable[str], end_of_turn: str) -> set[str]:
    """What prompts end with, and its pieces from one added token to another, but for what a turn of the assistant ends
    with, too: templates write less of it where a turn goes on."""
    names = sorted(filter(None, added_tokens), key=len, reverse=True)
    cut = re.compile("|".join(map(re.escape, names)) or r"\Z")
    found = set()
    for header in headers:
        tokens = list(cut.finditer(header))
        begins, ends = {0, *(one.start() for one in tokens)}, {len(header), *(one.end() for one in tokens)}
        found |= {header[begin:end] for begin, end in itertools.product(begins, ends) if begin < end}
    return {piece for piece in found if not end_of_turn.startswith(piece)}


def _difference(begins: str, whole: str) -> str:
    """Where one text stops to be the beginning of the other, in a few words."""
    same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(begins, whole, strict=False)))
    first, other = (one_line(repr(text[max(0, same - 20) : same + 20])) for text in (begins, whole))
    return f"{first} becomes {other}"
