"""Members as child processes, and a lighthouse among them; everything ends with the test."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

LIMIT_S = 60.0  # of any one answer
HERE = Path(__file__).parent


class Attendee:
    """One member: `begin` gives it a line to do, `end` waits for what came of it."""

    def __init__(self, addresses: str | Sequence[str], *, limits: dict[str, float] | None = None, **options: object):
        told = {"addresses": addresses, "host": "127.0.0.1", "limits": {"heartbeat_s": 1.0} | (limits or {})} | options
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "attendee.py"), json.dumps(told)], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.pid = self._process.pid
        self.said: list[str] = []
        self._answers: queue.Queue[dict] = queue.Queue()
        self._readers = [threading.Thread(target=read, daemon=True) for read in (self._read, self._listen)]
        for reader in self._readers:
            reader.start()

    def ready(self) -> Attendee:
        told = self.end()
        self.name, self.standby = told["name"], told["standby"]
        return self

    def begin(self, line: str) -> None:
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def end(self) -> dict:
        try:
            return self._answers.get(timeout=LIMIT_S)
        except queue.Empty:
            raise AssertionError("no answer: " + "".join(self.said)[-3000:]) from None

    def do(self, line: str) -> dict:
        self.begin(line)
        return self.end()

    def busy(self) -> bool:
        return self._answers.empty()

    def kill(self, kind: int = signal.SIGKILL) -> None:
        os.kill(self.pid, kind)

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
        for reader in self._readers:
            reader.join()

    def _read(self) -> None:
        for line in self._process.stdout:
            self._answers.put(json.loads(line))

    def _listen(self) -> None:
        for line in self._process.stderr:
            self.said.append(line)


def all_do(members: Sequence[Attendee], line: str) -> list[dict]:
    for member in members:
        member.begin(line)
    return [member.end() for member in members]
