# What `python` (see __init__.py) runs, PYTHON and SOCKET before it: asks the server for a fork and stands for it.
import json
import os
import signal
import socket
import sys

PASSED_ON = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGCONT")


def main() -> None:
    arguments = [argument for argument in sys.argv[1:] if argument != "-u"]
    if arguments[:1] != ["-m"] or os.environ.get("OMP_NUM_THREADS", "1") != "1":
        os.execv(PYTHON, [PYTHON, *sys.argv[1:]])  # noqa: F821
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    server.connect(SOCKET)  # noqa: F821
    ignored = [number for number in signal.valid_signals() if signal.getsignal(number) is signal.SIG_IGN]
    files = sorted(int(name) for name in os.listdir("/proc/self/fd"))
    files = [number for number in files if number != server.fileno() and os.path.exists(f"/proc/self/fd/{number}")]
    request = {
        "argv": arguments[1:],
        "environment": dict(os.environ),
        "directory": os.getcwd(),
        "files": files,
        "ignored": [int(number) for number in ignored],
    }
    data = json.dumps(request).encode()
    socket.send_fds(server, [len(data).to_bytes(4, "big")], files)
    server.sendall(data)
    answers = server.makefile()
    pid = int(answers.readline())
    for name in PASSED_ON:
        if signal.getsignal(getattr(signal, name)) is not signal.SIG_IGN:
            signal.signal(getattr(signal, name), lambda number, _: os.kill(pid, number))
    code = int(answers.readline() or -signal.SIGKILL)  # an end without an answer: the server is gone
    if code < 0:
        signal.signal(-code, signal.SIG_DFL) if -code not in (signal.SIGKILL, signal.SIGSTOP) else None
        os.kill(os.getpid(), -code)
    os._exit(code)


main()
