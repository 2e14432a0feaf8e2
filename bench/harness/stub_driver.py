"""Triton's own launcher on a driver without a device, so that the host's part of a launch can be timed anywhere."""

from __future__ import annotations

import atexit
import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget

from bilinear_ops import _impl
from bilinear_ops.kernels import config, launching

SOURCE = Path(__file__).with_name("stub_driver.c")
TARGET = GPUTarget("cuda", 90, 32)


@contextmanager
def stubbed(processors: int) -> Iterator[Callable[[], int]]:
    """Within, kernels launch on CPU tensors as on an H100 with so many multiprocessors, and do nothing.

    The context is the number of launches so far. Raises RuntimeError where a CUDA driver is loaded already: it would be
    handed the addresses of CPU tensors.
    """
    folder, count = _loaded()
    properties = SimpleNamespace(major=9, minor=0, multi_processor_count=processors)
    _forget()
    try:
        with (
            mock.patch.dict(os.environ, TRITON_LIBCUDA_PATH=folder),
            mock.patch.object(torch.cuda, "get_device_properties", lambda device: properties),
            mock.patch.object(_impl, "why_not_triton", lambda t: None),
            mock.patch.object(triton.runtime.driver, "_active", _driver()),
        ):
            yield lambda: count.value
    finally:
        _forget()


def _forget() -> None:
    """What was found out of another device of the same name."""
    config._architecture.cache_clear()
    config.processors.cache_clear()
    launching.forget_plans()


@functools.cache
def _loaded() -> tuple[str, ctypes.c_int]:
    """Build the stub and load it under the name of the driver's library; its folder, and its count of launches."""
    if torch.cuda.is_available():
        raise RuntimeError("a CUDA driver is loaded: time the host without a stub there")
    folder = tempfile.mkdtemp(prefix="stub-driver-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    include = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    library = Path(folder) / "libcuda.so.1"
    options = ["-shared", "-fPIC", "-O2", "-Wl,-soname,libcuda.so.1", f"-I{include}"]
    subprocess.run([os.environ.get("CC", "cc"), *options, str(SOURCE), "-o", str(library)], check=True)
    return folder, ctypes.c_int.in_dll(ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL), "launches")


def _driver() -> object:
    from triton.backends.nvidia.driver import CudaDriver, CudaLauncher, CudaUtils

    class StubDriver(CudaDriver):
        def __init__(self) -> None:
            self.utils, self.launcher_cls = CudaUtils(), CudaLauncher

        def get_current_target(self) -> GPUTarget:
            return TARGET

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

    return StubDriver()
