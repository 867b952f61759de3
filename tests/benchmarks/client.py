"""The parent's end of a worker: start it, ask it, and replace it when it hangs or dies."""

from __future__ import annotations

import json
import os
import select
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
Answer = dict[str, Any]
RETURN_MEMORY_AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""For glibc: without these, what it keeps of freed memory blurs the figures by tens of MiB (and with them, time)."""


@dataclass(frozen=True)
class Setting:
    """What holds for all workers.

    Attributes:
        device: Device of the computations.
        dtype: Dtype of parameters and data.
        tf32: Whether a GPU may use TF32.
        gib: Limit of the address space, 0 for none.
        timeout: Seconds after which a call is given up.
    """

    device: str
    dtype: str
    tf32: bool
    gib: float
    timeout: float


class Client:
    """Talks with a worker of one environment and starts another one when it is lost."""

    def __init__(self, label: str, python: str, setting: Setting, threads: int, for_memory: bool = False) -> None:
        """Start a worker; ``python`` is the interpreter of its environment."""
        self.label = label
        self.timeout = setting.timeout
        arguments = [setting.device, setting.dtype, str(threads), str(setting.gib), str(int(setting.tf32))]
        self._command = [python, str(Path(__file__).with_name("worker.py")), *arguments]
        self._environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        if for_memory:
            self._environment |= RETURN_MEMORY_AT_ONCE
        self._setup: Answer | None = None
        self.hello = self._start()

    def ask(self, command: str, **arguments: Any) -> Answer:
        """Send one request and wait for its answer; no answer in time, or none at all, is an error in the answer."""
        request = {"command": command, **arguments}
        if command == "setup":
            self._setup = request
        answer = self._exchange(request)
        if answer is None:
            lost = self._why_lost()
            self._start()
            if self._setup is not None:
                self._exchange(self._setup)
            return {"ok": False, "error": lost}
        return answer

    def close(self) -> None:
        """End the worker."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()

    def _start(self) -> Answer:
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=self._environment, text=True
        )
        answer = self._receive() or {"ok": False, "error": "the worker did not start"}
        if answer["ok"] and (Path(answer["location"]).parent == ROOT / "curvlinops") != (self.label == "ours"):
            answer = {"ok": False, "error": f"curvlinops comes from the wrong place: {answer['location']}"}
        return answer

    def _exchange(self, request: Answer) -> Answer | None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return None
        return self._receive()

    def _receive(self) -> Answer | None:
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], self.timeout)
        line = self._process.stdout.readline() if ready else ""
        return json.loads(line) if line else None

    def _why_lost(self) -> str:
        """End what is left of the worker and say whether it hung or died."""
        try:
            reason = f"the process ended with {self._process.wait(timeout=2)}"
        except subprocess.TimeoutExpired:
            reason = f"more than {self.timeout:g} s"
        self.close()
        return reason
