"""`atoll eval --tools`: how often a model makes exactly the calls that are right, of each silo and of each tool.

What it answered is kept in a file, if one is named, so that an evaluation that was interrupted goes on.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.config.errors import ConfigError
from pretrain.host.done import Done, going_on
from pretrain.host.foreign import shown

if TYPE_CHECKING:
    from data_tools.asked import Question
    from data_tools.chat import ChatEncoder
    from data_tools.chat_template import Template
    from pretrain.federation.evaluation import Subject

FORMAT = 1
NO_CALL = "(no call)"
Tell = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class Judged:
    """One question with what a model answered."""

    silo: str
    """The file's name."""
    line: int
    tools: tuple[str, ...]
    """Those that are to be called."""
    text: str
    verdict: str
    """`right`, or what is wrong (see data_tools/calls.py)."""
    has_names: bool
    """Whether the right functions were called, whatever with."""

    @property
    def is_right(self) -> bool:
        """Whether it makes exactly the right calls."""
        return self.verdict == "right"


@dataclass(kw_only=True)
class Asked:
    """A question, ready to be asked."""

    silo: str
    question: "Question"
    prompt: list[int]

    def judged(self, text: str, *, is_cut: bool, verdict: str = "") -> Judged:
        """With an answer; a `verdict` that is given holds."""
        from data_tools.calls import names_are_right
        from data_tools.calls import verdict as verdict_of

        expected, declared = self.question.expected, self.question.declared
        return Judged(
            silo=self.silo,
            line=self.question.line,
            tools=tuple(sorted({one.name for one in expected})),
            text=text,
            verdict=verdict or verdict_of(text, expected, declared, is_cut=is_cut),
            has_names=not is_cut and not verdict and names_are_right(text, expected),
        )


def evaluate_calls(
    subject: "Subject",
    template: "Template",
    files: Mapping[str, Path],
    *,
    num_tokens: int,
    batch_sequences: int,
    answers: Path | None = None,
    tell: Tell = lambda name, done, of: None,
) -> list[Judged]:
    """Ask a model all questions of some files, by the name of a silo; those in the file `answers` are not asked again.

    An answer has `num_tokens` at most. Raises ConfigError for questions that are none, for a template whose calls
    cannot be read, and for answers of something else.
    """
    from data_tools.chat import ChatEncoder, ChatJob
    from pretrain.federation.answers import Answering

    job = ChatJob(tokenizer=subject.tokenizer_file, template=template, sequence_tokens=2, too_long="stop", held_out=0.0)
    encoder = ChatEncoder(job)
    _check_readable(encoder, template.name)
    asked = [one for name, file in files.items() for one in _asked(name, file, encoder)]
    held: AbstractContextManager[Done | None] = nullcontext()
    if answers:
        held = going_on(answers, _terms(subject, template, files, num_tokens), key="--answers")
    with held as done:
        found = _kept(done, asked) if done else {}
        left = [place for place in range(len(asked)) if place not in found]
        if left:
            model: Any = subject.load()
            own = model.generation_config.eos_token_id if subject.directory else []
            ends = encoder.ends | {*(own if isinstance(own, list) else [own])} - {None}
            answering = Answering(model, ends, num_tokens=num_tokens, batch_sequences=batch_sequences)
            for place in left:
                if answering.room(asked[place].prompt) < 1:
                    found[place] = asked[place].judged("", is_cut=True, verdict="prompt too long")
            left = [place for place in left if place not in found]
            for batch in answering.answers([asked[place].prompt for place in left]):
                for answer in batch:
                    place, text = left[answer.prompt], encoder.spelled(answer.tokens)
                    one = found[place] = asked[place].judged(text, is_cut=answer.is_cut)
                    if done:
                        told = {"silo": one.silo, "line": one.line, "verdict": one.verdict, "text": text}
                        done.add(told | {"is_cut": answer.is_cut})
                tell("questions", len(found), len(asked))
    return [found[place] for place in range(len(asked))]


