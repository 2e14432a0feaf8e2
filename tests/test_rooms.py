"""One name in every room: an op's specification, composite, kernel, test and bench are found by its module's name."""

import importlib
import inspect
import pkgutil
import sys
from pathlib import Path

import pytest

import bench
import bilinear_ops as bo
from bilinear_ops import composite, environment, interaction, kernels, rank1, reference

ROOT = Path(bo.__file__).parents[1]
FAMILIES = {"interaction": interaction, "rank1": rank1}
SHARED = {  # what the families of a room share
    composite: {"blockwise", "limits"},
    kernels: {"activation", "config", "few_rows", "gated_hopper", "launching", "records", "tile", "tuning"}
    | {f"{family}_tiles" for family in ("gated", *FAMILIES)},
}


def modules(package):
    """The modules of a package, itself among them; kernels/ has no __init__ and is found by its folder."""
    yield package
    for found in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if found.name.endswith("__main__"):
            continue
        yield importlib.import_module(found.name)


def rooms(package):
    """The op modules of a room, "gated" and "family/module"."""
    (folder,) = {Path(p).resolve() for p in package.__path__}
    files = [folder / "gated.py", *(f for family in FAMILIES for f in (folder / family).glob("*.py"))]
    return {str(f.relative_to(folder).with_suffix("")) for f in files if f.name != "__init__.py" and f.exists()}


OPS = rooms(bo)


def test_ops_are_listed():
    assert OPS >= {"gated", "interaction/matrices", "rank1/masked"} and len(OPS) == 13


def test_every_op_module_has_a_specification():
    assert rooms(reference) == OPS


@pytest.mark.parametrize("room", SHARED, ids=lambda room: room.__name__)
def test_other_rooms_use_the_names_of_the_ops(room):
    (folder,) = {Path(p).resolve() for p in room.__path__}
    assert {f.stem for f in folder.glob("*.py")} - {"__init__"} == {"gated"} | SHARED[room]
    assert {f.name for f in folder.iterdir() if f.is_dir()} - {"__pycache__"} == set(FAMILIES)
    assert {"gated", "interaction/matrices", "rank1/masked"} <= rooms(room)
    assert {module.removesuffix("_backward") for module in rooms(room)} <= OPS  # a long backward has a file of its own


@pytest.mark.parametrize("module", sorted(OPS))
def test_every_op_module_has_a_test(module):
    assert (ROOT / "tests" / f"test_{module.replace('/', '_')}.py").exists()


@pytest.mark.parametrize("family", ("gated", *FAMILIES))
def test_every_family_has_a_bench(family):
    assert (ROOT / "bench" / f"bench_{family}.py").exists()


@pytest.mark.parametrize("name", sorted(environment.public_ops()))
def test_an_op_and_its_specification_live_in_modules_of_one_name(name):
    """A top-level op has a reference twin; `analysis` is built from ops and has none."""
    twin = getattr(reference, name)
    assert inspect.getmodule(inspect.unwrap(twin)).__name__.removeprefix(
        "bilinear_ops.reference."
    ) == inspect.getmodule(inspect.unwrap(environment.public_ops()[name])).__name__.removeprefix("bilinear_ops.")


@pytest.mark.parametrize("name", sorted(environment.public_ops()))
def test_an_op_and_its_specification_have_the_same_defaults(name):
    ours, twin = (
        {p.name: (p.default, p.kind) for p in inspect.signature(inspect.unwrap(f)).parameters.values()}
        for f in (environment.public_ops()[name], getattr(reference, name))
    )
    shared = ours.keys() & twin.keys()
    assert shared and {key: ours[key] for key in shared} == {key: twin[key] for key in shared}
    assert [key for key in twin if key not in ours] == [], "what the specification takes"


def test_no_module_is_named_like_a_function_or_a_standard_module():
    """Of its own, or of the package that it belongs to."""
    found = [m for package in (bo, kernels, bench) for m in modules(package)]
    assert len(found) > 60
    for module in found:
        package, _, name = module.__name__.rpartition(".")
        assert name not in sys.stdlib_module_names, module.__name__
        for owner in filter(None, (module, sys.modules.get(package))):
            assert not inspect.isfunction(vars(owner).get(name)), f"{module.__name__} is also a function"
