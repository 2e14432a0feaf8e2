"""Runs a Gluon kernel of warp roles on a CPU: the roles as threads of which one runs at a time, in an order by chance.

Copies and products are done at any time between their issue and the wait for them, and what a copy will write is NaN
until then: a role that reads too early or writes too early gives other numbers in some order. Barriers count arrivals
and bytes as the hardware's do. Only what `gated_hopper` uses is there.
"""

import ast
import inspect
import random
import threading
from types import SimpleNamespace

import torch


class Deadlock(Exception):
    """Every role that has not returned waits, and nothing is under way."""


class Roles:
    """Takes turns among roles, and among the copies and products that are under way."""

    def __init__(self, seed):
        self.random = random.Random(seed)
        self.haste = self.random.choice((0.0, 0.1, 1.0))  # of what is under way; without any it is done when waited for
        self.under_way = []

    def run(self, functions):
        self.roles = [_Role(self, function) for function in functions]
        try:
            while waiting := [role for role in self.roles if not role.returned]:
                able = [role.resume for role in waiting if role.ready()]
                if not able or self.random.random() < self.haste:
                    able += self.under_way
                if not able:
                    raise Deadlock
                turn = self.random.choice(able)
                if turn in self.under_way:
                    self.under_way.remove(turn)
                turn()
        finally:
            for role in self.roles:
                role.stop()

    def wait(self, ready=lambda: True):
        """Let others go on, until the calling role is ready."""
        threading.current_thread().role.wait(ready)


class _Role:
    def __init__(self, roles, function):
        self.roles = roles
        self.function, self.ready, self.returned, self.error, self.stopped = function, lambda: True, False, None, False
        self.mine, self.others = threading.Semaphore(0), threading.Semaphore(0)
        self.stores, self.products = [], []  # that were issued; that are not done
        self.thread = threading.Thread(target=self._live, daemon=True)
        self.thread.role = self
        self.thread.start()

    def _live(self):
        self.mine.acquire()
        try:
            if not self.stopped:
                self.function()
            assert not any(store in self.roles.under_way for store in self.stores), "shared memory ends before a store"
        except BaseException as error:
            self.error = error
        self.returned = True
        self.others.release()

    def resume(self):
        self.mine.release()
        self.others.acquire()
        if self.error is not None:
            raise self.error

    def wait(self, ready):
        self.ready = ready
        self.others.release()
        self.mine.acquire()
        if self.stopped:
            raise SystemExit

    def stop(self):
        self.stopped = True
        self.mine.release()
        self.thread.join()


class Barrier:
    """Its phase is over when all have arrived and all expected bytes are there."""

    def __init__(self):
        self.count, self.pending, self.bytes, self.phase = 0, 0, 0, 0

    def arrive(self, count=1):
        assert self.pending >= count, "more arrivals than a phase has"
        self.pending -= count
        self._turn()

    def expect(self, size):
        self.bytes += size
        self.arrive()

    def receive(self, size):
        self.bytes -= size
        self._turn()

    def _turn(self):
        if self.pending == 0 and self.bytes == 0:
            self.pending, self.phase = self.count, self.phase + 1


class Shared:
    """A view of shared memory."""

    def __init__(self, data):
        self.data = data

    def index(self, i):
        return Shared(self.data[i])

    def slice(self, start, length):
        assert 0 <= start and start + length <= len(self.data)
        return Shared(self.data[start : start + length])

    def permute(self, order):
        return Shared(self.data.permute(order))

    def store(self, tile):
        assert tile.shape == self.data.shape and tile.dtype == self.data.dtype
        self.data.copy_(tile)


class Tile(torch.Tensor):
    """A tile in registers, with the methods of Triton's."""

    type = SimpleNamespace(layout=None)

    def split(self):
        return self.unbind(-1)


class Pointer:
    def __init__(self, t, columns=None):
        self.t, self.columns = t, columns

    def __add__(self, columns):
        return Pointer(self.t, columns)

    def load(self, mask=None, other=None):
        if self.columns is None:
            return self.t.item()
        found = torch.full(self.columns.shape, other, dtype=self.t.dtype)
        found[mask] = self.t[self.columns[mask]]
        return found.as_subclass(Tile)


class Descriptor:
    """A matrix that is copied by blocks, zero outside it."""

    def __init__(self, described):
        self.t, self.block = described.base.as_strided(described.shape, described.strides), described.block_shape
        self.dtype, self.layout = described.base.dtype, described.layout
        size = self.block[0] * self.block[1] * self.t.itemsize
        self.block_type = SimpleNamespace(nbytes=size)

    def inside(self, row, col):
        return self.t[row : row + self.block[0], col : col + self.block[1]]


class Stages(list):
    """Barriers or stages, one by one."""

    index = list.__getitem__


