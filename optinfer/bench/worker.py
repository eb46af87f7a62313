"""A peer that needs other versions than the course: in an environment and a process of its own, asked in lines of JSON."""

import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any


def environment_of(name: str, variable: str) -> str | None:
    """The python of a peer's environment, named by an environment variable; None, and said so, where it is not set."""
    if python := os.environ.get(variable):
        return python
    print(f"{name}: skipped, {variable} names no python")
    return None


class Worker:
    """A script of this folder, run by another python. It waits while others are measured.

    Args:
        name: the peer's, for errors.
        script: prints a line with its ``version``, then a line of JSON for each that it reads.

    Raises RuntimeError if it does not start or breaks off; the end of its log is in the message.
    """

    def __init__(self, name: str, python: str, script: str, *arguments: str):
        self._name = name
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed in `close`)
        command = [python, str(Path(__file__).parent / script), *arguments]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True
        )
        self.version = self._answer()["version"]

    def ask(self, question: object) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """Ask it to end, by the end of its input, so that it leaves nothing behind; end it where it does not."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            raise RuntimeError(f"{self._name} broke off:\n{self._log.read()[-3000:]}")
        return json.loads(line)
