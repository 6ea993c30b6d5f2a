"""Capture: one training step of an unmodified model as a `StepGraph`.

    step_graph = capture(model, batch, optimizer=torch.optim.AdamW(model.parameters()))

Parameters, buffers and batch become fake CPU tensors (shapes only: nothing is materialised, whatever device the model is on), the
user's loss function and `torch.autograd.grad` run on them, and a `Recorder` writes down every ATen op. The optimizer's update is added
last.

The stages, in order: inputs -> forward -> backward -> update -> outputs, then dead code goes, every node learns its `OpInfo`, and the
backward pass gets views of its own.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from ..torch_compat import FakeTensorMode, quiet_fake_tensors
from .capture_errors import CaptureError, line_of_error, place
from .capture_experts import experts_as_one_op
from .capture_record import Origin, Recorder
from .capture_tree import batch_constants, map_tensors, split_extras
from .collector import collector_paused
from .micro_batches import check_batch, micro_batch
from .optimizer_ops import OptimizerSpec, add_update, read_optimizer
from .step_graph import GraphInput, GraphOutput, OpInfo, StepGraph
from .views import redo_views

LossFn = Callable[[nn.Module, Any], Any]
"""(model, batch) → the loss, or a tuple that starts with it."""

_LOSS_WAY_OUT = (
    "pass `loss_fn=lambda model, batch: ...` that returns a scalar loss (or a tuple that starts with it), or, for models of transformers, "
    "put `labels` into the batch"
)


@collector_paused()
def capture(
    model: nn.Module,
    batch: Any,
    *,
    loss_fn: LossFn | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    clip_grad_norm: float | None = None,
    autocast: torch.dtype | None = None,
    accumulate: int = 1,
) -> StepGraph:
    """The whole training step of `model` on a global `batch`.

    loss_fn(model, batch) returns the loss or (loss, extras...); without it, dict batches are keyword arguments, tuples are positional ones,
    and the loss is `output.loss`, `output["loss"]`, a scalar output, or the first of a tuple. With an optimizer the graph ends in new
    parameters and optimizer state, without one in gradients. clip_grad_norm is the max_norm of torch's `clip_grad_norm_`. autocast runs the
    forward pass under `torch.autocast` in that type. accumulate: the number of micro-batches the batch is cut into; the graph is that of
    one of them (see `micro_batches`).

    Raises CaptureError for what cannot be captured, naming module, line and way out; ValueError for an unknown optimizer and a batch that
    cannot be cut into so many.
    """
    _check_model(model)
    check_batch(batch, accumulate)
    if autocast not in (None, torch.bfloat16, torch.float16):
        raise ValueError(f"autocast is {autocast!r}; give torch.bfloat16 or torch.float16 (or None for no autocast)")
    if clip_grad_norm is not None and not clip_grad_norm > 0:
        raise ValueError(f"clip_grad_norm is {clip_grad_norm}; give the largest norm of the gradients, a number above 0")
    spec = read_optimizer(optimizer, model) if optimizer is not None else None
    trace = _Trace(model, spec, accumulate)
    batch = trace.add_batch(micro_batch(batch, accumulate, 0))
    results = trace.run(batch, loss_fn or default_loss, autocast)
    step = trace.finish(results, clip_grad_norm)
    step.autocast = autocast
    return step


def default_loss(model: nn.Module, batch: Any) -> torch.Tensor:
    """Call the model on the batch and find the loss in what it returns."""
    if isinstance(batch, Mapping):
        output = model(**batch)
    elif isinstance(batch, (tuple, list)):
        output = model(*batch)
    else:
        output = model(batch)
    return _find_loss(output, model)


def _find_loss(output: Any, model: nn.Module) -> torch.Tensor:
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if loss is None and isinstance(output, torch.Tensor):
        loss = output
    if loss is None and isinstance(output, (tuple, list)) and output and isinstance(output[0], torch.Tensor):
        loss = output[0]
    if not isinstance(loss, torch.Tensor):
        raise CaptureError(f"no loss in what {type(model).__name__} returned ({type(output).__name__}); {_LOSS_WAY_OUT}")
    return loss


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise CaptureError(f"the model is a {type(model).__name__}; give a torch.nn.Module")
    for wrapper in ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel", "OptimizedModule"):
        if type(model).__name__ == wrapper:
            raise CaptureError(f"the model is wrapped in {wrapper}; give the plain module inside it, opweave does the distribution itself")
    sharded = next((fqn for fqn, p in model.named_parameters() if type(p.data).__name__ == "DTensor"), None)
    if sharded is not None:
        raise CaptureError(f"parameter {sharded} is a DTensor already; give the model before it was sharded (`fully_shard` or the like)")
    if not any(p.requires_grad for p in model.parameters()):
        raise CaptureError(
            f"{type(model).__name__} has no parameter that requires a gradient, so there is nothing to train; "
            "set `requires_grad_(True)` on those to be trained"
        )


def _plain_kernels(model: nn.Module) -> AbstractContextManager[Any]:
    """The CPU's fused LSTM kernel stands for no other device's; without it the layers are matrix products and pointwise ops."""
    if not any(isinstance(m, nn.RNNBase) for m in model.modules()):
        return contextlib.nullcontext()
    return torch.backends.mkldnn.flags(enabled=False)  # type: ignore[no-untyped-call]


class _Swapped(nn.Module):
    """Holds the model, so that `functional_call` can put fake tensors in while work on it runs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, work: Callable[[nn.Module], _Results]) -> _Results:
        return work(self.model)


