"""The suite runs on any machine: kernels are interpreted unless GPU tests alone are asked for."""

import os
from collections import defaultdict
from collections.abc import Generator
from typing import Any

# a backward traced before a change of our ops' schemas would be replayed
os.environ["TORCHINDUCTOR_AUTOGRAD_CACHE"] = "0"

import pytest
import torch

from bilinear_ops.composite.limits import limits

torch.set_num_threads(1)


def interprets(expression: str) -> bool:
    """Whether tests that need no GPU are selected, or none that need one: not so for `-m "gpu and not slow"`."""

    def selects(**marks: bool) -> bool:
        return bool(eval(expression or "True", {"__builtins__": {}}, defaultdict(bool, marks)))

    return selects() or not selects(gpu=True)


def pytest_configure(config: pytest.Config) -> None:
    if interprets(config.option.markexpr):
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
        patch_once_a_launch()


def patch_once_a_launch() -> None:
    """Patch `triton.language` once a launch, where the interpreter does so at every call of a device function.

    A launch undoes its own patches when it ends, so the next one starts anew.
    """
    try:
        from triton.runtime import interpreter
    except ModuleNotFoundError:
        return
    patched: set[tuple[str, ...]] = set()
    launch, patch = interpreter.GridExecutor.__call__, interpreter._patch_lang
    languages = (interpreter.tl, interpreter.tl.core)

    def launched(self: Any, *args: Any, **options: Any) -> Any:
        patched.clear()
        return launch(self, *args, **options)

    def called(self: Any, *args: Any, **options: Any) -> Any:
        names = tuple(name for name, module in self.fn.__globals__.items() if any(module is t for t in languages))
        if names not in patched:
            patch(self.fn)
            patched.add(names)
        return self.rewrite()(*args, **options)

    interpreter.GridExecutor.__call__, interpreter.InterpretedFunction.__call__ = launched, called


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """A GPU test launches a kernel on the device, or fails."""
    if item.get_closest_marker("gpu") is None:
        return (yield)
    from triton import knobs

    assert not knobs.runtime.interpret, 'GPU tests need `-m gpu` or `-m "gpu and not slow"`: this session interprets'
    launches: list[object] = []
    knobs.runtime.launch_enter_hook.add(launches.append)
    try:
        result = yield
    finally:
        knobs.runtime.launch_enter_hook.remove(launches.append)
    assert launches, "no kernel was launched on the device"
    return result


@pytest.fixture(autouse=True)
def _ops_even_where_eager_is_faster(monkeypatch):
    """The tests' layers are small: without this most would compare eager PyTorch with itself."""
    monkeypatch.setattr(limits, "small_on_cpu", -1)
    monkeypatch.setattr(limits, "kept_masks", -1)
    monkeypatch.setattr(limits, "at_once", -1)


@pytest.fixture(autouse=True)
def _deterministic():
    """Fixed numbers, and NaN in every fresh `torch.empty`, so that what is not written shows."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def small_limits(monkeypatch):
    """Blocks of a few elements, so that the loops of a small test run several times."""
    sizes = {
        "block": 12, "cached_bytes": 100, "gradient_bytes": 1, "gradient_rows": 3, "khatri_rao": 30, "pair_rows": 2,
        "product": 12, "loop_max": 3, "scores": 24, "matrices": 110, "candidates": 2, "at_once": -1, "features": 0,
        "sorted": 24, "eigenvectors": 8, "neurons": 2, "gram_neurons": 2, "draws": 6, "device_draws": 6, "slab": 24,
        "band": 10, "active_rows": 20, "kept_masks": -1, "ranked": 110,
        "gate_elements": 8, "gate_columns": 4,
        "small_on_cpu": -1,
    }  # fmt: skip
    assert sizes.keys() == vars(limits).keys()
    for name, size in sizes.items():
        monkeypatch.setattr(limits, name, size)
