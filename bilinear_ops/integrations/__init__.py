"""The ops inside other libraries. Each module is imported when it is first named, and its library not even then."""

import importlib
from types import ModuleType

__all__ = ["distributed", "hub", "parameter_decomposition", "transformers"]


def __getattr__(name: str) -> ModuleType:
    if name in __all__:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
