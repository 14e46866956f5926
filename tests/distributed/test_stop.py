"""`atoll logs` and `atoll stop` beside a local launch."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from launch.show.logs import read_logs
from launch.show.metrics import read_status
from launch.start.local import process_directory
from launch.start.stop import stop_run
from pretrain.host.lock import lock_holder
from tests.conftest import TinyConfig
from tests.distributed.federation import left_behind
from tests.support import one_line_error
from tests.waiting import PATIENCE_SECONDS, wait_for

ATOLL = [sys.executable, "-m", "launch.cli"]


@pytest.mark.soak
def test_stop_saves_all_and_leaves_nothing(
    tmp_path: Path, tiny_config: TinyConfig, request: pytest.FixtureRequest
) -> None:
    def start(*arguments: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen([*ATOLL, *arguments], stdout=subprocess.DEVNULL)
        request.addfinalizer(process.terminate)
        return process

    config = tiny_config(tmp_path, inner={"num_steps": 100_000})
    options = ["--config", str(tmp_path / "tiny.yaml")]
    launcher = start("launch", "local", *options)
    statuses = [process_directory(config, name) / "status.json" for name in ("aggregator", *config.silos)]
    wait_for(lambda: read_status(statuses[1]).step > 20, seconds=90)
    with subprocess.Popen([*ATOLL, "logs", config.directory, "alpha", "-f"], stdout=subprocess.PIPE, text=True) as logs:
        assert logs.stdout
        assert all(logs.stdout.readline().startswith("alpha | ") for _ in range(60))
        logs.send_signal(signal.SIGINT)
        assert logs.wait(PATIENCE_SECONDS) == 130
    said = subprocess.check_output([*ATOLL, "stop", config.directory], text=True)
    assert said.splitlines()[-1] == f"stopped: the launch (process {launcher.pid})"
    assert launcher.wait(PATIENCE_SECONDS) == 128 + signal.SIGTERM
    assert {read_status(status).phase for status in statuses} == {"stopped"}
    assert not left_behind(str(tmp_path))
    # A silo that somebody started by itself.
    alone = start("train", "--silo", "alpha", *options)
    wait_for(lambda: read_status(statuses[1]).phase in ("training", "waiting"), seconds=90)
    said = subprocess.check_output([*ATOLL, "stop", config.directory], text=True)
    assert said.splitlines()[-1].startswith("stopped: alpha (process ")
    assert alone.wait(PATIENCE_SECONDS) == 0


def test_logs_are_those_of_the_newest_start(tmp_path: Path) -> None:
    attempt = tmp_path / "logs" / "attempt-002"
    attempt.mkdir(parents=True)
    (tmp_path / "logs" / "latest").symlink_to("attempt-002")
    assert one_line_error(lambda: list(read_logs(tmp_path, [], num_lines=1, follow=False))) == (
        f"run directory: '{tmp_path}' given; there are no logs in {tmp_path}/logs/latest"
    )
    (attempt / "law.log").write_text("one\ntwo\nhalf")
    (attempt / "aggregator.log").write_text("three\n")
    assert list(read_logs(tmp_path, [], num_lines=1, follow=False)) == ["aggregator | three", "law        | two"]
    following = read_logs(tmp_path, ["law"], num_lines=9, follow=True)
    assert [next(following), next(following)] == ["law | one", "law | two"]
    with (attempt / "law.log").open("a") as log:
        log.write(" a line\n")
    assert next(following) == "law | half a line"
    later = tmp_path / "logs" / "attempt-003"
    later.mkdir()
    (later / "law.log").write_text("four\n")
    (tmp_path / "logs" / "latest").unlink()
    (tmp_path / "logs" / "latest").symlink_to("attempt-003")
    assert next(following) == "law | four"
    assert one_line_error(lambda: list(read_logs(tmp_path, ["lab"], num_lines=1, follow=False))) == (
        "NAME: 'lab' given; allowed: law"
    )


def test_a_lock_of_another_machine_is_not_ours_to_stop(tmp_path: Path) -> None:
    assert one_line_error(stop_run, tmp_path) == f"run directory: '{tmp_path}' given; there is no config.yaml in it"
    (tmp_path / "config.yaml").touch()
    assert stop_run(tmp_path) == []
    code = "import sys, time; from pathlib import Path; from pretrain.host.lock import lock_directory"
    code += "; lock_directory(Path(sys.argv[1]), ''); print(flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
    try:
        assert holder.stdout
        holder.stdout.readline()
        found = lock_holder(tmp_path)
        assert found
        assert (found.process, found.elsewhere) == (holder.pid, False)
        (tmp_path / "lock").write_text("1\n")  # a number that belongs to somebody else here
        assert one_line_error(stop_run, tmp_path) == (
            f"run directory: '{tmp_path}' given; the launch runs on another machine as process 1; stop it there"
        )
    finally:
        holder.kill()
        holder.wait()
    assert lock_holder(tmp_path) is None
