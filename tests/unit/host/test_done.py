"""Lines of what is done: gone on with by one process at a time, by no other than who began, and after any kill."""

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pretrain.host.done import going_on
from tests.holding import held_elsewhere
from tests.support import one_line_error

OF: dict[str, Any] = {"format": 1, "model": "a"}


def go_on(file: Path, *lines: dict[str, Any], **changes: Any) -> list[Any]:
    with going_on(file, OF | changes, key="--answers") as done:
        for line in lines:
            done.add(line)
        return done.lines


def test_it_goes_on_after_a_line_that_was_torn(tmp_path: Path) -> None:
    file = tmp_path / "new" / "file.jsonl"
    assert go_on(file, {"n": 1}, {"n": 2}) == []
    whole = file.read_bytes()
    assert [json.loads(line) for line in whole.splitlines()] == [OF, {"n": 1}, {"n": 2}]
    assert go_on(file) == [{"n": 1}, {"n": 2}]
    assert file.read_bytes() == whole
    file.write_bytes(whole[:-3])
    assert go_on(file, {"n": 3}) == [{"n": 1}]
    assert go_on(file) == [{"n": 1}, {"n": 3}]
    file.write_bytes(whole[:9])  # of the first line
    assert go_on(file) == []
    assert [json.loads(line) for line in file.read_bytes().splitlines()] == [OF]


def test_what_is_of_something_else_stays_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "file.jsonl"
    go_on(file, {"n": 1})
    before, given = file.read_bytes(), f"--answers: {str(file)!r} given; "
    assert one_line_error(go_on, file, {"n": 2}, model="b", format=2) == (
        f"{given}it was begun with other format, model; allowed: a new one, or what it was begun with"
    )
    assert file.read_bytes() == before
    for other in (b"a note without an end", b"text\n", b"[1]\n", b'{"model": "a"}\n', before + b"{\n", b"\xff\n"):
        file.write_bytes(other)
        assert one_line_error(go_on, file) == f"{given}it holds something else; allowed: a new one"
        assert file.read_bytes() == other
    assert one_line_error(go_on, tmp_path) == f"--answers: {str(tmp_path)!r} given; Is a directory; allowed: a new one"
    below = file / "below"
    assert one_line_error(go_on, below).startswith(f"--answers: {str(below)!r} given; ")


def test_two_processes_do_not_add_to_it_at_once(tmp_path: Path) -> None:
    file = tmp_path / "file.jsonl"
    with held_elsewhere(file, OF):
        before = file.read_bytes()
        assert one_line_error(go_on, file, {"n": 1}) == (
            f"--answers: {str(file)!r} given; another process writes to it; wait for that one, or give another"
        )
        assert file.read_bytes() == before
    assert go_on(file, {"n": 1}) == [{"by": "another"}]
    with held_elsewhere(file, OF) as process:
        process.kill()
        process.wait()
        assert go_on(file) == [{"by": "another"}, {"n": 1}]


def test_a_disk_without_room_is_said_in_a_line(tmp_path: Path) -> None:
    """As far as a limit of a file's size is one: the line that does not fit is cut off by who goes on."""
    file = tmp_path / "file.jsonl"
    code = "import sys; from pathlib import Path; from tests.unit.host.test_done import without_room as do"
    code += "; do(Path(sys.argv[1]))"
    run = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True, check=True)
    assert run.stdout == f"--answers: {str(file)!r} given; No space left on device; mend it (make room)\n"
    assert go_on(file) == [{"n": 1}]


def without_room(file: Path) -> None:
    go_on(file, {"n": 1})
    resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size + 9,) * 2)
    print(one_line_error(go_on, file, {"n": 10**20}))


def test_what_the_caller_raises_is_its_own(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="mine"), going_on(tmp_path / "file.jsonl", OF, key="--answers"):
        raise OSError("mine")
    assert go_on(tmp_path / "file.jsonl") == []
