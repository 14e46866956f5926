"""A directory store that several accounts write to: no link leads out of it, and no pipe holds its reader."""

import errno
import os
import socket
import uuid
from pathlib import Path
from typing import Any

import pytest

from pretrain.exchange.objects import Objects
from pretrain.trust.ledger import RefusedError
from tests.support import one_line_error


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A store with an object, beside a private folder."""
    Objects(str(tmp_path / "store")).write("a/one", b"1")
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "shard.safetensors").write_bytes(b"secret")
    return tmp_path / "store"


def private(root: Path) -> list[str]:
    return [path.name for path in (root.parent / "private").iterdir()]


def test_a_link_to_a_file_is_no_object(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "a" / "two").symlink_to(root.parent / "private" / "shard.safetensors")
    objects = Objects(str(root))
    assert not objects.exists("a/two")
    assert objects.names("a") == ["one"]
    with pytest.raises(FileNotFoundError):
        objects.read("a/two")
    with pytest.raises(FileNotFoundError):
        objects.download("a/two", root.parent / "copy", limit_bytes=100)
    assert capsys.readouterr().out == f"{root}: a/two is a link, no object of a store: passed over\n"  # once
    with pytest.raises(FileExistsError):
        objects.write("a/two", b"2")
    objects.delete("a/two")  # the link itself
    assert private(root) == ["shard.safetensors"]
    objects.write("a/two", b"2")
    assert objects.read("a/two") == b"2"


@pytest.mark.parametrize("name", ["b", "b/c"])
def test_no_folder_is_reached_through_a_link(name: str, root: Path) -> None:
    (root / name).parent.mkdir(exist_ok=True)
    (root / name).symlink_to(root.parent / "private")
    objects = Objects(str(root))
    assert not objects.exists(f"{name}/shard.safetensors")
    assert objects.names(name) == []
    with pytest.raises((FileNotFoundError, NotADirectoryError)):
        objects.read(f"{name}/shard.safetensors")
    objects.delete(f"{name}/shard.safetensors")
    message = one_line_error(objects.write, f"{name}/new", b"x")
    assert message.startswith(f"exchange.url: {root} given; {name}/new cannot be written: ")
    assert private(root) == ["shard.safetensors"]


def test_the_store_itself_may_be_a_link(root: Path) -> None:
    (root.parent / "linked").symlink_to(root)
    objects = Objects(str(root.parent / "linked"))
    objects.write("a/two", b"2")
    assert objects.names("a") == ["one", "two"]
    assert objects.read("a/two") == b"2"


@pytest.mark.timeout(20)
def test_pipes_and_sockets_hold_nobody(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(root / "a" / "pipe")
    with socket.socket(socket.AF_UNIX) as served:
        served.bind(str(root / "a" / "socket"))
        objects = Objects(str(root))
        for name, what in (("a/pipe", "a pipe"), ("a/socket", "no regular file")):
            assert not objects.exists(name)
            for read in (objects.read, lambda name: objects.download(name, root.parent / "copy", limit_bytes=1)):
                with pytest.raises(FileNotFoundError):
                    read(name)
            assert f"{root}: {name} is {what}, no object of a store: passed over\n" in capsys.readouterr().out
        assert objects.names("a") == ["one"]


def test_a_small_object_is_small(root: Path) -> None:
    objects = Objects(str(root))
    objects.write("a/big", bytes(1001))
    assert len(objects.read("a/big", limit_bytes=1001)) == 1001
    with pytest.raises(RefusedError, match=r"^a/big has more than the 1000 bytes that it may have$"):
        objects.read("a/big", limit_bytes=1000)


def make_file(directory: Path, data: bytes) -> Path:
    (directory / "file").write_bytes(data)
    return directory / "file"


@pytest.mark.parametrize("is_directory", [True, False])
def test_a_file_that_is_given_away_is_not_copied(is_directory: bool, tmp_path: Path) -> None:
    """And is where it was, if the name is taken. Where it cannot be moved it is copied."""
    objects = Objects(str(tmp_path / "store") if is_directory else f"memory://{uuid.uuid4().hex}")
    file = make_file(tmp_path, b"given")
    inode = file.stat().st_ino
    objects.give(file, "a/b")
    assert not file.exists()
    assert objects.read("a/b") == b"given"
    assert objects.names("a") == ["b"]
    if is_directory:
        assert Path(objects.url, "a", "b").stat().st_ino == inode
    other = make_file(tmp_path, b"other")
    with pytest.raises(FileExistsError):
        objects.give(other, "a/b")
    assert other.read_bytes() == b"other"
    assert objects.read("a/b") == b"given"
    assert objects.names("a") == ["b"]


def test_a_file_of_another_file_system_is_given_as_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*names: str, **folders: Any) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "rename", refuse)
    file, objects = make_file(tmp_path, b"given"), Objects(str(tmp_path / "store"))
    objects.give(file, "a/b")
    assert not file.exists()
    assert objects.read("a/b") == b"given"
