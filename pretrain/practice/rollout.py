"""A model tries tasks, a verifier says what was right, and what was right becomes packed shards.

    OUTPUT/tries.jsonl      every try with what became of it, a batch a line, after a line of what was asked for
    OUTPUT/kept.jsonl       what was right, as prompt and completion
    OUTPUT/packed           that in rows, as `atoll data prepare --chat` packs it
    OUTPUT/rollout.json     what came of it; written last: without it, the rollout is not finished

A rollout that was killed goes on with the batch that it was in; one that is finished is left as it is.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from data_tools.pack import ChatRecipe, Recipe, prepare
from data_tools.report import REPORT_FILE
from data_tools.sources import Source
from pretrain.config.errors import ConfigError, require
from pretrain.federation.batched import Asked, answers, batches
from pretrain.federation.export import provenance_of
from pretrain.federation.generate import Sampling, Speaker, open_speaker
from pretrain.federation.reading import exported, found_configuration
from pretrain.host.done import Done, going_on
from pretrain.host.stopping import StopRequested
from pretrain.outer.digest import digest_tensors
from pretrain.practice.judge import RIGHT
from pretrain.practice.tasks import Task, read_tasks
from pretrain.practice.verifier import Limits, Verifier
from pretrain.silo.shards import atomic_path, file_sha256, text_sha256

RESULT, TRIES, KEPT, PACKED = "rollout.json", "tries.jsonl", "kept.jsonl", "packed"
CUT, EMPTY, TOO_LONG = "cut", "empty", "too long"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is tried, and what is kept."""

    tasks: Path
    """JSON lines, see tasks.py."""
    verifier: str
    """package.module:function."""
    samples: int = 4
    """Tries of each task."""
    keep: int = 1
    """Of each task at most so many different right answers are kept."""
    sampling: Sampling = field(default_factory=lambda: Sampling(temperature=1.0, top_k=0))
    """How tries are drawn."""
    batch_sequences: int = 64
    """Tries of one forward pass."""
    limits: Limits = field(default_factory=Limits)
    """Of the verifier."""

    def check(self, key: Callable[[str], str] = lambda name: f"--{name.replace('_', '-')}") -> None:
        """Raise ConfigError for what cannot be; `key` says what names a setting."""
        for name in ("samples", "keep", "batch_sequences"):
            require(getattr(self, name) >= 1, key(name), getattr(self, name), "1 or more")
        require(self.limits.seconds > 0, key("time_limit"), self.limits.seconds, "above 0")
        require(self.limits.memory_bytes >= 1 << 26, key("memory_mib"), self.limits.memory_bytes >> 20, "64 or more")


@dataclass(frozen=True, kw_only=True)
class Trier:
    """A model, and what its conversations are packed with."""

    speaker: Speaker
    tokenizer: Path
    template: Path | None
    """None: the tokenizer's own."""
    sequence_tokens: int
    """Of a row; 0: not known."""
    prompt_tokens: int = 0


@dataclass(kw_only=True)
class Outcome:
    """What came of a rollout."""

    model: str
    num_tasks: int
    kinds: dict[str, int]
    """right, wrong, hung, raised, died, no truth value, cut (no end within the tokens), empty, too long: so many."""
    solved: int
    """Tasks with a right answer."""
    kept: int = 0
    rows: int = 0
    recipe_sha256: str = ""
    text_sha256: str = ""
    first_why: str = ""
    """Of the first try that was neither right nor wrong."""

    @property
    def tries(self) -> int:
        """All of them."""
        return sum(self.kinds.values())

    @property
    def rate(self) -> float:
        """Of tries, those that were right."""
        return self.kinds.get(RIGHT, 0) / max(1, self.tries)

    def words(self) -> str:
        """As a line says it."""
        others = ", ".join(f"{self.kinds[kind]:,} {kind}" for kind in sorted(self.kinds) if kind != RIGHT)
        right = f"{self.kinds.get(RIGHT, 0):,} of {self.tries:,} tries right ({self.rate:.1%})"
        why = f"; the first: {self.first_why}" if self.first_why else ""
        return f"{self.model}: {right}, {self.solved:,} of {self.num_tasks:,} tasks solved; {others or 'no other'}{why}"