def _asked(silo: str, file: Path, encoder: "ChatEncoder") -> Iterator[Asked]:
    from data_tools.asked import read_questions
    from data_tools.conversations import NoConversationError

    for question in read_questions(file):
        try:
            yield Asked(silo=silo, question=question, prompt=encoder.prompt(question.begun))
        except NoConversationError as no:
            raise ConfigError(f"{file}, line {question.line}: {no.what}: mend or drop it") from None


def _check_readable(encoder: "ChatEncoder", name: str) -> None:
    """Raise ConfigError for a template that writes calls in a form that is not read, so that none would be right."""
    from data_tools.calls import UnreadableError, calls_in
    from data_tools.conversations import NoConversationError, normalised

    call = {"name": "get_weather", "arguments": {"city": "Bonn", "days": 2}}
    turns = [{"role": "user", "content": "Is it cold?"}, {"role": "assistant", "tool_calls": [call]}]
    schema = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}
    tool = {"name": "get_weather", "description": "Tells it.", "parameters": schema}
    written = "nothing"
    try:
        written = encoder.written(normalised({"messages": turns, "tools": [tool]}))
        if [{"name": one.name, "arguments": one.arguments} for one in calls_in(written)] == [call]:
            return
    except (NoConversationError, UnreadableError):
        pass
    raise ConfigError(
        f"--tools: given, and {name} writes a call as {written[:120]!r}; allowed: a template that writes it as "
        '<tool_call>{"name": ..., "arguments": {...}}</tool_call> or as JSON alone'
    )


# --- what is kept -----------------------------------------------------------------------------------------------------


def _terms(subject: "Subject", template: "Template", files: Mapping[str, Path], num_tokens: int) -> dict[str, Any]:
    """What answers depend on."""
    from pretrain.silo.shards import file_sha256, tokenizer_sha256

    return {
        "format": FORMAT,
        "model": subject.digest(),
        "tokenizer": tokenizer_sha256(subject.tokenizer_file),
        "template": template.sha256,
        "files": {name: file_sha256(file) for name, file in files.items()},
        "num_tokens": num_tokens,
    }


def _kept(done: Done, asked: Sequence[Asked]) -> dict[int, Judged]:
    """The answers that are there, by the place of their question."""
    places, found = {(one.silo, one.question.line): place for place, one in enumerate(asked)}, dict[int, Judged]()
    for line in done.lines:
        try:
            place = places[line["silo"], line["line"]]
            found[place] = asked[place].judged(line["text"], is_cut=line["is_cut"])
        except (KeyError, TypeError):
            raise ConfigError(f"{done.place}; it holds more than answers; allowed: a new one") from None
    return found


# --- what is shown ----------------------------------------------------------------------------------------------------


def print_calls(found: Sequence[Judged]) -> None:
    """A line for each tool of each silo, for each silo, and for all; then what was wrong, the most frequent first."""
    silos: dict[str, list[Judged]] = {}
    for one in found:
        silos.setdefault(one.silo, []).append(one)
    for silo, of_silo in silos.items():
        of_tool: dict[str, list[Judged]] = {}
        for one in of_silo:
            for tool in one.tools or (NO_CALL,):
                of_tool.setdefault(tool, []).append(one)
        for tool in sorted(of_tool):
            _print_line(of_tool[tool], f"{silo}: {tool}")
    for silo, of_silo in silos.items() if len(silos) > 1 else ():
        _print_line(of_silo, silo)
    _print_line(found, "all questions" if len(silos) > 1 else next(iter(silos)))
    wrong = Counter(one.verdict for one in found if not one.is_right)
    if wrong:
        told = ", ".join(f"{number:,} {what}" for what, number in wrong.most_common())
        print(f"wrong: {told}")


def _print_line(found: Iterable[Judged], name: str) -> None:
    exact, names = share_right(found := list(found)), sum(one.has_names for one in found) / len(found)
    print(f"{exact:8.2%} exact {names:8.2%} right functions  {len(found):,} questions  {shown(name)}")


def share_right(found: Sequence[Judged]) -> float:
    """Exact-call accuracy."""
    return sum(one.is_right for one in found) / len(found)
