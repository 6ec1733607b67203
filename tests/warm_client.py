"""`python` for tests: asks `warm_server.py` to run a command, and is that process to its parent.

Signals go on to it, its end is this one's, and it does not outlive this one. What the server cannot
run (options of Python, another environment) is run by Python itself.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys


def main(python: str, address: str, called: str, *arguments: str) -> None:
    """Runs `python *arguments`.

    Args:
        python: The real one.
        address: Of the server.
        called: This program, which starts like Python.
        arguments: Of Python.
    """
    if not arguments or (arguments[0][0] == "-" and arguments[0] not in ("-c", "-m", "-P", "-u")):
        os.execv(python, [python, *arguments])
    command = {
        "argv": arguments,
        "cwd": os.getcwd(),
        "env": dict(os.environ),
        "python": called,
    }
    data = json.dumps(command).encode()
    # Held back until there is a process to pass them on to.
    signals = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(address)
        socket.send_fds(server, [len(data).to_bytes(8, "big")], [0, 1, 2])
        server.sendall(data)
        answers = server.makefile()
        process = int(answers.readline())
        if not process:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
            os.execv(python, [python, *arguments])
        for number in signals:
            signal.signal(number, lambda number, _: os.kill(process, number))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
        status = int(answers.readline())
    if status < 0:
        if -status != signal.SIGKILL:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


if __name__ == "__main__":
    main(*sys.argv[1:])