def open_trier(
    where: str,
    *,
    version: int | None = None,
    paths: list[Path] | None = None,
    tokenizer: Path | None = None,
    sequence_tokens: int = 0,
) -> Trier:
    """A model as `open_speaker` finds it, which has to have a chat template. Raises ConfigError."""
    speaker = open_speaker(where, version=version, paths=paths, tokenizer=tokenizer)
    if directory := exported(where, options={}):
        found = Trier(
            speaker=speaker,
            tokenizer=directory / "tokenizer.json",
            template=None,
            sequence_tokens=sequence_tokens or provenance_of(directory).get("sequence_tokens", 0),
        )
    else:
        config = found_configuration(where, paths=paths or [], tokenizer=tokenizer)
        found = Trier(
            speaker=speaker,
            tokenizer=config.tokenizer_file,
            template=config.template_file,
            sequence_tokens=config.sequence_tokens,
            prompt_tokens=config.model.adapter.prompt_tokens,
        )
    if not speaker.has_template:
        raise ConfigError(f"model: {where!r} given, which has no chat template; allowed: one that knows conversations")
    return found


def rollout(
    trier: Trier,
    plan: Plan,
    output: Path,
    *,
    say: Callable[[str], None] = lambda line: None,
    asked_to_stop: Callable[[], bool] = lambda: False,
    key: Callable[[str], str] = lambda name: f"--{name}",
) -> Outcome:
    """Try, verify, keep and pack; what is there from before goes on. Raises ConfigError, also if nothing was right.

    Raises StopRequested when `asked_to_stop`, after a batch.
    """
    require(trier.sequence_tokens >= 2, "--sequence-tokens", trier.sequence_tokens, "2 or more, those of the run")
    tasks, header = read_tasks(plan.tasks, key=key("tasks")), _header(trier, plan)
    if (output / RESULT).is_file():
        said = json.loads((output / RESULT).read_text())
        if said.pop("header") != header:
            raise ConfigError(f"--output: {output} is of another rollout: delete it, or choose another --output")
        return Outcome(**said)
    if output.exists() and any(output.iterdir()) and not (output / TRIES).is_file():
        raise ConfigError(f"--output: {output} exists and is no rollout: delete it, or choose another --output")
    with going_on(output / TRIES, header, key="--output", given=output) as done:
        found = list(tried(trier, tasks, plan, done, say=say, asked_to_stop=asked_to_stop, key=key))
        outcome, kept = _summed(trier.speaker.name, tasks, found), _kept(tasks, found, plan.keep)
        if not kept:
            raise ConfigError(
                f"{key('tasks')}: {plan.tasks} given; none kept of what was tried: {outcome.words()}; allowed: tasks "
                f"of which some are solved: easier ones, more {key('samples')}, or a mended {key('verifier')}"
            )
        _pack(trier, kept, output, outcome)
        with atomic_path(output / RESULT) as temporary:
            temporary.write_text(json.dumps({"header": header, **asdict(outcome)}, indent=1) + "\n")
    return outcome


def _pack(trier: Trier, kept: list[dict[str, Any]], output: Path, outcome: Outcome) -> None:
    """What is kept as conversations and as shards, told in `outcome`."""
    with atomic_path(output / KEPT) as temporary:
        temporary.write_text("".join(json.dumps(one) + "\n" for one in kept))
    recipe = Recipe(
        sources=(Source(path=str(output / KEPT)),),
        tokenizer=trier.tokenizer,
        held_out=0.0,
        chat=ChatRecipe(
            sequence_tokens=trier.sequence_tokens,
            too_long="skip",
            chat_template=trier.template,
            prompt_tokens=trier.prompt_tokens,
        ),
    )
    manifest = prepare(recipe, output / PACKED, num_workers=0, console=Console(quiet=True))["train"]
    report = json.loads((output / PACKED / REPORT_FILE).read_bytes())
    outcome.kept = report["sources"][KEPT.removesuffix(".jsonl")]["kept"]["train"]["documents"]  # not what is too long
    outcome.rows = manifest.num_tokens // trier.sequence_tokens
    outcome.recipe_sha256, outcome.text_sha256 = manifest.recipe_sha256, text_sha256(manifest)


