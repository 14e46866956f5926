"""Conversations with calls from the Berkeley Function Calling Leaderboard's questions, functions and answers.

The recipe, all of it by seed, so that equal data give equal bytes:

- Of simple_python, multiple, live_simple and live_multiple a question is kept if it is one message of up to 200
  characters whose answer is one call, and each value of the answer that must be given stands in the question once,
  word by word. So it is known which words of the question are which argument.
- A function belongs to the silo whose words (DOMAINS) occur most often in its name and description; with none of them
  it is left out. Of one function up to MAX_OF_A_FUNCTION questions are kept.
- For training each question is told anew NUM_VARIANTS times with other values in the same places: numbers of as many
  digits, texts from the silo's other questions and its words. The question itself, with its own values, is held out.
- What can be called in a conversation are the function and NUM_OTHERS of the same silo's, drawn, in drawn order. Their
  names and their arguments' names and types are told, types as JSON schemas have them; descriptions are left out.

Public conversations, which a base learns from, are of functions whose names are drawn from the words of Python's topics
and from letters; their requests name the function and its arguments. So a base learns to copy, and knows no function.
"""

import itertools
import json
import random
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_tools.corpora import reference_topics

FILES = ("simple_python", "multiple", "live_simple", "live_multiple")
MAX_OF_A_FUNCTION = 4
MAX_ARGUMENTS = 8
MAX_CHARACTERS = 200
NUM_VARIANTS = 40
NUM_OTHERS = 1
# Beginnings of words.
DOMAINS = {
    "money": "stock invest financ bank tax loan mortgage interest dividend currency price sale market compan corporat "
    "profit budget payment account credit fund econom gdp asset revenue portfolio law legal court case crime lawsuit "
    "contract patent judge attorney employee business inventory salary product purchase buy shop store order discount "
    "grocery",
    "science": "math calculat algebra geometr equation integr deriv prime factor gcd statistic probab regression "
    "matrix distance physics force energy velocity acceler electric magnet chemi molec biolog cell gene dna protein "
    "species plant evolution sensor data number sum temperature density planet star light wave circuit random forest "
    "model train api version project",
    "places": "weather forecast travel trip hotel flight bus train ride taxi route map city park museum restaurant "
    "food recipe nutri calorie cook ingredient house home apartment property tourist attraction airport direction air "
    "quality timezone hospital doctor health ecolog mountain river therap salon beach location geo country",
    "leisure": "music song album play artist movie film theater theatre game sport team player league score match "
    "chess card poker concert event ticket art paint sculpt histor war president king religio book novel instrument "
    "chord video photo news alarm media date",
}
# Types of the leaderboard that JSON schemas have another name for; any: none.
TYPES = {"dict": "object", "float": "number", "tuple": "array", "hashmap": "object", "any": ""}
Record = dict[str, Any]


@dataclass(kw_only=True, frozen=True)
class Slot:
    """Words of a question that are the value of an argument."""

    argument: str
    value: str | int | float
    begin: int
    end: int


@dataclass(kw_only=True, frozen=True)
class Question:
    """One of the leaderboard's, with its answer."""

    name: str
    description: str
    """Of the function."""
    text: str
    slots: tuple[Slot, ...]
    tool: Record
    answer: dict[str, list[Any]]
    """Argument to the values that are right; "" where it may be left out."""

    def told(self, values: Sequence[Any]) -> tuple[str, dict[str, Any]]:
        """It with other values in its slots, and the arguments that are right then."""
        text = self.text
        for slot, value in sorted(zip(self.slots, values, strict=True), key=lambda pair: -pair[0].begin):
            text = text[: slot.begin] + str(value) + text[slot.end :]
        return text, {slot.argument: value for slot, value in zip(self.slots, values, strict=True)}


def questions(data: Path) -> Iterator[Question]:
    """The questions that are kept, in the order of the files. `data` is bfcl_eval/data of the package."""
    for name in FILES:
        answers = {one["id"]: one["ground_truth"] for one in _lines(data / "possible_answer" / f"BFCL_v4_{name}.json")}
        for record in _lines(data / f"BFCL_v4_{name}.json"):
            if found := _question(record, answers[record["id"]]):
                yield found


def _lines(file: Path) -> Iterator[Record]:
    yield from map(json.loads, filter(None, file.read_text(encoding="utf-8").split("\n")))


