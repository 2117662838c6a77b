"""A `python` for tests that start the engine many times: it forks a process that has imported the libraries already.

Only libraries are shared. Each start imports `engine` and `kernels` from its own PYTHONPATH, with its own environment, folder
and output. Importing the libraries took three quarters of a short command.
"""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import socket
import subprocess
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LIBRARIES = ("torch", "safetensors.torch", "numba", "pandas", "pyarrow.dataset", "duckdb", "hydra", "jinja2")
FIRST = ["-P", "-m", "engine"]  # what may be forked, with compilation off; all else is the real interpreter's
CLIENT = """#!{python} -IS
import json, os, socket, sys
if sys.argv[1:4] != {first} or os.environ.get("NUMBA_DISABLE_JIT") != "1":
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    text = json.dumps([sys.argv[0], sys.argv[4:], os.getcwd(), dict(os.environ)]).encode()
    socket.send_fds(server, [len(text).to_bytes(8, "big")], [1, 2])
    server.sendall(text)
    code = server.recv(1)
sys.exit(code[0] if code else 70)
"""


@contextlib.contextmanager
def interpreter(folder: Path) -> Iterator[Path]:
    """The path of the program, while the process that it forks lives. `folder` must have a short name."""
    address = str(folder / "server")
    program = folder / "python"
    program.write_text(CLIENT.format(python=sys.executable, first=FIRST, address=address))
    program.chmod(0o755)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(address)
        listening.listen()
        server = subprocess.Popen(
            [sys.executable, "-P", __file__, str(listening.fileno())],
            pass_fds=[listening.fileno()],
            env={**os.environ, "NUMBA_DISABLE_JIT": "1"},
        )
        try:
            yield program
        finally:
            server.terminate()
            server.wait()


def serve(listening: socket.socket) -> None:
    """Each start in a fork of this process."""
    for name in LIBRARIES:
        __import__(name)
    libraries = list(sys.path)
    while True:
        asking, _ = listening.accept()
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:  # those that have waited for a start
                pass
        with asking:
            length, descriptors, _, _ = socket.recv_fds(asking, 8, 2)
            text = b""
            while len(text) < int.from_bytes(length, "big"):
                text += asking.recv(1 << 16)
            if os.fork() == 0:  # waits for the start, which may itself ask for another one
                child = os.fork()
                if child == 0:
                    os._exit(start(json.loads(text), descriptors, libraries))
                asking.sendall(bytes([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) % 256]))
                os._exit(0)
            for descriptor in descriptors:
                os.close(descriptor)


def start(asked: list[Any], descriptors: list[int], libraries: list[str]) -> int:
    """`python -P -m engine` with these words, in this folder and environment; its exit code."""
    program, words, folder, variables = asked
    for place, descriptor in enumerate(descriptors, 1):
        os.dup2(descriptor, place)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(variables)
    sys.executable = program
    sys.argv = ["engine", *words]
    sys.path[:] = [*filter(None, variables.get("PYTHONPATH", "").split(os.pathsep)), *libraries]
    try:
        runpy.run_module("engine", run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else int(left.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