def score(trier: Trier, plan: Plan, *, say: Callable[[str], None] = lambda line: None) -> Outcome:
    """Try and verify, and keep nothing."""
    tasks = read_tasks(plan.tasks)
    return _summed(trier.speaker.name, tasks, list(tried(trier, tasks, plan, None, say=say)))


def tried(
    trier: Trier,
    tasks: list[Task],
    plan: Plan,
    done: Done | None,
    *,
    say: Callable[[str], None],
    asked_to_stop: Callable[[], bool] = lambda: False,
    key: Callable[[str], str] = lambda name: f"--{name}",
) -> Iterator[dict[str, Any]]:
    """Every try: `task` by its place, `text`, `kind` and `why`. What is `done` is not tried again, and added to."""
    with Verifier(plan.verifier, plan.limits, key=key("verifier")) as verifier:
        for line in verifier.words():
            say(f"verifier  {line}")
        asked = [Asked(messages=task.messages, tools=task.tools) for task in tasks]
        every = batches(trier.speaker, asked, num_answers=plan.samples, batch_sequences=plan.batch_sequences)
        for number, batch in enumerate(every):
            if done and number < len(done.lines):
                yield from done.lines[number]["tries"]
                continue
            if asked_to_stop():
                raise StopRequested
            tries = []
            most = trier.sequence_tokens - trier.prompt_tokens if trier.sequence_tokens else None
            said = answers(trier.speaker, batch, plan.sampling, num_answers=plan.samples, most_tokens=most)
            for place, given in said:
                verdicts = {one: _judged(verifier, tasks[place], place, one) for one in dict.fromkeys(given)}
                tries += [verdicts[one] for one in given]  # equal ones are asked about once
                tries += [{"task": place, "text": "", "kind": TOO_LONG, "why": ""}] * (not given)
            if done:
                done.add({"batch": number, "tries": tries})
            right = sum(one["kind"] == RIGHT for one in tries)
            say(f"batch {number + 1:5d} of {len(every)}  {right:5d} of {len(tries)} right")
            yield from tries


def _judged(verifier: Verifier, task: Task, place: int, answer: Any) -> dict[str, Any]:
    said = {"task": place, "text": answer.text, "why": ""}
    if not answer.is_complete:
        return said | {"kind": CUT}  # its end was never said, and would be trained
    if not answer.text.strip():
        return said | {"kind": EMPTY}
    verdict = verifier.verdict(task.record, [*task.messages, {"role": "assistant", "content": answer.text}])
    return said | {"kind": verdict.kind, "why": verdict.why}


def _summed(model: str, tasks: list[Task], tries: list[dict[str, Any]]) -> Outcome:
    why = next((f"{one['kind']}: {one['why']}" for one in tries if one["why"]), "")
    solved = {one["task"] for one in tries if one["kind"] == RIGHT}
    kinds = dict(Counter(one["kind"] for one in tries))
    return Outcome(model=model, num_tasks=len(tasks), kinds=kinds, solved=len(solved), first_why=why)


def _kept(tasks: list[Task], tries: list[dict[str, Any]], most: int) -> list[dict[str, Any]]:
    """Right answers as conversations of which they alone are trained, in the order of the tasks."""
    right: dict[int, dict[str, None]] = {}
    for one in tries:
        if one["kind"] == RIGHT:
            right.setdefault(one["task"], {})[one["text"]] = None
    found = []
    for place in sorted(right):
        task = tasks[place]
        tools = {"tools": task.tools} if task.tools else {}
        for text in list(right[place])[:most]:
            found.append({"prompt": task.messages, "completion": [{"role": "assistant", "content": text}], **tools})
    return found


def _header(trier: Trier, plan: Plan) -> dict[str, Any]:
    """All that decides about the tries, as JSON holds it."""
    model = trier.speaker.model
    return json.loads(  # type: ignore[no-any-return]
        json.dumps(
            {
                "parameters_digest": digest_tensors((name, one.detach()) for name, one in model.named_parameters()),
                "tasks_sha256": file_sha256(plan.tasks),
                "sequence_tokens": trier.sequence_tokens,
                **{name: value for name, value in asdict(plan).items() if name != "tasks"},
            }
        )
    )
