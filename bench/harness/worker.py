"""A worker process that can be killed and restarted: a kernel fault or a hang costs one call, not the run."""

from __future__ import annotations

import multiprocessing
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any


class DeviceLost(RuntimeError):
    """A CUDA error after which every later call in the process fails; `contender` ran when it appeared."""

    def __init__(self, contender: str, why: str):
        super().__init__(contender, why)
        self.contender, self.why = contender, why

    def __str__(self) -> str:
        return f"{self.contender}: {self.why}"


def synchronise() -> None:
    """Wait for the GPU, if this process uses one. Raises what earlier launches left, here or for good."""
    torch = sys.modules.get("torch")  # a process that has not imported it has nothing to wait for
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize()


class Worker:
    """Calls module-level functions in another process; restarts the process after a crash, a hang or a CUDA error."""

    def __init__(self) -> None:
        self._process: Any = None
        self._pipe: Any = None

    def ask(self, timeout: float, function: Callable[..., Any], *arguments: Any) -> Any:
        """Return function(*arguments).

        Raises RuntimeError if the function raises or its process dies, DeviceLost as it is, and TimeoutError after
        `timeout` seconds.
        """
        if self._process is None:
            context = multiprocessing.get_context("spawn")
            self._pipe, theirs = context.Pipe()
            self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
            self._process.start()
            theirs.close()
        self._pipe.send((function, arguments))
        if not self._pipe.poll(max(timeout, 0)):
            self.stop()
            raise TimeoutError(f"no answer within {timeout:.0f} s")
        try:
            answer, error, usable = self._pipe.recv()
        except (EOFError, OSError) as gone:
            self.stop()
            raise RuntimeError("the process died") from gone
        if not usable:
            self.stop()
        if error is not None:
            raise error
        return answer

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
        answer, error, usable = None, None, True
        try:
            answer = function(*arguments)
            synchronise()  # an error of these launches must not be blamed on the next call
        except Exception as raised:
            traceback.print_exc()
            lost = isinstance(raised, DeviceLost)
            error = raised if lost else RuntimeError(f"{type(raised).__name__}: {str(raised).strip()}")
            usable = not lost and _usable()
        pipe.send((answer, error, usable))


def _usable() -> bool:
    """Whether the GPU still works in this process."""
    try:
        synchronise()
    except Exception:
        return False
    return True