def _question(record: Record, answers: list[Record]) -> Question | None:
    turns = record["question"]
    if len(turns) != 1 or len(turns[0]) != 1 or len(answers) != 1:
        return None
    text = turns[0][0]["content"]
    [(name, answer)] = answers[0].items()
    tool = next((one for one in record["function"] if one["name"] == name), None)
    if tool is None or not text.isascii() or len(text) > MAX_CHARACTERS:
        return None
    description, tool = tool["description"], described(tool)
    if len(tool["function"]["parameters"]["properties"]) > MAX_ARGUMENTS:
        return None
    slots = []
    for argument, allowed in answer.items():
        found = _slot(argument, allowed, text)
        if found:
            slots.append(found)
        elif "" not in allowed:
            return None
    begins = sorted(slots, key=lambda slot: slot.begin)
    apart = all(one.end <= other.begin for one, other in itertools.pairwise(begins))
    if not slots or not apart:
        return None
    return Question(name=name, description=description, text=text, slots=tuple(slots), tool=tool, answer=answer)


def _slot(argument: str, allowed: list[Any], text: str) -> Slot | None:
    """Where in the text one of the values stands, if it does so once."""
    for value in allowed:
        if isinstance(value, str | int | float) and not isinstance(value, bool) and value != "":
            places = [*re.finditer(rf"(?<![\w.]){re.escape(str(value))}(?!\w|\.\d)", text)]
            if len(places) == 1:
                return Slot(argument=argument, value=value, begin=places[0].start(), end=places[0].end())
    return None


def described(tool: Record) -> Record:
    """A function as a tool: names and types."""
    given = tool["parameters"]
    schema = {
        "type": "object",
        "properties": {name: _typed(one) for name, one in given["properties"].items()},
    }
    return {"type": "function", "function": {"name": tool["name"], "parameters": schema}}


def _typed(schema: Record) -> Record:
    kind = TYPES.get(schema.get("type", "any"), schema.get("type", "any"))
    return {"type": kind} if kind else {}


def domain_of(name: str, description: str) -> str | None:
    """The silo that a function belongs to."""
    parted = re.sub(r"([a-z])([A-Z])", r"\1 \2", f"{name} {description}").lower()
    words = re.findall(r"[a-z]+", parted)
    scores = {one: sum(word.startswith(tuple(of.split())) for word in words) for one, of in DOMAINS.items()}
    best = max(scores, key=lambda one: scores[one])
    return best if scores[best] else None


def by_domain(data: Path) -> dict[str, list[Question]]:
    """The questions of each silo."""
    found: dict[str, list[Question]] = {name: [] for name in DOMAINS}
    of_function: dict[str, int] = defaultdict(int)
    seen: set[str] = set()
    for question in questions(data):
        domain = domain_of(question.name, question.description)
        if domain and of_function[question.name] < MAX_OF_A_FUNCTION and question.text not in seen:
            of_function[question.name] += 1
            seen.add(question.text)
            found[domain].append(question)
    return found


# --- conversations ----------------------------------------------------------------------------------------------------


def training(asked: Sequence[Question], domain: str, *, num_variants: int = NUM_VARIANTS) -> Iterator[Record]:
    """Each question told anew with other values, its call, and what else could be called."""
    chance = random.Random(f"training {domain}")
    texts = _texts(asked)
    for _ in range(num_variants):
        for question in asked:
            values = [other_value(slot.value, texts, chance) for slot in question.slots]
            if values == [slot.value for slot in question.slots]:  # the question itself, which is held out
                continue
            text, arguments = question.told(values)
            call = {"type": "function", "function": {"name": question.name, "arguments": arguments}}
            said = [{"role": "user", "content": text}, {"role": "assistant", "content": "", "tool_calls": [call]}]
            yield {"messages": said, "tools": _offered(question, asked, chance)}


def held_out(asked: Sequence[Question], domain: str) -> Iterator[Record]:
    """The questions themselves with what is right, as `atoll eval --tools` reads it."""
    chance = random.Random(f"held out {domain}")
    for question in asked:
        yield {
            "messages": [{"role": "user", "content": question.text}],
            "tools": _offered(question, asked, chance),
            "possible_answer": [{question.name: question.answer}],
        }


def _texts(asked: Sequence[Question]) -> list[str]:
    values = {str(slot.value) for one in asked for slot in one.slots if isinstance(slot.value, str)}
    words = {word for one in asked for word in re.findall(r"[A-Za-z]{4,}", one.text)}
    return sorted(value for value in values | words if not value.isdigit())


