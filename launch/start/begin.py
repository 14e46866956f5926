"""`atoll init`: the first configuration of a federation, a silo or a site, and the commands that come next."""

import os
import re
import shlex
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from pretrain.config.check import SILO_NAME, check_url
from pretrain.config.errors import ConfigError
from pretrain.config.keys import OPERATOR

MACHINES = {
    "laptop": "this computer's CPU",
    "node": "one machine with GPUs",
    "slurm": "a cluster with SLURM",
    "torchrun": "machines without a scheduler",
}
ROLES = {
    "federation": "several silos, all at one place",
    "contract": "what several institutions agree to, for who merges",
    "silo": "one that joins a federation elsewhere",
    "site": "what SLURM is to know of this cluster",
}
SHARDED = ("llama-350m", "llama-1b")
"""Presets of models whose state is better spread over the GPUs of a silo."""
STORE = "s3://BUCKET/RUN"
"""What stands where no store is named."""
# Tokens of a vocabulary, and how many bytes of text a token should have been learned from at least.
VOCABULARIES, BYTES_A_TOKEN = (32_768, 8_192, 2_048, 512), 300
# Some 50,000 tokens, below which atoll data prepare warns.
HELD_OUT, HELD_OUT_BYTES = (0.01, 0.02, 0.05, 0.1, 0.2), 200_000


@dataclass(frozen=True)
class Text:
    """A silo's name, and where its text is."""

    name: str
    place: str

    @classmethod
    def parse(cls, given: str) -> "Text":
        """NAME=PLACE, or a place that gives the name. Raises ConfigError."""
        name, is_named, place = given.partition("=")
        place = place if is_named else given
        name = name if is_named else re.sub(r"[^a-z0-9_-]+", "-", Path(place).stem.lower()).strip("-_")
        if not SILO_NAME.fullmatch(name) or name == OPERATOR:
            raise ConfigError(f"--text: {given!r} given; allowed: NAME=FOLDER, with a name of a-z, 0-9, _ and -")
        if not Path(place).expanduser().exists():
            raise ConfigError(f"--text: {given!r} given; there is no {place!r}; allowed: a folder or file of text")
        return cls(name, place)


