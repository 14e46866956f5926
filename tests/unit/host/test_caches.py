"""Caches of a process whose home directory cannot be written."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.host import caches
from pretrain.host.caches import keep_compiled, use_writable_caches


@pytest.mark.parametrize("home", ["/proc/1/none", "/proc/1", "/dev/null"])
def test_caches_go_to_the_run_directory(tmp_path: Path, home: str) -> None:
    code = "import sys; from pathlib import Path; from pretrain.host.caches import use_writable_caches; "
    code += "print(use_writable_caches(Path(sys.argv[1]))); "
    code += "from pretrain.silo.extensions import building; import pretrain.silo.extensions\n"
    code += "with building() as directory: print(directory)"
    environment = {name: value for name, value in os.environ.items() if name not in ("TORCH_EXTENSIONS_DIR",)}
    environment |= {"HOME": home}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    said, *_, directory = done.stdout.splitlines()
    assert said == f"{home}/.cache, {home}/.triton, {home}/.config cannot be written: caches go to {tmp_path}/caches"
    assert Path(directory).is_relative_to(tmp_path / "caches")
    assert Path(directory).is_dir()


def test_where_home_can_be_written_nothing_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home-to-be"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert use_writable_caches(tmp_path / "run") == ""
    assert "XDG_CACHE_HOME" not in os.environ


def test_what_is_compiled_is_kept_for_each_kind_of_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    place = keep_compiled()
    assert place.parent == tmp_path / "atoll"
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(place)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "elsewhere")
    assert keep_compiled() == Path("elsewhere")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    assert keep_compiled() == place
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    monkeypatch.setattr(caches, "_processor", lambda: "another")
    assert keep_compiled() != place