def other_value(value: Any, texts: Sequence[str], chance: random.Random) -> Any:
    """One of the same kind: digits for digits, or another text."""
    if isinstance(value, str) and not re.fullmatch(r"[\d.]+", value):
        return chance.choice(texts)
    digits = "".join(chance.choice("123456789") if one.isdigit() else one for one in str(value))
    return type(value)(digits)


def _offered(question: Question, asked: Sequence[Question], chance: random.Random) -> list[Record]:
    others = sorted({one.name for one in asked} - {question.name})
    tools = {one.name: one.tool for one in asked}
    offered = [question.tool, *(tools[name] for name in chance.sample(others, NUM_OTHERS))]
    chance.shuffle(offered)
    return offered


# --- what a base learns from ------------------------------------------------------------------------------------------


def public(number: int) -> Iterator[Record]:
    """So many requests to call a function that is named in them, with arguments that are."""
    chance = random.Random("public")
    words = sorted({word for topic in reference_topics() for word in re.findall(r"[A-Za-z]{3,12}", topic)})
    for _ in range(number):
        functions: dict[str, dict[str, str]] = {}
        while len(functions) <= NUM_OTHERS:
            functions |= [_function(words, chance)]
        name, kinds = chance.choice([*functions.items()])
        arguments = {one: _drawn(kind, words, chance) for one, kind in kinds.items()}
        call = {"type": "function", "function": {"name": name, "arguments": arguments}}
        said = [
            {"role": "user", "content": _request(name, arguments, words, chance)},
            {"role": "assistant", "content": "", "tool_calls": [call]},
        ]
        yield {"messages": said, "tools": [_tool(*one) for one in functions.items()]}


def _request(name: str, arguments: Mapping[str, Any], words: Sequence[str], chance: random.Random) -> str:
    """Its words, with others between them: what is asked for, and each value before or after its argument's name."""
    pairs = []
    for one, value in arguments.items():
        pair = [str(value), *_spoken(one)]
        pairs.append(" ".join(pair if chance.random() < 0.3 else [*pair[1:], chance.choice(("", "of", "is")), pair[0]]))
    chance.shuffle(pairs)
    said = _spoken(name)
    if len(said) > 1 and chance.random() < 0.3:
        said.remove(chance.choice(said))
    asked = chance.choice(("{0} {1}.", "Please {0} with {1}", "{1}: {0}", "What is {0} of {1}?", "{1} for {0}"))
    text = asked.format(" ".join(said), chance.choice((", ", " and ")).join(pairs)).split()
    for _ in range(chance.choice((0, 0, 1, 3))):
        text.insert(chance.choice((0, len(text))), chance.choice(words).lower())
    return " ".join(text)


def _function(words: Sequence[str], chance: random.Random) -> tuple[str, dict[str, str]]:
    """Its name, and the types of its arguments."""
    joint = chance.choice(("_", "_", "."))
    name = joint.join(_word(words, chance) for _ in range(chance.choice((1, 2, 2, 3))))
    numbers = [chance.choice((1, 1, 2)) for _ in range(chance.randint(1, 4))]
    names = ["_".join(_word(words, chance) for _ in range(number)) for number in numbers]
    return name, {one: chance.choice(("string", "integer", "number")) for one in names}


def _word(words: Sequence[str], chance: random.Random) -> str:
    """One of the words, or letters that are none, so that names can't be learned by heart."""
    if chance.random() < 0.5:
        return chance.choice(words).lower()
    return "".join(chance.choice("bcdfghklmnprstvw") + chance.choice("aeiou") for _ in range(chance.randint(1, 4)))


def _spoken(name: str) -> list[str]:
    return re.split(r"[_.]", name)


def _drawn(kind: str, words: Sequence[str], chance: random.Random) -> str | int | float:
    if kind == "integer":
        return chance.randrange(10 ** chance.randint(1, 4))
    if kind == "number":
        return chance.randrange(1000) / 10
    return " ".join(_word(words, chance).title() for _ in range(chance.choice((1, 1, 2, 3))))


def _tool(name: str, kinds: Mapping[str, str]) -> Record:
    schema = {"type": "object", "properties": {one: {"type": kind} for one, kind in kinds.items()}}
    return {"type": "function", "function": {"name": name, "parameters": schema}}
