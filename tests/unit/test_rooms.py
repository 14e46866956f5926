"""The rooms of the design hold: imports go one way, nothing unpickles, files and functions stay short."""

import ast
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest

from tests.support import ROOT

OURS = ("pretrain", "launch", "data_tools", "benchmarks", "tests")
PRODUCT = sorted(path for folder in OURS[:3] for path in (ROOT / folder).rglob("*.py"))
ALL_FILES = sorted(path for folder in OURS for path in (ROOT / folder).rglob("*.py"))

# The floors, from the top down: a room (a folder, or a file beside the folders) imports its own files and lower rooms.
FLOORS = (
    *(
        "launch.cli",
        "launch.demo_chat",
        "launch.demo",
        "launch.egress",
        "launch.evaluate",
        "launch.calling",
        "launch.exit",
        "launch.init",
        "launch.launch",
        "launch.plan",
        "launch.config",
        "launch.keys",
        "launch.contract",
        "launch.presets",
        "launch.report",
        "launch.rollout",
        "launch.model",
        "launch.metrics",
        "launch.api",
        "launch.revoke",
        "launch.verify",
        "launch.version",
        "launch.given",
    ),
    *("launch.compare", "launch.start", "launch.show"),
    "pretrain.practice",
    "data_tools",
    *("pretrain.train", "pretrain.aggregate"),
    *("pretrain.federation", "pretrain.plan", "pretrain.sync", "pretrain.merge", "pretrain.exchange"),
    *("pretrain.trust", "pretrain.silo", "pretrain.host", "pretrain.config", "pretrain.outer"),
)
# What a login node runs, and all that it has imported by then.
WITHOUT_TORCH = (
    *("launch", "pretrain.config", "pretrain.host", "pretrain.trust"),
    *("pretrain.federation.egress", "pretrain.federation.leave", "pretrain.federation.relay"),
    *("pretrain.exchange.board", "pretrain.exchange.channel", "pretrain.exchange.listener"),
    *("pretrain.exchange.beats", "pretrain.exchange.lease", "pretrain.exchange.objects"),
    *("pretrain.exchange.options", "pretrain.exchange.rollback", "pretrain.exchange.store"),
)
COUNT_A_MODEL = ("launch.show.plan", "launch.start.join")  # what they call builds one, without memory
HEAVY = {"torch", "deepspeed", "transformers"}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path) for path in PRODUCT}
FOLDERS = {module_name(path) for path in PRODUCT if path.name == "__init__.py"}


def is_below(module: str, room: str) -> bool:
    return module == room or module.startswith(room + ".")


def room_of(module: str) -> str:
    found = [room for room in FLOORS if is_below(module, room)]
    assert len(found) == 1, f"{module} is in no room of FLOORS, or in several: {found}"
    return found[0]


def imports(tree: ast.AST) -> Iterator[str]:
    """Full names of all imported modules, wherever in the file; no file uses relative imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            assert node.module
            yield node.module
            yield from (name for alias in node.names if (name := f"{node.module}.{alias.name}") in MODULES)


def at_once(tree: ast.Module) -> ast.Module:
    """What runs when a module is imported: not its functions, nor what only a type checker sees."""
    kept = [node for node in tree.body if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))]
    return ast.Module([node for node in kept if not isinstance(node, ast.FunctionDef | ast.ClassDef)], [])


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), filename=str(path))


@cache
def arrows_at_once() -> dict[str, set[str]]:
    """Every module to what it imports when it is imported."""
    return {module_name(path): set(imports(at_once(parsed(path)))) for path in PRODUCT}


def reached(module: str, arrows: Mapping[str, set[str]]) -> set[str]:
    """All that a module leads to."""
    found: set[str] = set()
    following = [module]
    while following:
        new = arrows.get(following.pop(), set()) - found
        found |= new
        following += new
    return found


def test_every_room_is_there() -> None:
    modules = [name for name in MODULES if name not in FOLDERS]
    assert {room_of(module) for module in modules} == set(FLOORS)


@pytest.mark.parametrize("path", PRODUCT, ids=module_name)
def test_imports_go_down(path: Path) -> None:
    module = module_name(path)
    ours = {name for name in imports(parsed(path)) if name.split(".")[0] in OURS}
    if module in FOLDERS:
        assert not ours
        return
    floor = FLOORS.index(room_of(module))
    upwards = sorted(name for name in ours - FOLDERS if FLOORS.index(room_of(name)) < floor)
    assert not upwards, f"{module} imports {upwards} of a higher floor"


def test_no_import_goes_in_a_circle() -> None:
    arrows = {module_name(path): set(imports(parsed(path))) & MODULES for path in PRODUCT}
    circles = sorted(module for module in arrows if module in reached(module, arrows))
    assert not circles


@pytest.mark.parametrize(
    "module", sorted(name for name in MODULES if any(is_below(name, room) for room in WITHOUT_TORCH))
)
def test_what_a_login_node_runs_imports_no_torch(module: str) -> None:
    arrows = arrows_at_once()
    found = arrows[module] if module in COUNT_A_MODEL else reached(module, arrows)
    heavy = {name for name in found if name.split(".")[0] in HEAVY}
    assert not heavy


@pytest.mark.parametrize("path", PRODUCT, ids=module_name)
def test_nothing_unpickles(path: Path) -> None:
    """Bytes of another party can be safetensors or JSON, nothing that could hold code."""
    tree = parsed(path)
    modules = {name.split(".")[0] for name in imports(tree)}
    assert not modules & {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("torch.load", "eval", "exec", "yaml.load", "yaml.unsafe_load"), (node.lineno, called)
            assert not any(k.arg == "allow_pickle" for k in node.keywords), node.lineno


@pytest.mark.parametrize("path", ALL_FILES, ids=module_name)
def test_files_and_functions_stay_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) < 500
    functions = [n for n in ast.walk(parsed(path)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    sizes = {
        f"{function.name} (line {function.lineno})": function.end_lineno - function.lineno + 1 for function in functions
    }
    too_long = {name: size for name, size in sizes.items() if size >= 60}
    assert not too_long