class Program:
    """One program of the kernel: the names that its functions find in place of Gluon's."""

    def __init__(self, roles, program, programs):
        self.roles, self.barriers = roles, []
        self.gl = SimpleNamespace(
            program_id=lambda axis: program, num_programs=lambda axis: programs, cdiv=lambda a, b: -(-a // b),
            static_range=range, static_assert=lambda condition: None,
            constexpr=None, int64=torch.int64, float32=torch.float32,
            zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype).as_subclass(Tile),
            arange=lambda start, end, layout: torch.arange(start, end),
            load=lambda pointer, **options: pointer.load(**options),
            convert_layout=lambda tile, layout: tile,
            allocate_shared_memory=self.allocate, warp_specialize=self.specialize,
            **dict.fromkeys(("NVMMADistributedLayout", "BlockedLayout", "SliceLayout"), lambda *args: None),
        )  # fmt: skip
        self.mbarrier = SimpleNamespace(
            MBarrierLayout=lambda: Barrier, init=self.init, wait=self.wait, expect=self.expect, arrive=self.arrive
        )
        self.tma = SimpleNamespace(store_wait=self.store_wait)

    def allocate(self, dtype, shape, layout):
        if layout is Barrier:
            self.barriers.append(Stages(Barrier() for _ in range(shape[0])))
            return self.barriers[-1]
        return Shared(torch.full(shape, torch.nan, dtype=dtype))

    def specialize(self, functions, warps, registers):
        self.roles.run([lambda f=f, arguments=arguments: f(*arguments) for f, arguments in functions])

    @staticmethod
    def init(barrier, count):
        barrier.count = barrier.pending = count

    def wait(self, barrier, parity):
        self.roles.wait(lambda: barrier.phase & 1 != parity)

    def expect(self, barrier, size):
        barrier.expect(size)
        self.roles.wait()

    def arrive(self, barrier, count, pred=True):
        if pred:
            barrier.arrive(count)
        self.roles.wait()

    def load_async(self, source, at, barrier, into):
        assert list(into.data.shape) == list(source.block)
        into.data.fill_(torch.nan)

        def arrive():
            inside = source.inside(*at)
            into.data.zero_()
            into.data[: inside.shape[0], : inside.shape[1]] = inside
            barrier.receive(into.data.numel() * into.data.itemsize)

        self.roles.under_way.append(arrive)
        self.roles.wait()

    def store_async(self, target, at, source):
        assert list(source.data.shape) == list(target.block)
        role = threading.current_thread().role

        def leave():
            inside = target.inside(*at)
            inside.copy_(source.data[: inside.shape[0], : inside.shape[1]])

        role.stores.append(leave)
        self.roles.under_way.append(leave)
        self.roles.wait()

    def store_wait(self, pending):
        stores = threading.current_thread().role.stores
        older = stores[: len(stores) - pending]
        self.roles.wait(lambda: not any(store in self.roles.under_way for store in older))

    def warpgroup_mma(self, x, y, into, is_async):
        role = threading.current_thread().role

        def multiply():  # whichever of a role's is picked, they are done in order
            a, b, total = role.products.pop(0)
            total += a.data.float() @ b.data.float()

        role.products.append((x, y, into))
        self.roles.under_way.append(multiply)
        self.roles.wait()
        return into

    def warpgroup_mma_wait(self, pending, deps):
        role = threading.current_thread().role
        self.roles.wait(lambda: len(role.products) <= pending)
        return deps[0]


def run(kernel, grid, arguments, constants, roles, also, change=("", "")):
    """Run a kernel's programs one after the other on tensors and descriptors; the barriers of each.

    `also` are functions in place of others that the kernel's file imports. `change` replaces a text of the file.
    """
    module = inspect.getmodule(kernel.fn)
    source = inspect.getsource(module)
    assert change[0] in source
    tree = ast.parse(source.replace(*change))
    tree.body = [f for f in tree.body if isinstance(f, ast.FunctionDef) and f.decorator_list]
    for function in tree.body:
        function.decorator_list = []
    constexprs = {n: t.value for n, t in vars(module).items() if n.isupper() and hasattr(t, "value")}
    given = [Descriptor(a) if hasattr(a, "base") else Pointer(a) if torch.is_tensor(a) else a for a in arguments]
    found = []
    for i in range(grid[0]):
        program = Program(roles, i, grid[0])
        names = {n: getattr(program, n) for n in dir(program) if not n.startswith("_")}
        world = {"tl": program.gl, "fence_async_shared": lambda: None, **constexprs, **names, **also}
        exec(compile(tree, module.__file__, "exec"), world)
        world[kernel.fn.__name__](*given, **constants)
        found.append(program.barriers)
    return found
