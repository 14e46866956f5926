"""Bytes have few ways out: whatever could send any is imported in files that are listed here, each with its reason."""

import ast
from collections import defaultdict
from pathlib import Path

from tests.support import ROOT
from tests.unit.test_rooms import PRODUCT, imports, is_below, module_name, parsed

# What can open a connection, or have another program do so. `asyncio` and `ssl` alone send nothing.
SENDS = (
    *("socket", "socketserver", "http", "urllib", "ftplib", "smtplib", "telnetlib", "xmlrpc", "subprocess"),
    *("fsspec", "s3fs", "gcsfs", "adlfs", "boto3", "botocore", "aiohttp", "requests", "httpx", "urllib3", "paramiko"),
    *("wandb", "lm_eval", "huggingface_hub", "datasets", "torch.distributed", "torch.hub", "zmq", "grpc", "websockets"),
)
HARMLESS = "urllib.parse"  # cuts texts
WAYS_OUT = {
    # The one way into a store; all that it writes has a line in the egress ledger.
    "pretrain.exchange.objects": {"fsspec"},
    "pretrain.exchange.client": {"fsspec"},
    "pretrain.host.tracker": {"wandb"},  # what it hands over has a line, too
    # From silo to silo, in a collective.
    "pretrain.exchange.channel": {"socket"},
    "pretrain.exchange.lane": {"socket"},
    "pretrain.exchange.listener": {"socket"},
    "pretrain.exchange.lanes": {"torch.distributed"},
    "pretrain.sync.among_silos": {"torch.distributed"},
    # Between the ranks of one silo.
    "pretrain.silo.ranks": {"torch.distributed"},
    "pretrain.silo.engine": {"torch.distributed"},
    "pretrain.silo.muon": {"torch.distributed"},
    "pretrain.silo.private": {"torch.distributed"},
    "pretrain.silo.zero": {"torch.distributed"},
    # Names of protocols and paths; of S3, which endpoint the library would take.
    "pretrain.config.check": {"fsspec"},
    "pretrain.exchange.options": {"fsspec", "botocore"},
    "pretrain.federation.relay": {"fsspec"},
    "launch.show.listed": {"fsspec"},
    # Scores a finished model on local files, with all that the library could look for in a network switched off.
    "pretrain.federation.tasks": {"lm_eval"},
    "pretrain.federation.task_files": {"lm_eval"},  # reads its form of YAML
    # A name of this machine, and whether a port of it is free.
    "pretrain.exchange.lease": {"socket"},
    "pretrain.federation.preflight": {"socket", "fsspec"},
    "launch.start.remote": {"socket"},
    # The report of a store, to whoever is on this machine and asks; it asks nobody.
    "launch.show.serve": {"http"},
    # Programs that a user has named, nvidia-smi, and our own processes.
    "pretrain.trust.keys": {"subprocess"},
    "pretrain.practice.verifier": {"subprocess"},
    "pretrain.sync.practice": {"subprocess"},
    "launch.start.gpus": {"subprocess"},
    **{f"launch.start.{name}": {"subprocess"} for name in ("node", "processes", "slurm", "ssh", "stop", "workers")},
}


def ways_out(path: Path) -> set[str]:
    """Which of what can send a file imports, wherever in it, or names in a call of `__import__` or importlib."""
    tree = parsed(path)
    named = {
        node.args[0].value
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and ast.unparse(node.func).rsplit(".", 1)[-1] in ("__import__", "import_module")
        and node.args
        and isinstance(node.args[0], ast.Constant)
    }
    found = {str(name) for name in named} | set(imports(tree)) | imported_from(tree)
    found = {name for name in found if not is_below(name, HARMLESS)}
    return {way for name in found for way in SENDS if is_below(name, way)}


def imported_from(tree: ast.AST) -> set[str]:
    """`from torch import distributed` is one of torch.distributed."""
    return {
        f"{node.module}.{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


def test_no_file_but_these_can_send() -> None:
    found: dict[str, set[str]] = defaultdict(set)
    for path in PRODUCT:
        if path.is_relative_to(ROOT / "data_tools"):
            continue  # prepares text before a run; none of it runs in a silo
        if ways := ways_out(path):
            found[module_name(path)] = ways
    assert dict(found) == WAYS_OUT


def test_a_way_out_is_seen(tmp_path: Path) -> None:
    for number, line in enumerate(
        (
            "import socket",
            "def f():\n    from urllib.request import urlopen",
            "from torch import distributed",
            "import importlib\nimportlib.import_module('requests')",
            "import urllib3",
        )
    ):
        file = tmp_path / f"{number}.py"
        file.write_text(line + "\n")
        assert ways_out(file), line
    harmless = tmp_path / "harmless.py"
    harmless.write_text("from urllib.parse import urlsplit\nimport json\n")
    assert not ways_out(harmless)