@dataclass(frozen=True, kw_only=True)
class Beginning:
    """What was asked."""

    machine: str
    role: str
    texts: list[Text] = field(default_factory=list)
    model: str = ""
    gpus: int = 0
    """Of a node."""
    nodes: int = 1
    """Of a silo."""
    store: str = ""
    """URL of the federation that a silo joins, or that a contract is for."""
    roster: list[str] = field(default_factory=list)
    """Of a contract."""

    def __post_init__(self) -> None:
        """Raises ConfigError for what does not fit together."""
        for option, given, roles in (
            ("--text", self.texts, ("federation", "silo")),
            ("--model", self.model, ("federation", "contract")),
            ("--store", self.store, ("silo", "contract")),
            ("--roster", self.roster, ("contract",)),
        ):
            if given and self.role not in roles:
                raise ConfigError(f"{option}: given with --role {self.role}; allowed: with --role {' or '.join(roles)}")
        wrong = [name for name in self.roster if not SILO_NAME.fullmatch(name) or name == OPERATOR]
        if self.role == "contract" and (wrong or len(set(self.roster)) != len(self.roster) or len(self.roster) < 2):
            allowed = "two names or more, each once, of a-z, 0-9, _ and -"
            raise ConfigError(f"--roster: {', '.join(wrong or self.roster)} given; allowed: {allowed}")
        names = [text.name for text in self.texts]
        if len(set(names)) < len(names):
            raise ConfigError(f"--text: {', '.join(names)} given; allowed: each name once, as NAME=FOLDER")
        if self.role == "silo" and len(names) != 1:
            raise ConfigError(f"--text: {len(names)} given with --role silo; allowed: one")
        if self.machine == "node" and not self.gpus:
            raise ConfigError("--gpus: 0 given with --machine node; allowed: 1 or more, or --machine laptop")
        if self.machine in ("laptop", "node") and self.nodes != 1:
            raise ConfigError(f"--nodes: {self.nodes} given with --machine {self.machine}; allowed: 1")
        if self.store:
            check_url(self.store, "--store")

    @property
    def default_file(self) -> str:
        """Where it is written if nothing else is said."""
        own = f"{self.texts[0].name if self.texts else ''}.yaml"
        return {"federation": "run.yaml", "contract": "federation.yaml", "site": "site.yaml"}.get(self.role, own)

    def configuration(self, file: str) -> str:
        """The file."""
        environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
        template = environment.from_string((files("launch.start") / "begin.yaml.j2").read_text())
        processes, micro = max(1, self.gpus), 8 if self.gpus else 4
        ranks, presets = processes * self.nodes, [f"model={self.model}", "outer=recommended"]
        if len(self.roster) > 2:
            presets.append("membership=elastic")
        if self.gpus and self.model in SHARDED:
            presets.append("silo=zero3-bf16")
        together = self.machine in ("laptop", "node")
        return _aligned(
            template.render(
                role=self.role,
                machine=self.machine,
                file=file,
                silos=self.texts,
                gpus=self.gpus,
                nodes=self.nodes,
                processes=processes,
                micro=micro,
                batch=micro * ranks * max(1, (64 if self.gpus else 16) // (micro * ranks)),
                threads=max(1, (os.cpu_count() or 1) // (len(self.texts) if together else 1)) if self.texts else 1,
                steps=200 if self.machine == "laptop" else 1000,
                interval=10 if together else 50,
                presets=presets,
                store=self.store or STORE,
                roster=self.roster,
            )
        )

    def next_commands(self, file: str) -> list[str]:
        """What to type next, in order."""
        if self.role == "site":
            return [f"atoll launch slurm --config run.yaml --site {shlex.quote(file)} --dry-run"]
        if self.role == "contract":
            return self._agreeing(shlex.quote(file))
        quoted, config = [shlex.quote(text.place) for text in self.texts], f"--config {shlex.quote(file)}"
        found = []
        if self.role == "federation":
            size = _vocabulary(self.texts)
            found.append(f"atoll data tokenizer {' '.join(quoted)} --vocab-size {size} --output tokenizer")
        found += [
            f"atoll data prepare {place} --tokenizer tokenizer --held-out {_held_out(text)} --output packed/{text.name}"
            for place, text in zip(quoted, self.texts, strict=True)
        ]
        if self.machine == "slurm":
            found.append("atoll init --machine slurm --role site" + (f" --gpus {self.gpus}" if self.gpus else ""))
        return [*found, *(self._joining(config) if self.role == "silo" else self._starting(config))]

    def _agreeing(self, file: str) -> list[str]:
        counts = " ".join(f"--counts {name}.counts.tsv" for name in self.roster)
        size = VOCABULARIES[1 if self.machine == "laptop" else 0]
        launch = f"aggregate --config {file}"
        if self.machine == "slurm":
            launch = f"launch slurm --config {file} --site site.yaml"
        return [
            f"atoll keys new {OPERATOR} --directory keys",
            f"atoll data tokenizer {counts} --vocab-size {size} --output tokenizer",
            f"atoll contract propose --config {file}",
            f"atoll {launch} --dry-run",
            f"atoll {launch}",
        ]

    def _starting(self, config: str) -> list[str]:
        plan = f"atoll plan {config} --bandwidth 1gbit"
        if self.machine == "slurm":
            launch = f"atoll launch slurm {config} --site site.yaml"
        elif self.machine == "torchrun":
            hosts = " ".join(f"--host HOST{number}" for number in range(1, self.nodes + 1))
            silos = [f"atoll launch torchrun {config} --silo {text.name} {hosts} --ssh ssh" for text in self.texts]
            return [f"atoll aggregate {config} --dry-run", f"atoll aggregate {config}", *silos]
        else:
            launch = f"atoll launch local {config}"
        return [plan, f"{launch} --dry-run", launch]

    def _joining(self, config: str) -> list[str]:
        site = " --site site.yaml" if self.machine == "slurm" else ""
        join = f"atoll launch join {shlex.quote(self.store or STORE)} {config}{site}"
        if self.machine == "torchrun":
            hosts = " ".join(f"--host HOST{number}" for number in range(1, self.nodes + 1))
            name = self.texts[0].name
            return [
                f"{join} --dry-run",
                f"atoll launch torchrun --config runs/{name}/config.yaml --silo {name} {hosts} --ssh ssh",
            ]
        return [f"{join} --dry-run", join]


def _aligned(text: str) -> str:
    """With comments one below the other."""
    lines = [re.match(r"(\s*[^#\s][^#]*?)\s+(# .*)$", line) or line for line in text.splitlines()]
    return "".join(f"{line if isinstance(line, str) else f'{line[1]:<30} {line[2]}'}\n" for line in lines)


def write_new(file: Path, text: str) -> None:
    """Write a file that is not there yet. Raises ConfigError."""
    try:
        with file.open("x") as new:
            new.write(text)
    except FileExistsError:
        raise ConfigError(
            f"--output: {str(file)!r} given; it is there already, and stays; allowed: a new file"
        ) from None
    except OSError as error:
        raise ConfigError(f"--output: {str(file)!r} given; it cannot be written: {error.strerror}") from None


def _vocabulary(texts: list[Text]) -> int:
    """A size that the text is enough for."""
    num_bytes = sum(_num_bytes(text) for text in texts)
    return next((size for size in VOCABULARIES if num_bytes >= size * BYTES_A_TOKEN), VOCABULARIES[-1])


def _held_out(text: Text) -> float:
    """A share of which there is enough for a loss that says something."""
    num_bytes = _num_bytes(text)
    return next((share for share in HELD_OUT if num_bytes * share >= HELD_OUT_BYTES), HELD_OUT[-1])


def _num_bytes(text: Text) -> int:
    place = Path(text.place).expanduser()
    return sum(file.stat().st_size for file in ([place] if place.is_file() else place.rglob("*")) if file.is_file())
