"""Forks processes that run Python commands without importing torch and its friends anew.

`python warm_server.py SOCKET` imports them once. Each request on the socket is a command with its
environment, working folder and standard streams; the fork runs it as `python` would and ends as
`python` does. See `warm_client.py`, which asks, and `waiting.py`, which starts it.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

IMPORTED = (
    *("accelerate", "matplotlib.pyplot", "pandas", "peft", "safetensors.torch", "tensorboard"),
    *("torch", "torch.distributed.run", "torch.utils.tensorboard"),
    *("torch.distributed.fsdp", "torch.distributed.tensor"),  # `torch.testing` imports the latter
    *("diffusers.loaders.peft", "diffusers.models.autoencoders.autoencoder_kl"),
    *("diffusers.models.transformers.transformer_sd3", "diffusers.schedulers"),
    "diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3",
    *("transformers.models.clip.modeling_clip", "transformers.models.t5.modeling_t5"),
    *("transformers.models.llama.modeling_llama", "transformers.generation.utils"),
    *("rapidocr", "rapidocr.main", "cv2", "onnxruntime"),
    *("diffusers.guiders", "pydantic"),
)
# Variables that are read when something is imported. With others a command is not run here.
READ_AT_IMPORT = ("ATEN_", "CUDA_", "DNNL_", "HF_", "HOME", "KMP_", "MKL_", "MPL", "OMP_")
READ_AT_IMPORT += ("ONEDNN_", "OPENBLAS_", "PYTHON", "TORCH_", "TRANSFORMERS_", "XDG_")


def read_at_import(environment: dict[str, str]) -> dict[str, str]:
    """Of an environment, what this process could no longer follow."""
    followed = ("PYTHONPATH", "TORCH_NCCL", "TORCHELASTIC")
    return {
        name: value
        for name, value in environment.items()
        if name.startswith(READ_AT_IMPORT) and not name.startswith(followed)
    }


def receive(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """A command (`argv`, `cwd`, `env`, `python`) and its three standard streams."""
    size, streams, _, _ = socket.recv_fds(connection, 8, 3)
    wanted = int.from_bytes(size, "big")
    data = b""
    while len(data) < wanted and (part := connection.recv(wanted - len(data))):
        data += part
    return json.loads(data), streams


def serve(address: str) -> dict[str, Any]:
    """Forks for each request until the parent is gone; returns in the fork, with its command."""
    own = read_at_import(dict(os.environ))
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    woken, wake = socket.socketpair()
    woken.setblocking(False)
    wake.setblocking(False)
    signal.set_wakeup_fd(wake.fileno())
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal is meant for the tests
    selector = selectors.DefaultSelector()
    for waiting in (listener, woken, sys.stdin):
        selector.register(waiting, selectors.EVENT_READ)
    clients: dict[int, socket.socket] = {}  # by process
    while True:
        for key, _ in selector.select():
            if key.fileobj is sys.stdin:  # the parent has ended
                for process in clients:
                    os.kill(process, signal.SIGKILL)
                os._exit(0)
            elif key.fileobj is listener:
                client, _ = listener.accept()
                command, streams = receive(client)
                if read_at_import(command["env"]) != own:
                    client.sendall(b"0\n")
                    client.close()
                elif process := os.fork():
                    client.sendall(f"{process}\n".encode())
                    clients[process] = client
                    selector.register(client, selectors.EVENT_READ, process)
                else:
                    signal.set_wakeup_fd(-1)
                    for number in (signal.SIGCHLD, signal.SIGINT):
                        signal.signal(number, signal.SIG_DFL)
                    signal.signal(signal.SIGINT, signal.default_int_handler)
                    selector.close()
                    for open_socket in (listener, woken, wake, client, *clients.values()):
                        open_socket.close()
                    for number, stream in enumerate(streams):
                        os.dup2(stream, number)
                        os.close(stream)
                    return command
                for stream in streams:
                    os.close(stream)
            elif key.fileobj is woken:
                woken.recv(4096)
                for process in list(clients):
                    ended, status = os.waitpid(process, os.WNOHANG)
                    if ended:
                        client = clients.pop(process)
                        selector.unregister(client)
                        with contextlib.suppress(BrokenPipeError):  # the client was killed
                            client.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
                        client.close()
            elif key.data in clients:  # a client says nothing more: it was killed
                os.kill(key.data, signal.SIGKILL)


def run(command: dict[str, Any], path: list[str]) -> None:
    """Does what `python` does with a command line."""
    os.environ.clear()
    os.environ.update(command["env"])
    os.chdir(command["cwd"])
    os.setpgid(0, 0)  # a signal to the client's group comes once, from the client
    sys.executable = command["python"]
    arguments = command["argv"]
    if arguments[0] == "-u":
        sys.stdout.reconfigure(write_through=True)
        arguments = arguments[1:]
    safe = arguments[0] == "-P"
    arguments = arguments[safe:]
    what, rest = arguments[0], arguments[1:]
    if what in ("-c", "-m"):
        what, rest = arguments[1], arguments[2:]
    sys.argv = [what if arguments[0] != "-c" else "-c", *rest]
    first = os.path.dirname(os.path.abspath(what)) if arguments[0] == what else ""
    asked = [folder for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep) if folder]
    sys.path[:] = [*([] if safe else [first]), *asked, *path]
    if arguments[0] == "-c":
        main = type(sys)("__main__")
        sys.modules["__main__"] = main
        exec(compile(what, "<string>", "exec"), main.__dict__)
    elif arguments[0] == "-m":
        sys.path[:1] = sys.path[:1] if safe else [os.getcwd()]
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(what, run_name="__main__")


def end(command: dict[str, Any], path: list[str]) -> None:
    """Runs, and ends the process without the seconds in which Python takes apart its modules."""
    status = 0
    try:
        run(command, path)
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if not isinstance(stop.code, int | None):
            print(stop.code, file=sys.stderr)
    except KeyboardInterrupt:
        traceback.print_exc()
        status = -signal.SIGINT
    except BaseException:  # as Python itself
        traceback.print_exc()
        status = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status & 255)


if __name__ == "__main__":
    here = sys.path[1:]
    gc.disable()  # a tenth of the time of importing, and it finds nothing
    try:
        for name in IMPORTED:
            importlib.import_module(name)
        # It compiles a thousand patterns when it is first asked.
        mapping = importlib.import_module("transformers.conversion_mapping")
        mapping.get_checkpoint_conversion_mapping("")
    except BaseException:  # whoever waits may be no parent that could ask how this process is
        Path(sys.argv[1]).with_name("failed").touch()
        raise
    gc.freeze()  # no collection in a fork looks at what it shares, which would copy it
    gc.enable()
    end(serve(sys.argv[1]), here)
