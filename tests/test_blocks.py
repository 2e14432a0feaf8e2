"""Loops over blocks: values and gradients where every loop takes several."""

import ast
import re
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
from op_cases import CASES, double, layer

import bilinear_ops as bo
from bilinear_ops.composite import blockwise
from bilinear_ops.composite.interaction import forms
from bilinear_ops.composite.limits import Limits, limits
from bilinear_ops.testing import gradients

ROOT = Path(bo.__file__).parent
ROOMS = ("composite", "interaction", "rank1", "analysis", "gated.py", "_gated_backward.py")
CUTS = ("blocks", "_activations")  # the functions that cut a range into blocks, one `for` each


@pytest.fixture
def taken(monkeypatch, small_limits):
    """The most blocks that each loop took, by its file and line, under limits of a few elements."""
    most: Counter[str] = Counter()

    def counted(cut):
        def wrapper(*args, **options):
            frame = sys._getframe(1)
            while frame.f_code.co_name in ("<listcomp>", "<genexpr>"):
                frame = frame.f_back
            place = f"{Path(frame.f_code.co_filename).relative_to(ROOT)}:{frame.f_lineno}"
            return numbered(place, cut(*args, **options))

        return wrapper

    def numbered(place, ranges):
        for number, item in enumerate(ranges, 1):
            most[place] = max(most[place], number)
            yield item

    blocks = blockwise.blocks
    for name, module in list(sys.modules.items()):
        if name.startswith("bilinear_ops.") and vars(module).get("blocks") is blocks:
            monkeypatch.setattr(module, "blocks", counted(blocks))
    monkeypatch.setattr(forms, "_activations", counted(forms._activations))
    return most


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_over_several_blocks(case, taken):
    f, tensors = CASES[case]
    dy = torch.randn_like(f(bo.reference, *tensors))
    ours, expected = (gradients(partial(f, module), tensors, dy) for module in (bo, bo.reference))
    for got, gold in zip(ours, expected, strict=True):
        torch.testing.assert_close(got, gold, rtol=1e-10, atol=1e-10)
    assert max(taken.values()) >= 2, taken


def moments(basis):
    w, v, c = layer()
    found = bo.interaction_moments(w, v, c, basis=basis)
    return zip(found, bo.reference.interaction_moments(w, v, c, basis=basis), strict=True)


@pytest.mark.parametrize("basis", (None, double(5, 7)), ids=("inputs", "features"))
def test_moments_over_several_blocks(basis, taken):
    for got, gold in moments(basis):
        torch.testing.assert_close(got, gold, rtol=1e-10, atol=1e-10)
    assert max(taken.values()) >= 2, taken


def analyses():
    """What the analyses with blocks of their own find."""
    torch.manual_seed(0)
    w, v, c = layer(outputs=4)
    x, target, p = double(9, 5), double(9, 4), double(4, 6)
    eig = bo.analysis.interaction_eigh(w, v, c, 3, method="dense")
    active = torch.arange(18).view(9, 2) % 4
    yield from bo.analysis.truncation_correlation(x, eig, active, target[:, :2])
    yield bo.analysis.truncation_curve(x, eig, target)
    yield bo.analysis.layer_distance(w, v, p, w + 1, v, p)
    yield from bo.analysis.best_quadratic(w, v, p, "relu")


def test_analyses_over_several_blocks(taken):
    with pytest.MonkeyPatch.context() as patch:
        for name, size in vars(Limits()).items():
            patch.setattr(limits, name, size)
        expected = list(analyses())
        assert not any(place.startswith("analysis") and most > 1 for place, most in taken.items())
    for got, gold in zip(analyses(), expected, strict=True):
        torch.testing.assert_close(got, gold, rtol=1e-9, atol=1e-9)
    assert max(most for place, most in taken.items() if place.startswith("analysis")) >= 2, taken


def loops():
    """Where the composites and the analyses cut a range, as `taken` counts it."""
    for path in sorted([*(ROOT / "composite").rglob("*.py"), *(ROOT / "analysis").rglob("*.py")]):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in CUTS:
                yield f"{path.relative_to(ROOT)}:{node.lineno}"


def test_every_loop_takes_several_blocks(taken):
    for f, tensors in CASES.values():
        y = f(bo, *(t.detach().requires_grad_() for t in tensors))
        y.sum().backward()
    moments(double(5, 7))
    list(analyses())
    w, v = layer()[:2]
    bo.analysis.best_quadratic(w, v, double(4, 6), "silu", error=0.5)  # what it draws depends on the blocks
    assert len(set(loops())) > 20
    assert {place: taken[place] for place in loops() if taken[place] < 2} == {}


def size_constants(source):
    """Names of module-level constants that look like sizes of blocks, and of functions with such a default."""
    tree = ast.parse(source)
    for node in tree.body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None and _is_size(node.value, 64):
            yield ast.unparse(node.targets[0] if isinstance(node, ast.Assign) else node.target)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            defaults = [d for d in (*node.args.defaults, *node.args.kw_defaults) if d is not None]
            if any(_is_size(d, 1024) for d in defaults):
                yield node.name


def _is_size(value, least):
    """Whether an expression of integers alone is a shift, or holds an integer so large."""
    nodes = list(ast.walk(value))
    if not all(isinstance(n, ast.Constant | ast.BinOp | ast.operator) for n in nodes):
        return False
    constants = [n.value for n in nodes if isinstance(n, ast.Constant)]
    if not all(type(c) is int for c in constants):
        return False
    return any(isinstance(n, ast.LShift) for n in nodes) or max(constants) >= least


# sizes of no block: climbs, quadrature, looks, words of a generator, costs, bits, an option of `interaction_eigh`
OTHER = set(
    "interaction_eigh SAMPLES SEEDS RESTARTS NODES MOST_LOOKS GOLDEN MIX_1 MIX_2 UPPER GATHER_COST COPY_COST "
    "MOST_FEATURES".split()
)


def test_sizes_stand_in_the_record_alone():
    files = [f for room in ROOMS for f in ([ROOT / room] if room.endswith(".py") else (ROOT / room).rglob("*.py"))]
    assert len(files) > 30
    found = {f"{f.relative_to(ROOT)}: {name}" for f in files for name in size_constants(f.read_text())}
    assert {place for place in found if place.partition(": ")[2] not in OTHER} == set()
    assert list(size_constants("A = 1 << 3\nB: int = 4096\nC = 2.0\nD = 5\ndef f(n=1 << 20): pass")) == ["A", "B", "f"]


def test_the_record_holds_numbers_only():
    assert all(type(size) is int for size in vars(Limits()).values())


def test_sizes_are_as_large_as_their_comments_say():
    source = (ROOT / "composite/limits.py").read_text()
    said = re.findall(r"^    (\w+): int = .* # .*?(\d+) Mi?B in fp32", source, re.M)
    assert len(said) >= 7
    assert {name: 4 * getattr(Limits(), name) for name, _ in said} == {name: int(size) << 20 for name, size in said}
