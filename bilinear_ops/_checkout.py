"""Kernels in a source tree without symbolic links, where `bilinear_ops/kernels` is absent or a file that names them.

Archives and checkouts with core.symlinks=false are such trees, and so is an unpacked source distribution.
"""

import sys
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from pathlib import Path

NAME = "bilinear_ops.kernels"
PACKAGE = Path(__file__).resolve().parent


def find_kernels() -> None:
    """Make `bilinear_ops.kernels` importable; ImportError with the remedy where there is no folder of kernels."""
    if (PACKAGE / "kernels").is_dir() or NAME in sys.modules:
        return
    folder = PACKAGE.parent / "kernels"
    if not (folder / "gated.py").exists():
        raise ImportError(f"{NAME} is missing from {PACKAGE}: install the whole source tree, with `pip install .`")
    spec = ModuleSpec(NAME, None, is_package=True)
    spec.submodule_search_locations = [str(folder)]
    sys.modules[NAME] = module_from_spec(spec)
