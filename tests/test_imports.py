"""Who imports whom, and what `import bilinear_ops` costs and brings along."""

import ast
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import bilinear_ops

PACKAGE = Path(bilinear_ops.__file__).parent
FILES = sorted({*PACKAGE.rglob("*.py"), *(PACKAGE / "kernels").rglob("*.py")})  # rglob does not follow the link

# What the files of each folder may import beside the standard library and their own folder. Modules at the top of the
# package are ops unless named here.
MAY_IMPORT = {
    "results": {"torch"},
    "kernels": {"torch", "triton", "bilinear_ops.results", "bilinear_ops.composite"},
    "reference": {"torch", "bilinear_ops.results"},  # the oracle imports nothing that it is to check
    "composite": {"torch", "bilinear_ops.results"},
    "ops": {
        "torch",
        "bilinear_ops.results",
        "bilinear_ops.reference",
        "bilinear_ops.composite",
        "bilinear_ops.kernels",
    },
    "nn": {"torch", "bilinear_ops.results", "bilinear_ops.ops"},
    "init": {"torch", "bilinear_ops.nn", "bilinear_ops.ops"},
    "analysis": {
        "torch",
        "tqdm",
        "bilinear_ops.results",
        "bilinear_ops.composite",
        "bilinear_ops.nn",
        "bilinear_ops.ops",
    },
    "testing": {"torch", "bilinear_ops.reference"},
}
ABOVE = {"__init__", "__main__", "_figures", "demo", "environment", "integrations", "plots"}  # anything but kernels
LAZY = {"triton", "bilinear_ops.kernels", "numpy", "mlxtend", "matplotlib", "tqdm", "transformers"}  # in functions only


def folder(module: str) -> str:
    """The row of the table for a module of ours: "bilinear_ops.kernels.tile" -> "kernels"."""
    name = (module.split(".") + ["__init__"])[1]
    return name if name in MAY_IMPORT or name in ABOVE else "ops"


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """(what is imported, at the top level?): third-party packages by name, ours as `bilinear_ops.<folder>`."""
    tree = ast.parse(path.read_text())
    top = set(ast.walk(tree)) - {n for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write imports out in full"
            whole = node.module == "bilinear_ops"  # `from bilinear_ops import nn` names modules
            names = [f"bilinear_ops.{a.name}" for a in node.names] if whole else [str(node.module)]
        else:
            continue
        for name in names:
            package = name.split(".")[0]
            if package not in sys.stdlib_module_names:
                yield (f"bilinear_ops.{folder(name)}" if package == "bilinear_ops" else package), node in top


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    module = ".".join(("bilinear_ops", *path.relative_to(PACKAGE).with_suffix("").parts))
    here = folder(module)
    for name, top in imports(path):
        allowed = MAY_IMPORT.get(here)
        if allowed is None:
            assert name != "bilinear_ops.kernels", f"{module} reaches past the ops"
            assert name not in ("tests", "bench", "kernels"), f"{module} imports {name}"
        else:
            assert name in allowed | {f"bilinear_ops.{here}"}, f"{here} must not import {name}: {module}"
        if here != "kernels":
            assert not (top and name in LAZY), f"{module} imports {name} before it is needed"


def run(code: str, **environment: str) -> str:
    """The output of a fresh interpreter on `code`."""
    env = {**os.environ, "PYTHONPATH": str(PACKAGE.parent), **environment}
    env.pop("PYTHONDONTWRITEBYTECODE", None)  # nobody compiles the package anew at each start
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_is_cheap_and_brings_nothing_along():
    """Processor time, the best of several starts: what the machine does meanwhile can only add to it."""
    code = """
        import json, sys, time, torch
        before, start = set(sys.modules), time.process_time()
        import bilinear_ops
        took = time.process_time() - start
        print(json.dumps([took, sorted(set(sys.modules) - before)]))
    """
    best = float("inf")
    for _ in range(5):
        took, added = json.loads(run(code))
        assert {name.split(".")[0] for name in added} - set(sys.stdlib_module_names) <= {"bilinear_ops", "torch"}, added
        assert not [name for name in added if name.startswith("torch._dynamo")]
        best = min(best, took)
        if best < 0.1:
            return
    pytest.fail(f"import bilinear_ops adds {1e3 * best:.0f} ms to import torch")


def test_works_without_triton():
    """Every public name, gradients and the report, where triton cannot be imported."""
    out = run(
        """
        import sys

        sys.modules["triton"] = None  # found nowhere, and an error to import
        import torch
        import bilinear_ops as bo
        from bilinear_ops import environment

        for name in bo.__all__:
            getattr(bo, name)
        layer = bo.nn.GatedMLP(6, 8, activation="swish", bias=True)
        layer(torch.randn(3, 6, requires_grad=True)).sum().backward()
        assert layer.v.grad.isfinite().all()
        try:
            bo.gated_bilinear(torch.randn(3, 6), layer.w, layer.v, impl="triton")
        except RuntimeError as error:
            print(error)
        print(environment.report()["implementations"]["gated_mlp"]["cpu"]["why"])
        """,
        TRITON_INTERPRET="1",
    )
    assert out.splitlines() == [
        'impl="triton" cannot run: triton is not installed',
        "triton is not installed",
    ]


def test_a_missing_library_is_named(monkeypatch):
    """Our own folder `kernels` has the name of the library."""
    monkeypatch.setitem(sys.modules, "kernels.layer", None)
    with pytest.raises(ModuleNotFoundError, match="needs the library kernels: pip install kernels"):
        bilinear_ops.integrations.hub.mark(torch.nn.Linear(2, 3))


def test_a_module_of_ops_is_not_reloaded():
    """One clear error, and the op as it was."""
    program = """
        import importlib
        import torch
        import bilinear_ops as bo
        importlib.reload(bo)
        x, w, p = torch.randn(5, 4), torch.randn(6, 4), torch.randn(3, 6)
        before = bo.gated_mlp(x, w, w, p, impl="torch")
        for module in ("gated", "interaction.forms", "rank1.masked", "_op"):
            try:
                importlib.reload(importlib.import_module(f"bilinear_ops.{module}"))
            except RuntimeError as error:
                assert str(error).startswith("bilinear_ops.") and "cannot be reloaded" in str(error), error
            else:
                raise AssertionError(f"{module} was reloaded")
            assert torch.equal(bo.gated_mlp(x, w, w, p, impl="torch"), before)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True)
