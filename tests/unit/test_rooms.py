"""The rooms of the design hold: imports go one way, nothing unpickles, files and functions stay short."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OURS = ("pretrain", "launch", "data_tools", "benchmarks", "tests")
PRODUCT = sorted(path for folder in OURS[:3] for path in (ROOT / folder).rglob("*.py"))
ALL_FILES = sorted(path for folder in OURS for path in (ROOT / folder).rglob("*.py"))

# Room (a prefix of module names) to the modules of ours that it may import; the longest prefix that fits counts.
ALLOWED = {
    "pretrain.config": ("pretrain.check", "pretrain.outer.learning_rate", "pretrain.outer.schedule"),
    "pretrain.check": ("pretrain.config",),
    "pretrain.lock": ("pretrain.config",),
    "pretrain.disk": (),
    "pretrain.software": (),
    "pretrain.journal": ("pretrain.config",),
    "pretrain.outer": ("pretrain.outer",),
    "pretrain.silo": ("pretrain.config", "pretrain.outer", "pretrain.silo"),
    "pretrain.trust": (
        *("pretrain.config", "pretrain.outer", "pretrain.silo.shards", "pretrain.software"),
        "pretrain.trust",
    ),
    "pretrain.exchange": ("pretrain.config", "pretrain.disk", "pretrain.outer", "pretrain.trust", "pretrain.exchange"),
    "pretrain": ("pretrain",),
    "data_tools": ("data_tools", "pretrain.config", "pretrain.lock", "pretrain.silo.shards"),
    # The lock is the launcher's, too: one launcher a run directory.
    "launch": ("launch", "pretrain.config", "pretrain.lock"),
    "launch.status_reader": ("launch", "pretrain.config", "pretrain.outer.rounds"),
    "launch.cli": ("launch", "pretrain", "data_tools"),
    "launch.compare": ("launch", "pretrain"),
    "launch.compare_table": ("launch", "pretrain.config"),
    "launch.demo": ("launch", "pretrain", "data_tools"),
    "launch.join": ("launch", "pretrain"),
    "launch.plan": ("launch", "pretrain"),
    "launch.remote": ("launch", "pretrain"),
}
WITHOUT_TORCH = (
    "pretrain.config",
    "pretrain.check",
    "pretrain.disk",
    "pretrain.leave",
    "pretrain.lock",
    "pretrain.journal",
    "pretrain.relay",
    "pretrain.rollback",
    "pretrain.software",
    "pretrain.stopping",
    "pretrain.trust",
    "pretrain.exchange.beats",
    "pretrain.exchange.lease",
    "pretrain.exchange.objects",
    "pretrain.exchange.options",
    "pretrain.exchange.store",
    "launch",
)


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def is_below(module: str, room: str) -> bool:
    return module == room or module.startswith(room + ".")


def imports(tree: ast.AST) -> Iterator[str]:
    """Full names of all imported modules, wherever in the file; no file uses relative imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            assert node.module
            yield node.module


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), filename=str(path))


def test_there_is_something_to_check() -> None:
    assert len(PRODUCT) > 30
    rooms = {room for room in ALLOWED if any(is_below(module_name(path), room) for path in PRODUCT)}
    assert rooms == set(ALLOWED)


@pytest.mark.parametrize("path", PRODUCT, ids=module_name)
def test_imports_go_one_way(path: Path) -> None:
    module = module_name(path)
    room = max((room for room in ALLOWED if is_below(module, room)), key=len)
    ours = [name for name in imports(parsed(path)) if name.split(".")[0] in OURS]
    wrong = [name for name in ours if not any(is_below(name, allowed) for allowed in ALLOWED[room])]
    assert not wrong, f"{module} imports {wrong}; allowed in {room}: {ALLOWED[room]}"


@pytest.mark.parametrize(
    "path", [p for p in PRODUCT if any(is_below(module_name(p), r) for r in WITHOUT_TORCH)], ids=module_name
)
def test_what_a_login_node_runs_imports_no_torch(path: Path) -> None:
    heavy = {name.split(".")[0] for name in imports(parsed(path))} & {"torch", "deepspeed", "transformers"}
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
