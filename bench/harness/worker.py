"""A worker process that can be killed and restarted: a kernel fault or a hang costs one call, not the run."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any


class Worker:
    """Calls module-level functions in another process; restarts the process after a crash, a hang or a CUDA error."""

    def __init__(self) -> None:
        self._process: Any = None
        self._pipe: Any = None

    def ask(self, timeout: float, function: Callable[..., Any], *arguments: Any) -> Any:
        """Return function(*arguments). Raises RuntimeError if it raises, dies or exceeds `timeout` seconds."""
        if self._process is None:
            context = multiprocessing.get_context("spawn")
            self._pipe, theirs = context.Pipe()
            self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
            self._process.start()
            theirs.close()
        self._pipe.send((function, arguments))
        try:
            if not self._pipe.poll(max(timeout, 0)):
                raise RuntimeError(f"no answer within {timeout:.0f} s")
            right, found = self._pipe.recv()
        except (EOFError, OSError, RuntimeError) as error:
            self.stop()
            raise RuntimeError(str(error) or "the process died") from error
        if not right:
            if "CUDA error" in found or "HIP error" in found:  # the error is sticky: every later call would fail
                self.stop()
            raise RuntimeError(found)
        return found

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._pipe.close()
            self._process = None


def _serve(pipe: Connection) -> None:
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return
        try:
            answer = (True, function(*arguments))
        except Exception as error:
            traceback.print_exc()
            answer = (False, f"{type(error).__name__}: {str(error).strip()}")
        pipe.send(answer)
