"""Ops on DTensors: each rank runs the op on its shards, by a rule that says over which axes it may be sharded.

A rule names the axes of every tensor. On each dimension of the mesh either nothing is sharded, or one named axis is, in
every tensor that has it; the result is then sharded over it too, or, if it lacks the axis, a partial sum. The gradient
of a tensor that lacks the axis is a partial sum, that of a tensor that has it is sharded alike. So a rule fixes the
placements of outputs and gradients, and nothing is redistributed silently. No collective runs, but for the gradient of
a plain 0-dim tensor, which is summed over the ranks; where one is needed, the caller asks for a layout that brings it.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function

from bilinear_ops.results import Directions

P = ParamSpec("P")
R = TypeVar("R")

PLAIN = frozenset((Tensor, nn.Parameter, type(None), str, int, float, bool))  # told apart without a look inside
FACTORS = ("K o", "o h")  # axes of Directions, where coefficients are "K h"


def sharded(
    result: str,
    *,
    over: str,
    once: tuple[str, ...] = (),
    numbers: dict[str, str] | None = None,
    public: Callable[..., Any] | None = None,
    **axes: str,
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Let a function of tensors take DTensors, `axes` naming the axes of its arguments: `x="... d", w="h d"`.

    A leading `...` stands for the tokens' dimensions; an argument with fewer dimensions, or of size 1, is broadcast.
    Further dimensions need no name: they are never sharded.

    Args:
        result: the axes of what the function returns, of every tensor where it returns several. An axis `ranks` is of
            size 1 on every rank, and stacks what they return.
        over: the axes that may be sharded; the result is a partial sum over those that it lacks.
        once: arguments that enter a sum once, not once a shard: biases. Their gradient is whole on every rank.
        numbers: arguments, None unless given, that take the global numbers along an axis where it is sharded.
        public: the function that calls this one with the same arguments, which subclasses and tracers are handed.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        names = tuple(inspect.signature(function).parameters)

        @functools.wraps(function)
        def wrapped(*args: P.args, **options: P.kwargs) -> R:
            for value in args:
                if type(value) not in PLAIN:
                    break
            else:  # a small call's time is its own: nothing is built where all arguments are plain
                for value in options.values():
                    if type(value) not in PLAIN:
                        break
                else:
                    return function(*args, **options)
            given = (*args, *options.values())
            if not any(map(is_sharded, given)):
                if has_torch_function(given):
                    return handle_torch_function(public or wrapped, given, *args, **options)
                return function(*args, **options)
            arguments = {**dict(zip(names, args, strict=False)), **options}
            if arguments.get("group") is not None:
                refuse_sharded(function.__name__, given, "group= deals plain tensors to the ranks; leave group out")
            call = _Call(function.__name__.lstrip("_"), axes, arguments)
            return call.run(function, result, over.split(), once, numbers or {})

        return wrapped

    return decorate


def refuse_sharded(name: str, value: object, instead: str) -> None:
    """Raise RuntimeError if this is a DTensor or holds one, where a result would be wrong or gathered silently."""
    if is_sharded(value):
        raise RuntimeError(f"{name} cannot take these DTensors: {instead}")


def is_sharded(value: object) -> bool:
    """Whether this is a DTensor, or holds one; asked without an import of DTensor."""
    if isinstance(value, tuple):
        return any(is_sharded(t) for t in value)
    return isinstance(value, Tensor) and hasattr(value, "device_mesh")


class _Call:
    """One call on DTensors: which axis every mesh dimension shards, and the way to the shards and back."""

    def __init__(self, name: str, axes: dict[str, str], arguments: dict[str, Any]):
        self.name, self.arguments = name, arguments
        self.tensors: dict[str, Tensor] = {}
        specs: dict[str, str] = {}
        for key, spec in axes.items():
            value = arguments.get(key)
            if isinstance(value, Directions):
                for factor, part, of in zip(("u", "p"), value, FACTORS, strict=True):
                    self.tensors[f"{key}.{factor}"], specs[f"{key}.{factor}"] = part, of
            elif isinstance(value, Tensor):
                self.tensors[key], specs[key] = value, spec
        self.mesh = next(t for t in self.tensors.values() if is_sharded(t)).device_mesh  # type: ignore[attr-defined]
        self._lift()
        self.lead = 0  # how many dimensions `...` stands for
        for key, spec in specs.items():
            if "..." in spec:
                self.lead = max(self.tensors[key].dim() - len(spec.split()) + 1, 0)
                break
        self.sizes: dict[str, int] = {}
        self.labels = {key: self._labels(spec, self.tensors[key].dim()) for key, spec in specs.items()}
        for key, t in self.tensors.items():
            self._bind(key, t)

    def _lift(self) -> None:
        """0-dim plain tensors become replicated DTensors, so that their gradients are summed over the ranks."""
        from torch.distributed.tensor import DTensor, Replicate

        for key, t in self.tensors.items():
            if not is_sharded(t):
                if t.dim():
                    beside = next(k for k, other in self.tensors.items() if is_sharded(other))
                    raise RuntimeError(
                        f"{self.name}: {key} is a plain tensor beside the DTensor {beside}: pass "
                        f"DTensor.from_local({key}, mesh, placements), [Replicate()] where every rank has all of it; "
                        "of a layer under fully_shard call the module, which gathers its parameters"
                    )
                self.tensors[key] = DTensor.from_local(t, self.mesh, [Replicate()] * self.mesh.ndim, run_check=False)
            elif t.device_mesh != self.mesh:  # type: ignore[attr-defined]
                raise RuntimeError(f"{self.name}: {key} is on {t.device_mesh}, other tensors on {self.mesh}")  # type: ignore[attr-defined]

    def _labels(self, spec: str, dims: int) -> list[str | None]:
        """The name of every dimension: of the last ones for a tensor that is broadcast, None past the named ones."""
        named: list[str | None] = []
        for axis in spec.split():
            named += [f"...{i}" for i in range(self.lead)] if axis == "..." else [axis]
        return named[len(named) - dims :] if dims < len(named) else named + [None] * (dims - len(named))

    def _bind(self, key: str, t: Tensor) -> None:
        labels = self.labels[key]
        for i, (label, size) in enumerate(zip(labels, t.shape, strict=True)):
            if label is None:
                continue
            known = self.sizes.get(label, 1)
            if known == 1:
                self.sizes[label] = size
            elif size == 1:
                labels[i] = None  # broadcast
            elif size != known:
                raise RuntimeError(f"{self.name}: {key} has {size} {_spoken(label)}, other tensors {known}")

    def _sharded_axis(self, dim: int, over: list[str]) -> str | None:
        """The one axis that this dimension of the mesh shards, None where everything is replicated."""
        found: dict[str, str] = {}
        for key, t in self.tensors.items():
            placement = t.placements[dim]  # type: ignore[attr-defined]
            if placement.is_replicate():
                continue
            label = self.labels[key][placement.dim] if type(placement).__name__ == "Shard" else None
            if label is None or ("..." if label.startswith("...") else label) not in over:
                where = f", over {_spoken(label)}" if label else ""
                raise self._no_rule(dim, f"{key} is {placement}{where}; a rule exists for {self._choices(over)}")
            found.setdefault(label, key)
        if not found:
            return None
        if len(found) > 1:
            both = " and ".join(f"{key} over {_spoken(label)}" for label, key in found.items())
            raise self._no_rule(dim, f"it shards {both}; one axis a mesh dimension is possible")
        ((axis, first),) = found.items()
        for key, t in self.tensors.items():
            if axis in self.labels[key] and t.placements[dim].is_replicate():  # type: ignore[attr-defined]
                wanted = f"Shard({self.labels[key].index(axis)})"
                raise self._no_rule(dim, f"{first} is sharded over {_spoken(axis)}, {key} must be {wanted} too")
        return axis

    def _no_rule(self, dim: int, reason: str) -> RuntimeError:
        names = self.mesh.mesh_dim_names
        where = f"mesh dimension {names[dim] if names else dim}"
        return RuntimeError(f"{self.name}: no sharding rule on {where}: {reason}. Redistribute first")

    @staticmethod
    def _choices(over: list[str]) -> str:
        return "Replicate and for " + ", ".join("tokens" if axis == "..." else axis for axis in over)

    def run(
        self,
        function: Callable[..., Any],
        result: str,
        over: list[str],
        once: tuple[str, ...],
        numbers: dict[str, str],
    ) -> Any:
        axes = [self._sharded_axis(dim, over) for dim in range(self.mesh.ndim)]
        held = result.split()
        summed = [axis is not None and axis not in held and not axis.startswith("...") for axis in axes]
        local: dict[str, Tensor] = {}
        for key, t in self.tensors.items():
            local[key] = t.to_local(grad_placements=self._gradients(key, t, axes, summed, once))  # type: ignore[attr-defined]
            if key in once and any(s and self.mesh.get_local_rank(i) for i, s in enumerate(summed)):
                local[key] = _Absent.apply(local[key])
        arguments = dict(self.arguments)
        for key, value in arguments.items():
            if isinstance(value, Directions):
                arguments[key] = Directions(local[f"{key}.u"], local[f"{key}.p"])
            elif key in local:
                arguments[key] = local[key]
        for key, axis in numbers.items():
            if arguments.get(key) is None and any(_is_of(a, axis) for a in axes):
                arguments[key] = self._numbers(axis, axes)
        out = function(**arguments)
        if isinstance(out, Tensor):
            return self._whole(out, result, axes)
        return type(out)(*(self._whole(t, result, axes) for t in out))

    def _gradients(
        self, key: str, t: Tensor, axes: list[str | None], summed: list[bool], once: tuple[str, ...]
    ) -> list[Any]:
        from torch.distributed.tensor import Partial

        def partial(dim: int, axis: str | None) -> bool:
            return axis is not None and axis not in self.labels[key] and not (summed[dim] and key in once)

        placements = t.placements  # type: ignore[attr-defined]
        return [Partial() if partial(dim, axis) else placements[dim] for dim, axis in enumerate(axes)]

    def _numbers(self, axis: str, axes: list[str | None]) -> Tensor:
        """The global numbers along an axis (of all tokens' dimensions together) that this rank holds."""
        from torch.distributed.tensor import Replicate, Shard, distribute_tensor

        labels = [f"...{i}" for i in range(self.lead)] if axis == "..." else [axis]
        sizes = [self.sizes[label] for label in labels]
        device = next(iter(self.tensors.values())).device
        every = torch.arange(torch.Size(sizes).numel(), device=device).view(sizes)
        placements = [Shard(labels.index(a)) if a in labels else Replicate() for a in axes]
        return distribute_tensor(every, self.mesh, placements, src_data_rank=None).to_local()

    def _whole(self, t: Tensor, result: str, axes: list[str | None]) -> Tensor:
        """The DTensor of which t is this rank's part."""
        from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

        labels = self._labels(result, t.dim())
        if "ranks" in labels:
            axes = [None if axis is None else "ranks" for axis in axes]
            self.sizes["ranks"] = math.prod(self.mesh.size(dim) for dim, axis in enumerate(axes) if axis)
        shape = [self.sizes[a] if a in axes and a is not None else n for a, n in zip(labels, t.shape, strict=True)]
        stride = [torch.Size(shape[i + 1 :]).numel() for i in range(len(shape))]
        placements = [
            Replicate() if axis is None else Shard(labels.index(axis)) if axis in labels else Partial() for axis in axes
        ]
        return DTensor.from_local(
            t, self.mesh, placements, run_check=False, shape=torch.Size(shape), stride=tuple(stride)
        )


def _is_of(label: str | None, axis: str) -> bool:
    return label is not None and (label.startswith("...") if axis == "..." else label == axis)


def _spoken(label: str) -> str:
    return "tokens" if label.startswith("...") else label


class _Absent(torch.autograd.Function):
    """Zeros in place of what another rank adds, with the gradient it gets there: the same on all ranks."""

    @staticmethod
    def forward(ctx: Any, t: Tensor) -> Tensor:
        return torch.zeros_like(t)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def over_directions(group: Any, like: Tensor) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    """Two functions of a plain tensor that is the same on all ranks of a group: whole, and sharded over directions.

    Nothing is sent; None passes through both.
    """
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Replicate, Shard

    mesh = DeviceMesh.from_group(group, like.device.type)

    def whole(t: Any) -> Any:
        return DTensor.from_local(t, mesh, [Replicate()], run_check=False) if isinstance(t, Tensor) else t

    def shared(t: Any) -> Any:
        if isinstance(t, Directions):
            return Directions(shared(t.u), whole(t.p))
        return whole(t).redistribute(placements=[Shard(0)])

    return whole, shared


def own_directions(group: Any, count: int) -> range:
    """The directions of this rank of a group, where `over_directions` puts them."""
    import torch.distributed as dist

    step = -(-count // dist.get_world_size(group))
    start = min(dist.get_rank(group) * step, count)
    return range(start, min(start + step, count))


def gathered(result: Any) -> Any:
    """A named tuple of DTensors as one of plain tensors, whole on every rank."""
    return type(result)(*(t.full_tensor() for t in result))
