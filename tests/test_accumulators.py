"""No loop of a kernel adds two products to one accumulator.

On tcgen05 (sm_100), Triton 3.6 to 3.8 compile such a loop to wrong results: github.com/triton-lang/triton/issues/10821.
The kernels' syntax trees are checked, with calls of their own functions replaced by the functions' bodies.
"""

import ast
import itertools
from pathlib import Path

import pytest

pytest.importorskip("triton")

from bilinear_ops.kernels import config

LOADED = ("arange", "full", "load", "zeros")  # of tl: their results share storage with nothing


class Walk:
    """Follows storage through a function: a value is the set of names whose storage it may share.

    Sums share the storage of their terms, for the compiler makes a + dot(x, y) the accumulator of the product.
    """

    def __init__(self, functions):
        self.functions = functions
        self.merged = {}  # storage -> the storage that it was merged with
        self.loops = [[]]  # of each open loop: (line, storage, branches) of its dots; the first is outside loops
        self.branches = ()
        self.new = itertools.count()
        self.faults = []

    def function(self, definition, values):
        """Walk through a call; returns what the result may share storage with."""
        names = dict(zip((a.arg for a in definition.args.args), values, strict=False))
        return self.block(definition.body, names)

    def block(self, statements, names):
        returned = set()
        for statement in statements:
            match statement:
                case ast.For(body=body) | ast.While(body=body):
                    if isinstance(statement, ast.For) and "static_range" in ast.unparse(statement.iter):
                        returned |= self.block(body, names) | self.block(body, names)  # unrolled
                        continue
                    self.loops.append([])
                    returned |= self.block(body, names)
                    self.faults += self.shared(self.loops.pop())
                case ast.If(test=test, body=body, orelse=orelse):
                    self.value(test, names)
                    outside = self.branches
                    for taken, branch in enumerate((body, orelse)):
                        self.branches = (*outside, (id(statement), taken))
                        returned |= self.block(branch, names)
                    self.branches = outside
                case ast.Return(value=ast.AST() as value):
                    returned |= self.value(value, names)
                case ast.Assign(targets=[ast.Tuple(elts=targets)], value=ast.Tuple(elts=values)):
                    found = [self.value(v, names) for v in values]
                    names.update({ast.unparse(t): v for t, v in zip(targets, found, strict=True)})
                case ast.Assign(targets=[target], value=value):
                    found = self.value(value, names)
                    names.update(dict.fromkeys(map(ast.unparse, getattr(target, "elts", [target])), found))
                case ast.AugAssign(target=target, op=op, value=value):
                    names[ast.unparse(target)] = self.value(ast.BinOp(target, op, value), names)
                case _:
                    for child in ast.iter_child_nodes(statement):
                        self.value(child, names)
        return returned

    def value(self, node, names):
        """What a value may share storage with."""
        match node:
            case ast.Name(id="tl"):
                return set()  # a module: what its functions return is told apart below
            case ast.Name(id=name):
                return names.get(name, {name})
            case ast.Call(func=ast.Attribute(attr=name), args=args, keywords=keywords) if name.startswith("dot"):
                given = {k.arg: k.value for k in keywords} | dict(zip(("input", "other", "acc"), args, strict=False))
                values = {name: self.value(v, names) for name, v in given.items()}
                storage = values.get("acc") or {next(self.new)}
                self.loops[-1].append((node.lineno, storage, self.branches))
                return storage
            case ast.Call(func=ast.Name(id=name), args=args) if name in self.functions:
                return self.function(self.functions[name], [self.value(a, names) for a in args])
            case ast.Call(func=ast.Attribute(value=ast.Name(id="tl"), attr=name)) if name in LOADED:
                return {next(self.new)}
            case ast.BinOp(left=left, op=op, right=right):
                left, right = self.value(left, names), self.value(right, names)
                if isinstance(op, ast.Add):
                    for storage in right:
                        for other in left:
                            self.merge(storage, other)
                return left | right
            case _:
                return set().union(*(self.value(child, names) for child in ast.iter_child_nodes(node)))

    def merge(self, storage, other):
        if (a := self.root(storage)) != (b := self.root(other)):
            self.merged[a] = b

    def root(self, storage):
        while storage in self.merged:
            storage = self.merged[storage]
        return storage

    def shared(self, dots):
        """The pairs of dots that can run in one pass of a loop and share an accumulator."""
        for (line, one, here), (other_line, other, there) in itertools.combinations(dots, 2):
            exclusive = any(a == b and taken != other_taken for a, taken in here for b, other_taken in there)
            if not exclusive and {self.root(s) for s in one} & {self.root(s) for s in other}:
                yield f"lines {line} and {other_line}"


def functions(sources):
    """The functions that Triton compiles, by name."""
    found = (node for source in sources for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef))
    return {f.name: f for f in found if any("triton.jit" in ast.unparse(d) for d in f.decorator_list)}


def faults(compiled):
    """Of each function that has any, the pairs of products with one accumulator."""
    for name, definition in compiled.items():
        walk = Walk(compiled)
        walk.function(definition, [{a.arg} for a in definition.args.args])
        yield from (f"{name}: {fault}" for fault in walk.faults)


def test_no_loop_adds_two_products_to_one_accumulator():
    compiled = functions(path.read_text() for path in Path(config.__file__).parent.rglob("*.py"))
    assert set(config.KERNELS) <= set(compiled)
    assert not list(faults(compiled))


KERNEL = """
@triton.jit
def step(x, y, acc):
    return tl.dot(x, y, acc)

@triton.jit
def plain(x, y):
    return tl.dot(x.to(tl.float16), y)

@triton.jit
def kernel(x, w, v, TRANSPOSED: tl.constexpr):
    acc = tl.zeros((16, 16), tl.float32)
    other = tl.zeros((16, 16), tl.float32)
    for k in range(0, 64, 16):
{body}
    acc += other
"""
BROKEN = {
    "chained": ("acc = tl.dot(x, w, acc)", "acc = tl.dot(x, v, acc=acc)"),
    "added": ("acc += tl.dot(x, w)", "acc = acc + tl.dot(x, v)"),
    "summed first": ("p = tl.dot(x, w)", "acc += p + tl.dot(x, v)"),
    "by another name": ("same = acc", "acc = tl.dot(x, w, acc)", "same = tl.dot(x, v, same)"),
    "in helpers": ("acc = step(x, w, acc)", "acc += plain(x, v)"),
    "unrolled": ("for i in tl.static_range(2):", "    acc = tl.dot(x, w, acc)"),
    "under a condition": ("if k > 0:", "    acc = tl.dot(x, w, acc)", "acc = tl.dot(x, v, acc)"),
}
RIGHT = {
    "apart": ("acc = tl.dot(x, w, acc)", "other = step(x, v, other)"),
    "as an operand": ("p = tl.dot(x, w)", "acc = tl.dot(p.to(tl.float16), v, acc)"),
    "one of two": ("if TRANSPOSED:", "    acc = tl.dot(x, w.T, acc)", "else:", "    acc = tl.dot(x, w, acc)"),
    "one loop after another": (
        "for i in range(4):", "    acc = tl.dot(x, w, acc)", "for j in range(4):", "    acc = tl.dot(x, v, acc)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", (*BROKEN, *RIGHT))
def test_the_check_tells_them_apart(case):
    lines = (BROKEN | RIGHT)[case]
    found = list(faults(functions([KERNEL.format(body="\n".join(f"        {line}" for line in lines))])))
    assert bool(found) == (case in BROKEN), found
    assert all(fault.startswith("kernel: lines") for fault in found)