@dataclass(slots=True, kw_only=True)
class _Results:
    """What the traced step gave, as fake tensors. buffers: as they are after the step. grads: of what has any."""

    loss: torch.Tensor
    extras: tuple[Any, ...]
    buffers: dict[str, torch.Tensor]
    grads: dict[str, torch.Tensor]


class _Trace:
    """One capture under way: the recorder, the graph's inputs, and the fake tensors that stand for them."""

    def __init__(self, model: nn.Module, optimizer: OptimizerSpec | None, num_micro_batches: int = 1) -> None:
        self.model = model
        self.optimizer = optimizer
        self.num_micro_batches = num_micro_batches
        self.fake = FakeTensorMode()
        self.recorder = Recorder(self.fake, {id(m): name for name, m in model.named_modules()}, _names_of_tensors(model))
        self.inputs: list[GraphInput] = []
        self.batch_constants: dict[str, Any] = {}
        self.params: dict[str, torch.Tensor] = {}
        self.buffers: dict[str, torch.Tensor] = {}
        for fqn, param in model.named_parameters():
            group = optimizer.group_of.get(fqn, -1) if optimizer is not None else -1
            self.params[fqn] = self._input("param", fqn, param, group)
        for fqn, buffer in model.named_buffers():
            self.buffers[fqn] = self._input("buffer", fqn, buffer)

    # Inputs

    def _input(self, kind: Any, fqn: str, like: torch.Tensor, group: int = -1) -> torch.Tensor:
        """Add a placeholder; the fake tensor that stands for it."""
        if like.layout != torch.strided:
            raise CaptureError(f"{kind} {fqn} has the layout {like.layout}; only dense tensors can be captured, use `.to_dense()`")
        trains = kind == "param" and like.requires_grad
        with self.fake:
            fake = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device="cpu", requires_grad=trains)
        node = self.add_placeholder(kind, fqn, self.recorder.val(fake), group=group)
        self.recorder.values.bind(fake, node, node.meta["val"])
        return fake

    def add_placeholder(self, kind: Any, fqn: str, val: torch.Tensor, *, slot: str = "", group: int = -1) -> fx.Node:
        """A placeholder after the ones there are; its name is made of kind, slot and fqn."""
        node = self.recorder.placeholder(re.sub(r"\W", "_", "_".join(filter(None, (kind, slot, fqn)))), val)
        self.inputs.append(GraphInput(name=node.name, kind=kind, fqn=fqn, slot=slot, group=group))
        return node

    def add_batch(self, batch: Any) -> Any:
        """The batch with its tensors replaced by fake ones, each a placeholder."""
        count = len(self.inputs)
        self.batch_constants = batch_constants(batch)
        faked = map_tensors(batch, self._batch_input)
        if len(self.inputs) == count:
            raise CaptureError(
                f"there is no tensor in the batch (a {type(batch).__name__}); a batch is a tensor, or a dict, tuple, list or dataclass "
                "of tensors"
            )
        return faked

    def _batch_input(self, path: str, tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.numel():
            raise CaptureError(f"the batch tensor {path!r} has the shape {tuple(tensor.shape)}: there is nothing in it")
        return self._input("batch", path, tensor)

    # Forward and backward

    def run(self, batch: Any, loss_fn: LossFn, autocast: torch.dtype | None) -> _Results:
        """Run the step on fake tensors. The backward pass runs while they are in the model, since checkpointed layers run again in it."""
        state = {f"model.{fqn}": t for fqn, t in (*self.params.items(), *self.buffers.items())}

        def work(model: nn.Module) -> _Results:
            with torch.autocast("cpu", dtype=autocast) if autocast is not None else contextlib.nullcontext():
                result = loss_fn(model, batch)
            loss, *extras = result if isinstance(result, (tuple, list)) else (_find_loss(result, model),)
            buffers = dict(model.named_buffers())
            self._check_params()
            self._check_loss(loss)
            if self.num_micro_batches > 1:
                loss = loss / self.num_micro_batches
            return _Results(loss=loss, extras=tuple(extras), buffers=buffers, grads=self._backward(loss))

        with self._recording(), self.recorder.modules_tracked(), experts_as_one_op(self.model), _plain_kernels(self.model):
            return torch.func.functional_call(_Swapped(self.model), state, (work,))

    def _check_params(self) -> None:
        for fqn, param in self.params.items():
            if self.recorder.values.written(param):
                raise CaptureError(
                    f"parameter {fqn} is changed in place during the forward pass; only the optimizer may change parameters: "
                    "make it a buffer, or change it after the step"
                )

    def _check_loss(self, loss: Any) -> None:
        if not isinstance(loss, torch.Tensor):
            raise CaptureError(f"the loss is a {type(loss).__name__}, not a tensor; {_LOSS_WAY_OUT}")
        if loss.numel() != 1:
            raise CaptureError(
                f"the loss has the shape {tuple(loss.shape)}; it must be a scalar: reduce it (`loss.mean()`), or {_LOSS_WAY_OUT}"
            )
        if not loss.dtype.is_floating_point:
            raise CaptureError(f"the loss has the type {loss.dtype}; it must be a floating-point number")
        if not loss.requires_grad:
            raise CaptureError(
                "the loss does not depend on any parameter that requires a gradient; look for `detach`, `.data`, "
                "`torch.no_grad` or an integer conversion between model and loss"
            )

    def _backward(self, loss: torch.Tensor) -> dict[str, torch.Tensor]:
        """Gradient of each parameter to be trained that the loss depends on."""
        wanted = {fqn: p for fqn, p in self.params.items() if p.requires_grad}
        if self.optimizer is not None:
            wanted = {fqn: p for fqn, p in wanted.items() if fqn in self.optimizer.group_of}
        self.recorder.phase = "bwd"
        grads = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
        return {fqn: grad for fqn, grad in zip(wanted, grads, strict=True) if grad is not None}

    @contextlib.contextmanager
    def _recording(self) -> Iterator[None]:
        """Ops are fake and recorded; whatever goes wrong in the user's code is told with its place."""
        try:
            with quiet_fake_tensors(), torch.random.fork_rng(devices=[]), torch.enable_grad():
                torch.default_generator.manual_seed(0)  # random ops are told apart by its states
                with self.fake, self.recorder:
                    yield
        except CaptureError:
            raise
        except Exception as error:
            line = line_of_error(error.__traceback__)
            where = place(self.recorder.stack[-1], line)
            raise CaptureError(f"{where}: {_explain(error)}", placed=True) from error

    # Update and outputs

    def finish(self, results: _Results, clip: float | None) -> StepGraph:
        """Add update and outputs, and make the `StepGraph`."""
        read = self.recorder.values.read
        extra_tensors, extra_spec = split_extras(results.extras)
        outputs = [(GraphOutput(kind="loss"), self._over_all_micro_batches(read(results.loss), ""))]
        outputs += [(GraphOutput(kind="extra", fqn=str(i)), read(t)) for i, t in enumerate(extra_tensors)]
        for fqn, before in self.buffers.items():
            after = results.buffers[fqn]
            if after is not before or self.recorder.values.written(before):
                outputs.append((GraphOutput(kind="buffer", fqn=fqn), read(after)))
        grad_nodes = {fqn: read(grad) for fqn, grad in results.grads.items()}
        grad_nodes = {fqn: self._over_all_micro_batches(node, fqn.rpartition(".")[0]) for fqn, node in grad_nodes.items()}
        if self.optimizer is None and clip is None:
            outputs += [(GraphOutput(kind="grad", fqn=fqn), node) for fqn, node in grad_nodes.items()]
        else:
            outputs += add_update(self, self.optimizer, grad_nodes, clip)
        return self._step_graph(outputs, extra_spec if results.extras else None)

    def _over_all_micro_batches(self, node: fx.Node, path: str) -> fx.Node:
        """A sum over the micro-batches, as soon as what it sums is there; the node itself where there is one. path: of its module."""
        if self.num_micro_batches == 1:
            return node
        recorder = self.recorder
        recorder.set_origin(Origin(path, "bwd", ""))
        with recorder.graph.inserting_after(self._later_of(node)):
            return recorder.emit(torch.ops.opweave.accumulate.default, (node, self.num_micro_batches), {}, node.meta["val"])

    def _later_of(self, node: fx.Node) -> fx.Node:
        """The node, or the last op of the forward pass where that comes later."""
        if node.op == "call_function" and node.meta["origin"].phase != "fwd":
            return node
        ops = (n for n in reversed(self.recorder.graph.nodes) if n.op == "call_function")
        return next(n for n in ops if n.meta["origin"].phase == "fwd")

    def _step_graph(self, outputs: list[tuple[GraphOutput, fx.Node]], extra_spec: Any) -> StepGraph:
        graph = self.recorder.graph
        graph.output(tuple(node for _, node in outputs))
        if self.recorder.seed is not None:
            self._insert_seed()
        _drop_dead_code(graph)
        _describe(graph)
        redo_views(graph)
        step_graph = StepGraph(
            graph=graph,
            inputs=tuple(self.inputs),
            outputs=tuple(output for output, _ in outputs),
            model_name=type(self.model).__name__,
            extra_spec=extra_spec,
            tied=_tied(self.model),
            batch_constants=self.batch_constants,
            num_micro_batches=self.num_micro_batches,
        )
        step_graph.verify()
        return step_graph

    def _insert_seed(self) -> None:
        """Describe the seed at the place where its placeholder stands."""
        names = [n.name for n in self.recorder.graph.nodes if n.op == "placeholder"]
        assert self.recorder.seed is not None
        at = names.index(self.recorder.seed.name)
        self.inputs.insert(at, GraphInput(name=self.recorder.seed.name, kind="seed", fqn="seed"))


def _explain(error: Exception) -> str:
    """The error's text; for conversions out of torch with the way out."""
    text = f"{type(error).__name__}: {error}"
    if "numpy" in text:
        return f"{text}; a captured step works with tensors only: replace the numpy conversion by torch ops"
    return text


def _drop_dead_code(graph: fx.Graph) -> None:
    """Erase what nobody uses; every op is without side effects here."""
    for node in reversed(graph.nodes):
        if node.op == "call_function" and not node.users:
            graph.erase_node(node)


def _describe(graph: fx.Graph) -> None:
    """Turn each node's `Origin` into its `OpInfo`."""
    nodes = list(graph.nodes)
    alive = set(nodes)
    origins: list[Origin | None] = [node.meta.pop("origin", None) for node in nodes]
    known: dict[int, OpInfo] = {}
    for node, origin in zip(nodes, origins, strict=True):
        if origin is None:
            continue
        if id(origin) not in known:
            partner = origin.partner.name if origin.phase == "bwd" and origin.partner in alive else ""  # type: ignore[union-attr]
            known[id(origin)] = OpInfo(path=origin.path, phase=origin.phase, partner=partner, line=origin.line)  # type: ignore[arg-type]
        node.meta["op"] = known[id(origin)]


def _names_of_tensors(model: nn.Module) -> dict[int, str]:
    return {id(t): fqn for named in (model.named_parameters, model.named_buffers) for fqn, t in named()}


def _tied(model: nn.Module) -> dict[str, str]:
    """Alias fqn -> owner fqn of parameters and buffers that several modules share."""
    tied: dict[str, str] = {}
    for named in (model.named_parameters, model.named_buffers):
        owners: dict[int, str] = {}
        for fqn, tensor in named(remove_duplicate=False):
            owner = owners.setdefault(id(tensor), fqn)
            if owner != fqn:
                tied[fqn] = owner
    return tied
