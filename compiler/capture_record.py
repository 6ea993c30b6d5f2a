"""Records every ATen op of one training step, as it runs on fake CPU tensors, into an `fx.Graph` without in-place ops.

A dispatch mode sees an op after autograd, so forward and backward are recorded alike. Forward ops know their module from hooks; a backward
op finds its forward op through the number that autograd gives to both.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from .. import torch_compat
from ..runtime import ops  # noqa: F401  (defines the opweave ops)
from ..torch_compat import FakeTensor, FakeTensorMode
from .capture_errors import CaptureError, place, user_line
from .capture_traits import Traits, dynamic_text, key_of, name_of, on_cpu, traits_of, undone
from .capture_values import Values, View, dense_stride

aten = torch.ops.aten

# What a graph does not say: lowering decides it.
_NEUTRAL_KWARGS = ("device", "pin_memory", "layout", "non_blocking")
MAX_CONSTANT_ELEMENTS = 65_536
_RANDOM_WAY_OUT = "dropout, bernoulli, rand and randn are; make other random values outside the model and pass them in the batch"


@dataclass(slots=True)
class Origin:
    """Where a recorded node comes from; becomes an `OpInfo` when the graph is done (partner is a node until then)."""

    path: str
    phase: str
    line: str
    partner: fx.Node | None = None


class Recorder(torch_compat.DispatchMode):
    """`graph` grows as ops run under this mode (inside `fake`). Set `phase` to "bwd" before the backward pass."""

    def __init__(self, fake: FakeTensorMode, module_names: dict[int, str], tensor_names: dict[int, str]) -> None:
        super().__init__()
        self._tensor_names = tensor_names  # of the real parameters and buffers, which no op should meet
        self.fake = fake
        self.graph = fx.Graph()
        self.values = Values(self.emit, self.val_of, self._constant)
        self.phase = "fwd"
        self.stack: list[str] = [""]
        self.seed: fx.Node | None = None
        self._random_ids: dict[bytes, int] = {}
        self._results: dict[Any, Any] = {}
        self._module_names = module_names
        self._vals: dict[Any, torch.Tensor] = {}
        self._origins: dict[int, Origin] = {}
        self._replaced: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._origin = Origin("", "fwd", "")
        self._merged: dict[Any, fx.Node] = {}
        self._last_placeholder: fx.Node | None = None
        self._last: fx.Node | None = None

    # What a node looks like

    def val(self, tensor: torch.Tensor) -> torch.Tensor:
        """The fake tensor that stands for all tensors of this shape, stride and dtype."""
        return self.val_of(tuple(tensor.shape), tensor.stride(), tensor.dtype)

    def val_of(self, shape: tuple[int, ...], stride: tuple[int, ...] | None, dtype: torch.dtype) -> torch.Tensor:
        stride = dense_stride(shape) if stride is None else stride
        key = (shape, stride, dtype)
        known = self._vals.get(key)
        if known is None:
            with self.fake:
                known = self._vals[key] = torch.empty_strided(shape, stride, dtype=dtype, device="cpu")
        return known

    def emit(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], val: Any) -> fx.Node:
        """A call of `target`; one that was recorded before with the same arguments is that node, since ops have no side effects."""
        key = (target, key_of(args), key_of(kwargs), id(val) if isinstance(val, torch.Tensor) else None)
        known = self._merged.get(key)
        if known is not None:
            self._last = known
            return known
        node = self._last = self._merged[key] = self.graph.create_node("call_function", target, args, kwargs, name=name_of(target))
        node.meta["val"] = val
        node.meta["origin"] = self._origin
        return node

    def placeholder(self, name: str, val: torch.Tensor) -> fx.Node:
        """A graph input after those there are, before all ops."""
        last = self._last_placeholder
        with self.graph.inserting_after(last) if last is not None else nullcontext():
            node = self._last_placeholder = self.graph.placeholder(name)
        node.target = node.name
        node.meta["val"] = val
        return node

    def set_origin(self, origin: Origin) -> None:
        """Origin of nodes emitted from now on."""
        self._origin = origin

    # Modules

    @contextmanager
    def modules_tracked(self) -> Iterator[None]:
        """Within, `stack[-1]` is the path of the module whose forward runs."""

        def enter(module: nn.Module, args: Any) -> None:
            if id(module) in self._module_names and torch.is_autocast_enabled("cuda"):
                raise CaptureError(
                    f'{type(module).__name__} is called under torch.autocast("cuda"), which a device-neutral capture cannot see; '
                    "take it away and pass `autocast=` with its dtype instead"
                )
            self.stack.append(self._module_names.get(id(module), self.stack[-1]))

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            self.stack.pop()

        handles = (
            nn.modules.module.register_module_forward_pre_hook(enter),
            nn.modules.module.register_module_forward_hook(leave),
        )
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    # Ops

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:
            return torch.device("cpu")
        self._origin = self._find_origin()
        traits = traits_of(func)
        kwargs = on_cpu(kwargs)
        lowered = tuple(self.lower(a) for a in args)
        lowered_kwargs = {k: self.lower(v) for k, v in kwargs.items() if k not in _NEUTRAL_KWARGS} if kwargs else {}
        if self._replaced and traits.name != "lift_fresh":  # which knows what a real tensor is
            args, kwargs = self._without_constants(args), self._without_constants(kwargs)
        try:
            if traits.handler is not None:
                out = traits.handler(self, func, args, kwargs, lowered, lowered_kwargs)
                self._leads(self._last)
                return out
            if traits.is_random:
                raise CaptureError(f"{traits.name} draws random numbers in a way that is not supported; {_RANDOM_WAY_OUT}")
            if traits.is_write:
                return self._record_write(func, args, kwargs, lowered, lowered_kwargs)
            return self._record(traits, func, args, kwargs, lowered, lowered_kwargs)
        except torch_compat.DYNAMIC_OUTPUT_ERRORS as error:
            raise CaptureError(f"{self.here()}: {dynamic_text(func)}", placed=True) from error
        except CaptureError as error:
            if error.placed:
                raise
            raise CaptureError(f"{self.here()}: {error}", placed=True) from error

    def here(self) -> str:
        """The module and user's line now running, for error texts."""
        return place(self._origin.path, self._origin.line)

    def _find_origin(self) -> Origin:
        if self.phase == "fwd":
            origin = Origin(self.stack[-1], "fwd", user_line(3))
            self._origins.setdefault(torch_compat.forward_sequence_number(), origin)
            return origin
        forward = self._origins.get(torch_compat.backward_sequence_number())
        if forward is None:
            return Origin("", "bwd", "")
        return Origin(forward.path, "bwd", forward.line, forward.partner)

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The op on fake tensors. One that was run before on tensors of the same shapes, strides and dtypes is not run again."""
        key = self._shapes_key(func, args, kwargs)
        seen = self._results.get(key) if key is not None else None
        if seen is not None:
            if isinstance(seen, torch.Tensor):
                return torch_compat.fresh_fake(self.fake, seen)
            return tuple([None if val is None else torch_compat.fresh_fake(self.fake, val) for val in seen])
        out = func(*args, **kwargs)
        if key is not None:
            if isinstance(out, torch.Tensor):
                self._results[key] = self.val(out)
            elif isinstance(out, tuple) and all(o is None or isinstance(o, torch.Tensor) for o in out):
                self._results[key] = tuple([None if o is None else self.val(o) for o in out])
        return out

    def _shapes_key(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What decides the shapes of an op's results; None where they must be found anew.

        That is with known values, whose results are known too, and for views of a part: autograd wants to know where they start.
        """
        traits = traits_of(func)
        if traits.is_view and (not traits.starts_with_input or args[0].storage_offset()):
            return None
        key = [func]
        for arg in (*args, *kwargs.items()) if kwargs else args:
            if isinstance(arg, torch.Tensor):
                ref = self.values.ref(arg)
                if ref is None or torch_compat.is_constant(arg):
                    return None
                key.append(id(ref.val))
            elif isinstance(arg, (list, tuple)) and any(isinstance(a, torch.Tensor) for a in arg):
                return None
            else:
                key.append(key_of(arg))
        return tuple(key)

    def _record(self, traits: Traits, func: Any, args: Any, kwargs: Any, lowered: Any, lowered_kwargs: Any) -> Any:
        out = self.run(func, args, kwargs)
        if isinstance(out, torch.Tensor):
            val = self.val(out)
            source: Any = args[0] if args else None
            same = self.values.ref(source) if traits.maybe_nothing or traits.maybe_copy else None
            if same is not None and same.val is val:
                self._bind_same(out, lowered[0], val, source, traits.maybe_copy)
                return out
            source_again = undone(func, traits.name, lowered, val) if traits.maybe_nothing else None
            node = source_again or self.emit(func, lowered, lowered_kwargs, val)
            if traits.is_view:
                self.values.bind_view(out, node, val, source, View(func, lowered[1:], lowered_kwargs))
            else:
                self.values.bind(out, node, val)
            self._leads(node)
            return out
        if not isinstance(out, (tuple, list)):
            return out  # a number: that of a constant
        self.bind_all(func, out, lowered, lowered_kwargs, args[0] if traits.is_view else None)
        return out

    def record_plain(self, func: Any, args: Any, kwargs: Any, lowered: Any, lowered_kwargs: Any) -> torch.Tensor:
        """Record an op of one result as it is."""
        out = self.run(func, args, kwargs)
        val = self.val(out)
        self.values.bind(out, self.emit(func, lowered, lowered_kwargs, val), val)
        return out

    def _bind_same(self, out: torch.Tensor, node: fx.Node, val: torch.Tensor, source: torch.Tensor, is_copy: bool) -> None:
        if is_copy:
            self.values.bind(out, node, val)
        else:
            self.values.bind_view(out, node, val, source, None)

    def bind_all(self, target: Any, out: Any, lowered: Any, lowered_kwargs: Any, view_of: torch.Tensor | None = None) -> fx.Node:
        """Record an op with several results, one `getitem` per tensor; views where `view_of` is given."""
        vals = tuple(self.val(o) if isinstance(o, torch.Tensor) else None for o in out)
        node = self.emit(target, lowered, lowered_kwargs, vals)
        for i, (o, val) in enumerate(zip(out, vals, strict=True)):
            if val is None:
                continue
            item = self.emit(operator.getitem, (node, i), {}, val)
            if view_of is None:
                self.values.bind(o, item, val)
            else:
                self.values.bind_view(o, item, val, view_of, View(target, lowered[1:], lowered_kwargs, i))
        self._leads(node)
        return node

    def _leads(self, node: fx.Node | None) -> None:
        """The node is what backward ops of the running forward op name as their partner."""
        if self._origin.phase == "fwd" and self._origin.partner is None and node is not None:
            self._origin.partner = node

    def _record_write(self, func: Any, args: Any, kwargs: Any, lowered: Any, lowered_kwargs: Any) -> Any:
        """An in-place or out= op: record its functional form, then rebind what it wrote."""
        functional = torch_compat.functional_overload(func)
        written = torch_compat.mutated_arguments(func)
        if functional is None or len(written) != 1:
            raise CaptureError(
                f"{func} works in place in a way that is not supported; use the op without the trailing underscore (`x = x.op()`)"
            )
        position, name = written[0]
        target = kwargs[name] if name in kwargs else args[position]
        drop_out = {k: v for k, v in kwargs.items() if k != name}
        result = functional(*args, **drop_out)
        node = self.emit(functional, lowered, {k: v for k, v in lowered_kwargs.items() if k != name}, self.val(result))
        out = func(*args, **kwargs)
        self.store(target, node)
        self._leads(node)
        return out

    def store(self, tensor: torch.Tensor, node: fx.Node) -> None:
        """`tensor` was written in place with the value of `node`, which is cast and broadcast to it as needed."""
        val, want = node.meta["val"], self.val(tensor)
        if val.dtype != want.dtype:
            val = self.val_of(tuple(val.shape), val.stride(), want.dtype)
            node = self.emit(aten._to_copy.default, (node,), {"dtype": want.dtype}, val)
        if val.shape != want.shape:
            val = self.val_of(tuple(want.shape), (0,) * want.dim(), want.dtype)
            node = self.emit(aten.expand.default, (node, list(want.shape)), {}, val)
        self.values.write(tensor, self.values.lay_out(node, want))

    def random_id(self) -> int:
        """A number of its own for each random op, in order of execution.

        torch's own generator tells them apart and moves on with each: a checkpointed layer that runs again is given the generator's former
        state by torch, and so draws the same numbers again.
        """
        with torch_compat.no_dispatch_modes():
            state = torch.get_rng_state().numpy().tobytes()
            torch.rand(())
        return self._random_ids.setdefault(state, len(self._random_ids))

    def seed_node(self) -> fx.Node:
        """The graph input that random ops take; made at first use."""
        if self.seed is None:
            self.seed = self.placeholder("seed", self.val_of((), (), torch.int64))
        return self.seed

    # Arguments

    def lower(self, arg: Any) -> Any:
        """An argument of an op as the graph writes it."""
        if isinstance(arg, torch.Tensor):
            return self.values.read(arg)
        if isinstance(arg, (list, tuple)):
            return [self.lower(a) for a in arg]
        return arg

    def _constant(self, tensor: torch.Tensor) -> fx.Node:
        """A tensor that is no input of the graph: its values become part of the graph."""
        if id(tensor) in self._tensor_names:
            raise CaptureError(
                f"{self._tensor_names[id(tensor)]} is used through a reference that bypasses its module (a list, a closure); "
                "read it from its module in the forward pass (`self.weight`)"
            )
        if isinstance(tensor, FakeTensor) or tensor.device.type == "meta":
            raise CaptureError(
                "a tensor is used that is neither parameter, buffer nor part of the batch and has no value; "
                "register it on its module with `register_buffer`"
            )
        if tensor.numel() > MAX_CONSTANT_ELEMENTS:
            raise CaptureError(
                f"a tensor of {tensor.numel()} elements is used that is neither parameter, buffer nor part of the batch; "
                "register it on its module with `register_buffer`"
            )
        val = self.val_of(tuple(tensor.shape), None, tensor.dtype)
        with torch_compat.no_dispatch_modes():
            on_cpu = tensor.detach().cpu()
            values = on_cpu.reshape(-1).tolist()
        shape = list(tensor.shape)
        if values and all(v == values[0] for v in values):
            node = self.emit(aten.full.default, (shape, values[0]), {"dtype": tensor.dtype}, val)
        else:
            node = self.emit(torch.ops.opweave.constant.default, (shape, values, tensor.dtype), {}, val)
        stand_in = self.fake.from_tensor(on_cpu)
        self.values.bind(tensor, node, val)
        self.values.bind_view(stand_in, node, val, tensor, None)
        self._replaced[id(tensor)] = (tensor, stand_in)
        return node

    def _without_constants(self, arg: Any) -> Any:
        if isinstance(arg, torch.Tensor):
            return self._replaced[id(arg)][1] if id(arg) in self._replaced else arg
        if isinstance(arg, (list, tuple)):
            return type(arg)(self._without_constants(a) for a in arg)
        if isinstance(arg, dict):
            return {k: self._without_constants(v) for k, v in arg.items()}
        return arg
