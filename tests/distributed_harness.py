"""What the cases of test_distributed.py share: their register, counted collectives, comparisons with one process."""

import copy
from collections import Counter

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import bilinear_ops as bo

CASES = {2: {}, 4: {}}  # by the number of processes and by name, in the order in which they run
DTYPES = (torch.float64, torch.float32)
R = Replicate()


def case(*worlds):
    """A case of launches of so many processes: a function of the folder that the launches share."""

    def register(function):
        for world in worlds:
            CASES[world][function.__name__] = function
        return function

    return register


class Counted(TorchDispatchMode):
    """Collectives, and the bytes of the whole tensors that they reduce, gather or scatter (V in docs/scale.md)."""

    def __init__(self):
        super().__init__()
        self.calls, self.bytes = Counter(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(t is DTensor for t in types):
            return NotImplemented
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.partition("::")[2].strip("_")
        if func.namespace in ("_c10d_functional", "c10d") and not name.startswith(("wait", "wrap")):
            tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
            self.calls[name] += 1
            self.bytes[name] += max((t.numel() * t.itemsize for t in tensors), default=0)
        return out


def on(mesh, t, *placements):
    """A DTensor from what every rank has whole."""
    return distribute_tensor(t.detach(), mesh, placements, src_data_rank=None)


def agree(mesh, function, tensors, placements, expected, options=None):
    """Values and all gradients of a call on DTensors equal those on plain tensors, without a single collective."""
    options = options or {}
    whole = [t.clone().requires_grad_(t.is_floating_point()) for t in tensors]
    y = function(*whole, **options)
    parts = [
        on(mesh, t, placement).requires_grad_(t.is_floating_point())
        for t, placement in zip(tensors, placements, strict=True)
    ]
    with Counted() as counted:
        out = function(*parts, **options)
        assert out.placements == (expected,), out.placements
        gradient = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(3))
        placement = R if expected.is_partial() else expected
        out.backward(on(mesh, gradient, placement))
    assert not counted.calls, counted.calls
    y.backward(gradient)
    assert_close(out.full_tensor(), y)
    for part, t in zip(parts, whole, strict=True):
        if t.grad is not None:
            assert part.grad.shape == t.grad.shape
            assert_close(part.grad.full_tensor(), t.grad)


def randn(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype)


def line():
    return init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))


def slab(t, dim=0):
    """This rank's share."""
    return t.chunk(dist.get_world_size(), dim)[dist.get_rank()].contiguous()


def layers(dtype, **options):
    """Two equal layers, with biases; sizes that no world divides."""
    layer = bo.nn.GatedMLP(8, 10, 6, activation="swish", beta=1.3, bias=True, dtype=dtype, **options)
    return layer, copy.deepcopy(layer)


def compare_gradients(part, whole):
    for (name, one), other in zip(part.named_parameters(), whole.parameters(), strict=True):
        gradient = one.grad.full_tensor() if isinstance(one.grad, DTensor) else one.grad
        assert_close(gradient, other.grad, msg=lambda m, name=name: f"{name}: {m}")
