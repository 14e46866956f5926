"""A silo's note beside its key: one run directory delivers under a contract, and one set is answered for a version."""

import fcntl
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

from pretrain.config.errors import ConfigError
from pretrain.sync.answered import Answered
from pretrain.sync.delivered import append
from tests.support import one_line_error

CONTRACT, OTHER = "c0" * 32, "d1" * 32
ONE, TWO = "1" * 32, "2" * 32


def note(directory: Path, contract: str = CONTRACT) -> Answered:
    """As whoever starts anew finds it."""
    return Answered(directory / "alpha.key", contract, "alpha")


def test_one_run_directory_delivers_under_a_contract_wherever_it_lies(tmp_path: Path) -> None:
    keys, here, there = tmp_path / "keys", tmp_path / "here", tmp_path / "there"
    keys.mkdir()
    note(keys).check("", here, has_answered=False)  # nobody does yet
    assert not list(keys.iterdir())
    note(keys).begin(ONE, here)
    first = note(keys).file.read_bytes()
    note(keys).begin(ONE, here)  # started again
    note(keys).begin(ONE, there)  # moved
    assert note(keys).file.read_bytes() == first
    note(keys, OTHER).begin(TWO, there)  # another contract, the same key
    for identity in (TWO, ""):
        said = one_line_error(note(keys).check, identity, there, has_answered=False)
        assert said == (
            f"directory: '{there}' given; under this contract silo alpha delivers from {here}, as "
            f"{keys}/alpha.sums/{CONTRACT}.txt says; from two run directories one delivery could be told from the "
            "other; allowed: that one, a copy of it, or a new contract; if it is lost for good, take the line that "
            "begins with run out of that file, and none that says what was answered"
        )
        assert one_line_error(note(keys).begin, identity, there) == said
    assert note(keys).file.read_bytes() == first


def test_a_set_is_answered_once_in_whatever_directory(tmp_path: Path) -> None:
    note(tmp_path).begin(ONE, tmp_path)
    assert note(tmp_path).add_only(1, "aa")
    with note(tmp_path).file.open("a") as file:
        file.write("000002 b\x00 half a li")  # killed
    assert note(tmp_path).add_only(1, "aa")
    assert not note(tmp_path).add_only(1, "bb")
    assert note(tmp_path).add_only(2, "bb")
    assert note(tmp_path, OTHER).add_only(1, "bb")
    text = note(tmp_path).file.read_text()
    note(tmp_path).file.write_text(text.replace(f"run {ONE}", ""))  # that run directory is lost for good
    note(tmp_path).begin(TWO, tmp_path / "anew")
    assert not note(tmp_path).add_only(1, "bb")


def test_a_run_directory_that_has_answered_misses_its_note(tmp_path: Path) -> None:
    file = note(tmp_path).file
    said = one_line_error(note(tmp_path).check, ONE, tmp_path / "run", has_answered=True)
    assert said.startswith(f"trust.directory: '{tmp_path}' given; {file}, which says what silo alpha has answered")
    assert said.endswith(f"begin it anew: mkdir -p {file.parent} && touch {file}")
    file.parent.mkdir()
    file.touch()
    note(tmp_path).check(ONE, tmp_path / "run", has_answered=True)


def test_where_nothing_can_be_noted_nothing_begins(tmp_path: Path) -> None:
    (tmp_path / "alpha.sums").touch()
    said = one_line_error(note(tmp_path).begin, ONE, tmp_path)
    assert said == (
        f"trust.directory: '{tmp_path}' given; {tmp_path}/alpha.sums/{CONTRACT}.txt, where silo alpha notes what it "
        "answers in secure sums, cannot be written: File exists; allowed: a directory for its key where that can be "
        "done"
    )
    assert "cannot be written: " in one_line_error(note(tmp_path / "missing").add_only, 1, "aa")
    (tmp_path / "alpha.sums").unlink()
    note(tmp_path).file.mkdir(parents=True)
    said = one_line_error(note(tmp_path).check, ONE, tmp_path, has_answered=False)
    assert "cannot be read: Is a directory; allowed: " in said


def test_of_many_that_start_at_once_one_begins(tmp_path: Path) -> None:
    def begins(number: int) -> bool:
        try:
            note(tmp_path).begin(f"{number:032x}", tmp_path / str(number))
        except ConfigError:
            return False
        return note(tmp_path).add_only(1, f"{number:064x}")

    with ThreadPoolExecutor(16) as pool:
        assert sum(pool.map(begins, range(64))) == 1
        assert sum(pool.map(lambda number: note(tmp_path).add_only(2, f"{number:064x}"), range(64))) == 1


def test_what_another_process_is_about_to_note_is_waited_for(tmp_path: Path) -> None:
    note(tmp_path).begin(ONE, tmp_path)
    with ThreadPoolExecutor(1) as pool:
        with note(tmp_path).file.open("a") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            ours = pool.submit(note(tmp_path).add_only, 1, "aa")
            wait([ours], timeout=0.3)
            append(note(tmp_path).file, "000001 bb")
        assert not ours.result()
