"""Somebody who can write to the store puts what is no record under every name while a signed federation runs."""

import os
import re
from contextlib import suppress
from pathlib import Path

import pytest

from pretrain.config.keys import OPERATOR
from pretrain.trust.ledger import RECORD_BYTES
from tests.conftest import TinyConfig
from tests.distributed.federation import Outcome
from tests.faults.beside import federate_beside
from tests.faults.test_forgers import LAST, words
from tests.faults.test_kills import check_same, make_config


def names(store: Path) -> set[str]:
    newest = max((int(path.parent.name) for path in store.glob("global/*/commit.json")), default=-1)
    found = {"rollbacks/000001.json", "amendments/000001.json", "amendments/000001.accepted"}
    for version in range(1, LAST + 1):
        found |= {*words(version), f"snapshots/{version:06d}.json"}
        if version > newest:
            found |= {f"global/{version:06d}/commit.json", f"silos/alpha/{version:06d}/manifest.json"}
            found |= {f"silos/beta/{version:06d}/manifest.json"}
    return found | {f"signatures/{name}.json" for name in ("alpha", "beta", OPERATOR)}


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.parametrize("what", ["too long", "a pipe", "a link"])
def test_a_run_comes_to_the_bits_of_an_undisturbed_one(
    what: str, undisturbed: Outcome, tmp_path: Path, tiny_config: TinyConfig
) -> None:
    source = tmp_path / "source"
    if what == "a pipe":
        os.mkfifo(source)
    elif what == "a link":
        source.symlink_to("/dev/zero")
    else:
        source.write_bytes(bytes(RECORD_BYTES + 1))

    def put(store: Path) -> int:
        num_put = 0
        for name in names(store):
            file = store / name
            file.parent.mkdir(parents=True, exist_ok=True)
            with suppress(FileExistsError):
                os.link(source, file, follow_symlinks=False)
                num_put += 1
        return num_put

    run, logs = federate_beside(make_config(tiny_config, tmp_path), put)
    check_same(run, undisturbed)
    assert "Traceback" not in logs
    named = set(re.findall(r"([a-z0-9/.-]+) is (?:passed over|a link|a pipe)", logs))
    assert {"amendments/000001.json", "snapshots/000001.json"} <= named
