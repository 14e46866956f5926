"""Starting and stopping processes: small scripts play the silos, except where torchrun's own ways are the point."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest
from rich.console import Console

from launch.show.display import LiveDisplay, PlainDisplay, Progress, describe_setup, format_bytes, format_seconds
from launch.show.metrics import MetricsReader, ProcessStatus, last_of_each, read_status
from launch.start import local
from launch.start.local import Attempt, hold_directory, launch_local, local_commands, log_tail, new_attempt
from launch.start.processes import POLL_SECONDS, ChildCommand, Children
from launch.start.workers import SAVE_SECONDS
from pretrain.config.errors import ConfigError
from pretrain.config.keys import RunConfig, SiloConfig
from pretrain.config.load import save_config
from tests.waiting import PATIENCE_SECONDS, wait_for

# Leaves its pid behind, has a child of its own in another session, as torchrun has, and waits to be stopped.
PATIENT = """
import os, signal, subprocess, sys, time
from pathlib import Path
name, pids = sys.argv[1], Path(sys.argv[2])
worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
def stop(number, frame):
    worker.terminate()
    worker.wait()
    (pids / f"{name}.saved").touch()
    sys.exit(1)
signal.signal(signal.SIGTERM, stop)
(pids / f"{name}.tmp").write_text(f"{os.getpid()} {worker.pid}")
(pids / f"{name}.tmp").rename(pids / f"{name}.pids")
time.sleep(600)
"""
STUBBORN = PATIENT.replace("signal.signal(signal.SIGTERM, stop)", "signal.signal(signal.SIGTERM, signal.SIG_IGN)")
CRASHING = """
print("line before")
raise RuntimeError("out of paper")
"""
FINISHED = "print('done')"

# Starts `launch_local` with the commands of a JSON file: a launcher that a test can send signals to.
DRIVER = """
import json, sys
from pathlib import Path
from launch.start.local import launch_local
from launch.start.processes import ChildCommand
from pretrain.config.load import load_config
config, commands = load_config([sys.argv[1]]), json.loads(Path(sys.argv[2]).read_text())
sys.exit(launch_local(config, build_commands=lambda *_: [ChildCommand(**command) for command in commands]))
"""


def make_config(directory: Path, num_silos: int = 2, **exchange: str) -> RunConfig:
    config = RunConfig(name="trial", directory=str(directory / "run"))
    config.model.config = {"model_type": "llama"}
    config.inner.num_steps, config.outer.sync_interval_steps = 40, 10
    config.silos = {name: SiloConfig() for name in ("law", "medicine", "prose")[:num_silos]}
    config.exchange.kind = exchange.get("kind", "store")
    return config


def script(name: str, source: str, pids: Path, error_path: Path | None = None) -> ChildCommand:
    return ChildCommand(name=name, argv=[sys.executable, "-c", source, name, str(pids)], error_path=error_path)


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def pids_of(pids: Path, *names: str) -> list[int]:
    """Leader and worker of each named child, once they are there."""
    wait_for(lambda: all((pids / f"{name}.pids").exists() for name in names), seconds=15)
    return [int(pid) for name in names for pid in (pids / f"{name}.pids").read_text().split()]


def start_driver(tmp_path: Path, commands: list[ChildCommand]) -> subprocess.Popen[str]:
    config = make_config(tmp_path)
    save_config(config, tmp_path / "given.yaml")
    fields = [{"name": c.name, "argv": c.argv, "environment": c.environment} for c in commands]
    (tmp_path / "commands.json").write_text(json.dumps(fields))
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(tmp_path / "given.yaml"), str(tmp_path / "commands.json")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run_quietly(config: RunConfig, commands: list[ChildCommand], max_restarts: int = 0) -> tuple[int, str]:
    console = Console(record=True, width=120, force_terminal=False, quiet=False, file=open(os.devnull, "w"))  # noqa: SIM115
    code = launch_local(config, build_commands=lambda *_: commands, console=console, max_restarts=max_restarts)
    return code, console.export_text()


def test_a_crash_brings_all_down_and_shows_the_end_of_the_log(tmp_path: Path) -> None:
    waits_first = (
        "import pathlib, sys, time\nwhile len(list(pathlib.Path(sys.argv[2]).glob('*.pids'))) < 2: time.sleep(.05)"
    )
    commands = [script(name, PATIENT, tmp_path) for name in ("aggregator", "medicine")]
    commands.append(script("law", waits_first + CRASHING, tmp_path))
    code, text = run_quietly(make_config(tmp_path), commands)
    assert code == 1
    assert "error: law failed with exit status 1" in text
    assert "RuntimeError: out of paper" in text
    assert "logs/attempt-001/law.log" in text
    assert (tmp_path / "medicine.saved").exists(), "the others are stopped with SIGTERM first"
    assert not [pid for pid in pids_of(tmp_path, "aggregator", "medicine") if is_alive(pid)]


def test_a_users_mistake_is_one_line_and_never_tried_again(tmp_path: Path) -> None:
    error_path = tmp_path / "error.txt"
    error_path.write_text("stale\n")
    source = f"open({str(error_path)!r}, 'w').write('silos.law.data: none given\\n'); raise SystemExit(2)"
    commands = [script("law", source, tmp_path, error_path), script("medicine", PATIENT, tmp_path)]
    code, text = run_quietly(make_config(tmp_path), commands, max_restarts=3)
    assert code == 2
    assert "error: law: silos.law.data: none given" in text
    assert "Traceback" not in text
    assert "start 2" not in text


def test_restarts_until_it_works(tmp_path: Path) -> None:
    source = (
        "import pathlib, sys\nhere = pathlib.Path(sys.argv[2]) / 'tries'\n"
        "here.write_text((here.read_text() if here.exists() else '') + 'x')\nsys.exit(len(here.read_text()) < 3)"
    )
    commands = [script("law", source, tmp_path), script("medicine", FINISHED, tmp_path)]
    code, text = run_quietly(make_config(tmp_path), commands, max_restarts=2)
    assert code == 0
    assert "start 3 of 3" in text
    assert "--- start 3 of law ---" in (tmp_path / "run/logs/latest/law.log").read_text()


def test_a_silo_that_stops_early_is_a_failure(tmp_path: Path) -> None:
    status = tmp_path / "run/silos/law/status.json"
    source = f"import pathlib; p = pathlib.Path({str(status)!r}); p.parent.mkdir(parents=True); "
    source += """p.write_text('{"phase": "stopped"}')"""
    code, text = run_quietly(make_config(tmp_path), [script("law", source, tmp_path)])
    assert code == 1
    assert "law stopped before the end" in text


STOPS = """
import pathlib, sys
path = pathlib.Path(sys.argv[2]) / "run/silos/law/status.json"
path.parent.mkdir(parents=True, exist_ok=True)
path.write_text('{"phase": "stopped"}')
print("stopped after step 3: why; all is saved")
sys.exit(75)
"""


@pytest.mark.parametrize("is_alone", [False, True])
def test_a_stop_is_a_failure_only_for_those_who_wait(tmp_path: Path, *, is_alone: bool) -> None:
    config, output = make_config(tmp_path, 1), (tmp_path / "said").open("w+")
    (tmp_path / "run").mkdir()
    console = Console(file=output, width=200)
    logs = new_attempt(tmp_path / "run")
    attempt = Attempt(config=config, log_directory=logs, max_restarts=0, console=console, is_alone=is_alone)
    attempt.run([script("law", STOPS, tmp_path)])
    assert attempt.report(write=False) == (0 if is_alone else 1)
    output.seek(0)
    said = output.read()
    assert ("\nsilo law stopped after step 3: why; all is saved\n" in said) == is_alone
    assert ("error: law stopped before the end" in said) != is_alone


def test_a_mistake_that_is_only_in_the_log_is_one_line(tmp_path: Path) -> None:
    source = "import sys; print('atoll: silo law runs there already'); sys.exit(2)"
    code, text = run_quietly(make_config(tmp_path), [script("law", source, tmp_path)], max_restarts=1)
    assert code == 2
    assert text.endswith("\nerror: law: silo law runs there already\n")


def test_each_attempt_has_its_own_logs(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    for _ in range(2):
        code, text = run_quietly(config, [script("law", FINISHED, tmp_path)])
        assert code == 0
    assert "finished: 40 steps in each of 2 silos" in text
    assert f"  model    atoll export {tmp_path}/run --output model" in text
    assert sorted(path.name for path in (tmp_path / "run/logs").iterdir()) == ["attempt-001", "attempt-002", "latest"]
    assert (tmp_path / "run/logs/latest").resolve().name == "attempt-002"
    assert (tmp_path / "run/logs/attempt-001/law.log").read_text() == "done\n"
    assert (tmp_path / "run/config.yaml").exists()


def test_attempt_numbers_go_on_after_the_largest(tmp_path: Path) -> None:
    (tmp_path / "logs/attempt-1234").mkdir(parents=True)
    assert new_attempt(tmp_path).name == "attempt-1235"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_cleanly(tmp_path: Path, number: signal.Signals, code: int) -> None:
    driver = start_driver(tmp_path, [script(name, PATIENT, tmp_path) for name in ("aggregator", "law")])
    pids = pids_of(tmp_path, "aggregator", "law")
    driver.send_signal(number)
    output, _ = driver.communicate(timeout=PATIENCE_SECONDS)
    assert driver.returncode == code
    assert "stopping: each silo finishes its step and saves a checkpoint" in output
    assert "the same command goes on" in output
    assert (tmp_path / "law.saved").exists()
    assert not [pid for pid in pids if is_alive(pid)]


def test_a_second_ctrl_c_ends_what_does_not_stop(tmp_path: Path) -> None:
    driver = start_driver(tmp_path, [script("law", STUBBORN, tmp_path)])
    pids = pids_of(tmp_path, "law")
    driver.send_signal(signal.SIGINT)
    time.sleep(1)
    assert driver.poll() is None
    driver.send_signal(signal.SIGINT)
    driver.communicate(timeout=PATIENCE_SECONDS)
    assert driver.returncode == 130
    assert not [pid for pid in pids if is_alive(pid)]


def test_a_killed_launcher_leaves_nothing_and_holds_its_directory_until_then(tmp_path: Path) -> None:
    driver = start_driver(tmp_path, [script(name, PATIENT, tmp_path) for name in ("aggregator", "law")])
    pids = pids_of(tmp_path, "aggregator", "law")
    with pytest.raises(ConfigError, match="a launch runs there already"), hold_directory(tmp_path / "run"):
        pass
    driver.kill()
    driver.communicate(timeout=PATIENCE_SECONDS)
    wait_for(lambda: not any(is_alive(pid) for pid in pids), seconds=15)
    assert (tmp_path / "law.saved").exists(), "the kernel's SIGTERM gives a silo the time to save"
    with hold_directory(tmp_path / "run"):
        pass


def workers(name: str, pids: Path, num_processes: int = 2) -> ChildCommand:
    """Two processes of a silo, and what starts them."""
    path = pids / "worker.py"
    path.write_text(PATIENT.replace("name, pids = sys.argv[1]", 'name, pids = sys.argv[1] + os.environ["RANK"]'))
    config = make_config(pids, 1, kind="none")
    config.silos["law"].processes_per_node = num_processes
    argv = local_commands(config, pids / "config.yaml")[0].argv
    words = [*argv[: argv.index("pretrain.train") - 1], str(path), name, str(pids)]
    return ChildCommand(name=name, argv=words, environment={"RANK": "0"})


def test_what_starts_workers_passes_on_that_the_launcher_was_killed(tmp_path: Path) -> None:
    driver = start_driver(tmp_path, [workers("law", tmp_path)])
    pids = pids_of(tmp_path, "law0", "law1")
    parent = psutil.Process(pids[0]).ppid()
    driver.kill()
    driver.communicate(timeout=PATIENCE_SECONDS)
    wait_for(lambda: not any(is_alive(pid) for pid in [parent, *pids]), seconds=15)
    assert (tmp_path / "law0.saved").exists()
    assert (tmp_path / "law1.saved").exists()


def test_workers_save_when_what_started_them_is_killed(tmp_path: Path) -> None:
    with Children(grace_seconds=5) as children:
        child = children.start(workers("law", tmp_path), tmp_path / "law.log")
        pids = pids_of(tmp_path, "law0", "law1")
        os.kill(child.process.pid, signal.SIGKILL)
        wait_for(lambda: not any(is_alive(pid) for pid in pids), seconds=15)
        assert child.returncode == -signal.SIGKILL
    assert (tmp_path / "law0.saved").exists()
    assert (tmp_path / "law1.saved").exists()


def test_what_a_killed_process_left_in_another_session_is_found(tmp_path: Path) -> None:
    with Children(grace_seconds=5) as children:
        child = children.start(workers("law", tmp_path, num_processes=1), tmp_path / "law.log")
        pids = pids_of(tmp_path, "law0")
        os.kill(child.process.pid, signal.SIGKILL)
        wait_for(lambda: child.returncode is not None, seconds=15)
        assert is_alive(pids[1])
    assert not [pid for pid in pids if is_alive(pid)]


def test_an_exception_in_the_launcher_leaves_nothing(tmp_path: Path) -> None:
    def launch() -> None:
        with Children(grace_seconds=5) as children:
            children.start(script("law", PATIENT, tmp_path), tmp_path / "law.log")
            pids_of(tmp_path, "law")
            raise RuntimeError("display broke")

    with pytest.raises(RuntimeError, match="display broke"):
        launch()
    assert not [pid for pid in pids_of(tmp_path, "law") if is_alive(pid)]


def test_the_grace_ends(tmp_path: Path) -> None:
    with Children(grace_seconds=0.3) as children:
        children.start(script("law", STUBBORN, tmp_path), tmp_path / "law.log")
        pids = pids_of(tmp_path, "law")
    assert not [pid for pid in pids if is_alive(pid)]


def test_commands_of_a_local_launch(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    config.silos["law"] = SiloConfig(processes_per_node=2, num_threads=3)
    aggregator, law, medicine = local_commands(config, tmp_path / "config.yaml")
    assert aggregator.argv[1:] == ["-m", "pretrain.aggregate", "--config", str(tmp_path / "config.yaml")]
    several = f"-m launch.start.workers --num-processes 2 --max-restarts 0 -- {sys.executable} -m pretrain.train"
    assert several in " ".join(law.argv)
    assert medicine.argv[1:3] == ["-m", "pretrain.train"]
    assert medicine.environment["WORLD_SIZE"] == "1"
    assert law.argv[-2:] == ["--silo", "law"]
    assert law.environment["OMP_NUM_THREADS"] == "3"
    assert medicine.error_path == config.silo_directory("medicine") / "error.txt"
    config.exchange.kind = "none"
    assert [command.name for command in local_commands(config, tmp_path)] == ["law", "medicine"]


def test_a_local_launch_has_one_node(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    config.silos["law"].num_nodes = 2
    with pytest.raises(ConfigError, match=r"silos.law.num_nodes: 2 given; allowed: 1 with a local launch"):
        launch_local(config)
    assert not Path(config.directory).exists()


def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    with pytest.raises(ConfigError, match="allowed: a writable folder"):
        launch_local(make_config(tmp_path))


def test_torchruns_own_traceback_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "law.log"
    path.write_text(
        "step 1\nRuntimeError: out of paper\n"
        "E1122 16:50:40.6 49 torch/distributed/elastic/multiprocessing/api.py:1002] failed (exitcode: 1) local_rank 1\n"
        "Traceback (most recent call last):\nChildFailedError\n"
    )
    assert log_tail(path)[1] == "RuntimeError: out of paper"
    assert "failed (exitcode: 1)" in log_tail(path)[-1]


def test_metrics_are_read_as_they_grow(tmp_path: Path) -> None:
    reader = MetricsReader(tmp_path / "metrics.jsonl")
    assert reader.read_new() == []
    with (tmp_path / "metrics.jsonl").open("w") as file:
        file.write('{"kind": "step", "step": 1}\nnot json\n{"kind": "step", ')
        file.flush()
        assert [record["step"] for record in reader.read_new()] == [1]
        file.write('"step": 2}\n')
        file.flush()
        assert [record["step"] for record in reader.read_new()] == [2]


def test_of_repeated_records_the_last_counts() -> None:
    steps = [
        {"kind": "step", "silo": "law", "step": step, "loss": loss} for step, loss in ((1, 5.0), (2, 4.0), (2, 3.0))
    ]
    assert [record["loss"] for record in last_of_each(steps)["step"]] == [5.0, 3.0]


def test_a_status_of_an_earlier_start_does_not_count(tmp_path: Path) -> None:
    path = tmp_path / "status.json"
    path.write_text(json.dumps({"phase": "finished", "waiting_for": None, "since": 5.0, "step": 7, "round": 1}))
    assert read_status(path).phase == "finished"
    earlier = path.read_bytes()
    assert read_status(path, earlier).phase == "starting"
    os.utime(path, (0, 0))  # of a machine whose clock is another
    path.write_text(json.dumps({"phase": "training", "waiting_for": None, "since": -1.4e9, "step": 8, "round": 1}))
    assert (read_status(path, earlier).phase, read_status(path, earlier).step) == ("training", 8)


def drawn(display: LiveDisplay, width: int = 140) -> str:
    console = Console(width=width, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(display._draw())
    return console.export_text()


def test_live_table(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    config.silos["law"] = SiloConfig(
        processes_per_node=2, precision="bf16", deepspeed={"zero_optimization": {"stage": 3}}
    )
    display = LiveDisplay(config, Console(file=open(os.devnull, "w"), force_terminal=True, width=140))  # noqa: SIM115
    step = {"kind": "step", "silo": "law", "step": 10, "loss": 5.25, "tokens_per_second": 12345.0, "mfu": 0.4125}
    waiting = ProcessStatus(phase="waiting", waiting_for="commit 1 from the aggregator", waited_seconds=25)
    display.update([step], {"law": waiting, "aggregator": ProcessStatus(phase="merging")})
    display.close()
    text = drawn(display)
    law = next(line for line in text.splitlines() if line.startswith("law"))
    for part in (
        "waiting",
        "1/4",
        "10/40",
        "5.2500",
        "12,345, 41% MFU",
        "2 ranks, ZeRO-3, bf16",
        "25 s  commit 1 from the",
    ):
        assert part in law
    assert "12%" in text


def test_the_live_table_cuts_nothing_at_80_columns(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    long = "university-hospital-of-the-northern-region-department-of-surgery"
    config.silos[long] = config.silos.pop("law")
    display = LiveDisplay(config, Console(file=open(os.devnull, "w"), force_terminal=True, width=80))  # noqa: SIM115
    words = f"delivery for version 1,234 from {long}, medicine: 2 are enough 600 s after the commit before"
    waiting = ProcessStatus(phase="waiting", waiting_for=words, waited_seconds=4000)
    step = {"kind": "step", "silo": long, "step": 10, "loss": 5.25, "tokens_per_second": 1234567.0, "mfu": 0.4}
    display.update([step], {long: waiting, "aggregator": waiting})
    display.progress.start_seconds -= 36_000
    display.close()
    lines = drawn(display, 80).splitlines()
    assert lines[-1].strip().endswith("left")
    assert "passed" in lines[-1]
    assert max(map(len, lines)) <= 80
    assert not any("…" in line for line in lines)
    text = " ".join(line.strip() for line in lines)
    assert f"aggregator waits 1:06:40 h  {words}" in text
    assert "1,234,567" in text
    name = "".join(line[: lines[0].index("phase")].strip() for line in lines[1:])
    assert name.startswith(("medicine" + long, long))


def test_plain_lines(tmp_path: Path) -> None:
    console = Console(record=True, width=60, file=open(os.devnull, "w"))  # noqa: SIM115
    display = PlainDisplay(make_config(tmp_path), console)
    law = {"silo": "law", "round": 1}
    records = [
        {"kind": "step", **law, "step": 10, "loss": 5.0, "tokens_per_second": 100.0, "mfu": 0.4},
        {"kind": "sync", **law, "step": 10, "fragment": 0, "bytes_sent": 1000, "wait_seconds": 0.0},
        {"kind": "sync", **law, "step": 10, "fragment": 1, "bytes_sent": 500, "wait_seconds": 2.5},
        {"kind": "commit", "version": 1, "fragment": 0, "silos": ["law"], "update_norm": 0.5, "cosine_mean": -0.25},
        {"kind": "eval", **law, "step": 10, "val_loss": {"law": 4.0, "medicine": 6.0}},
    ]
    waiting = ProcessStatus(phase="waiting", waiting_for="commit 2", waited_seconds=21)
    display.update(records, {"law": waiting})
    display.update([], {"law": waiting})
    step = {"kind": "step", **law, "step": 20, "round": 2, "loss": 4.5, "tokens_per_second": 100.0}
    display.update([step, {"kind": "sync", **law, "step": 20, "round": 2, "fragment": 0}], {})
    display.close()
    lines = console.export_text().splitlines()
    assert len(lines) == 5, "one line a round and commit, and a wait is not said again at every look"
    assert "is training at step 10 of 40" in lines[0]
    assert lines[1].endswith("commit 1/4  1 of 2 silos  update norm 0.5  cosine between silos -0.25")
    assert lines[2].endswith("has waited 21 s for commit 2")
    assert "round 1/4  step 10/40  loss 5.0000  held-out 5.0000        100 tokens/s, 40% MFU  sent" in lines[3]
    assert lines[3].endswith("sent   1.5 kB  waited    2.5 s")
    assert "round 2/4  step 20/40  loss 4.5000  held-out      -        100 tokens/s  sent" in lines[4], "not evaluated"


def test_time_left_follows_the_speed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    progress = Progress(config=make_config(tmp_path))
    monkeypatch.setattr(time, "monotonic", lambda: 100.0)
    assert progress.seconds_left() is None
    progress.take({"kind": "step", "silo": "law", "step": 20, "loss": 1.0})
    monkeypatch.setattr(time, "monotonic", lambda: 110.0)
    assert progress.seconds_left() == pytest.approx(30.0)


def test_formats() -> None:
    assert [format_seconds(s) for s in (45, 185, 7800)] == ["45 s", "3:05 min", "2:10:00 h"]
    assert [format_bytes(b) for b in (12, 1.5e6, 2.3e9)] == ["12 B", "1.5 MB", "2.3 GB"]
    assert describe_setup(SiloConfig()) == "1 rank, ZeRO-0, fp32"
    assert describe_setup(SiloConfig(num_nodes=4, min_nodes=2)) == "2 to 4 ranks, ZeRO-0, fp32"


def test_the_launcher_needs_no_torch() -> None:
    code = "import sys, launch.start.local, launch.show.status, launch.show.report; sys.exit('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0


def test_what_starts_workers_ends_them_before_we_do() -> None:
    assert local.GRACE_SECONDS > SAVE_SECONDS + POLL_SECONDS
