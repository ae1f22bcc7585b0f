"""A real Ray cluster of this machine, with token authentication."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.preprocess.tasks import wait_until

CPUS = 2


class Driver(subprocess.Popen[str]):
    """Ends with a test that fails, instead of being waited for."""

    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> None:
        if kind is not None:
            self.kill()
        super().__exit__(kind, *rest)


class Cluster:
    """`ray start` with a token, in a process group and a folder of its own."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))  # paths of sockets must be short
        (self.folder / "token").write_text(secrets.token_hex(32))
        self.no_token = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        self.no_token |= {"HOME": str(self.folder), "PYTHONPATH": os.pathsep.join(sys.path)}
        self.environment = self.no_token | {"RAY_AUTH_TOKEN_PATH": str(self.folder / "token")}
        command = (
            f"start --head --block --port=0 --num-cpus={CPUS} --include-dashboard=false --disable-usage-stats "
            f"--object-store-memory=80000000 --temp-dir={self.folder}/ray"
        )
        # tasks have one thread, whatever the nodes have
        of_nodes = {"RAY_AUTH_MODE": "token", "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0", "OMP_NUM_THREADS": "3"}
        with (self.folder / "log").open("w") as log:
            self.head = subprocess.Popen(
                [Path(sys.executable).with_name("ray"), *command.split()],
                env=self.environment | of_nodes,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            # the address is the last of what it says, and comes a moment after "Ray runtime started"
            wait_until(lambda: "--address='" in self.log.rpartition("'")[0] or self.head.poll() is not None, seconds=120)
            self.address = self.log.split("--address='")[1].split("'")[0]
        except BaseException:
            print(self.log)
            self.end()
            raise

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()

    def end(self) -> None:
        self.head.terminate()
        try:
            self.head.wait(timeout=60)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(self.head.pid, signal.SIGKILL)
            shutil.rmtree(self.folder, ignore_errors=True)

    def start(self, script: str, *args: object, **environment: str) -> Driver:
        """A driver in a process of its own; it has the token unless told otherwise."""
        command = [sys.executable, "-c", script, self.address, *map(str, args)]
        return Driver(command, env=environment or self.environment, stderr=subprocess.PIPE, text=True)
