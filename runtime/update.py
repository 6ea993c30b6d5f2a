"""The optimizer update of a local program: torch's own fused kernels, on whatever pieces of the parameters a rank holds.

One node per parameter group: `fused_update(params, grads, states, kind, group, fqns)`. Hyper-parameters are read from the user's
`torch.optim` object at every call, so learning-rate schedulers and edits of `param_groups` work; step counts live in the
`ProgramState`. With whole tensors the result equals `torch.optim.<kind>(..., fused=True)` bit for bit (SGD in half precision on the CPU:
`foreach=False`; torch's fused kernel is wrong there).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .. import torch_compat
from . import collectives

# Optimizer class name → its state per parameter, in the order of `states[i]`. What depends on options may be left out.
STATE_SLOTS = {
    "SGD": ("momentum_buffer",),
    "Adam": ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
    "AdamW": ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
}


def state_slots(kind: str, group: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the state tensors a parameter has under the options of its group. Raises ValueError for an unknown optimizer."""
    if kind not in STATE_SLOTS:
        raise ValueError(f"no fused update for the optimizer {kind!r}; there are {sorted(STATE_SLOTS)}")
    if kind == "SGD":
        return STATE_SLOTS[kind] if group["momentum"] != 0 else ()
    return STATE_SLOTS[kind] if group["amsgrad"] else STATE_SLOTS[kind][:2]


def fused_update(
    params: list[torch.Tensor],
    grads: list[torch.Tensor],
    states: list[list[torch.Tensor]],
    kind: str,
    group: int,
    fqns: list[str],
    loss: torch.Tensor | None = None,
) -> list[torch.Tensor]:
    """Update parameters by their gradients, in place where the memory layout allows.

    With a `loss` that is NaN or infinite nothing is changed: what was learned so far is not lost to one bad batch.

    states[i]: the state tensors of params[i] in the order of `state_slots`. group: index into the optimizer's `param_groups`.
    Returns the new values, flat: all parameters, then the states of the first, of the second, ... Use these, not the inputs.
    """
    raise RuntimeError("update.fused_update was called outside an executor, so it has no optimizer; run the program with an Executor.")


def written(node: fx.Node) -> Iterator[fx.Node]:
    """The values an update node may overwrite, and what they are pieces of."""
    params: Any = node.args[0] if node.args else node.kwargs["params"]
    states: Any = node.args[2] if len(node.args) > 2 else node.kwargs["states"]
    found = [*params, *(state for slots in states for state in slots)]
    while found:
        value = found.pop()
        yield value
        if value.op == "call_function" and value.target is collectives.take_shard:
            found.append(value.args[0])


def update_on_paper(
    params: list[torch.Tensor], grads: list[torch.Tensor], states: list[list[torch.Tensor]], *_rest: Any
) -> list[torch.Tensor]:
    """What `fused_update` returns, as memory: parameters and states, changed in place where they are not strided pieces."""
    params, _, states = _aligned(params, grads, states)
    return params + [state for slots in states for state in slots]


class Updater:
    """Runs update nodes of one rank.

    steps: fqn → number of updates done (a float32 scalar, as torch keeps it), filled here. optimizer: gives `param_groups`.
    kind: the optimizer class the program was made for. Raises ValueError where the optimizer does not fit the program.
    """

    def __init__(self, steps: dict[str, torch.Tensor], optimizer: torch.optim.Optimizer | None, kind: str) -> None:
        if kind and optimizer is None:
            raise ValueError(f"this program updates its parameters with {kind}: give the executor the optimizer it was compiled with")
        if kind and type(optimizer).__name__ != kind:
            raise ValueError(
                f"this program was compiled for {kind}, the optimizer given is a {type(optimizer).__name__}; give the same kind, or "
                "compile again for this one"
            )
        self.steps = steps
        self.optimizer = optimizer

    def bindings(self) -> dict[Callable[..., Any], Callable[..., Any]]:
        """What an executor calls instead of the graph's functions."""
        return {fused_update: self.fused_update}

    def fused_update(
        self,
        params: list[torch.Tensor],
        grads: list[torch.Tensor],
        states: list[list[torch.Tensor]],
        kind: str,
        group: int,
        fqns: list[str],
        loss: torch.Tensor | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> list[torch.Tensor]:
        """See the function of this name. options: hyper-parameters; those the group has now unless given."""
        options = options or self._options(group)
        _check_slots(kind, group, options, states)
        if loss is not None and not bool(torch.isfinite(loss).all()):
            return params + [state for slots in states for state in slots]
        params, grads, states = _aligned(params, grads, states)
        counts = [self._count(fqn, param, kind) for fqn, param in zip(fqns, params, strict=True)]
        for chosen in _by_dtype(params):
            _KERNELS[kind](
                [params[i] for i in chosen],
                [grads[i] for i in chosen],
                [states[i] for i in chosen],
                [counts[i] for i in chosen],
                options,
            )
        return params + [state for slots in states for state in slots]

    def options_now(self, group: int) -> dict[str, Any]:
        """The hyper-parameters of a group as they are, for an update that runs later."""
        options = dict(self._options(group))
        return options | {"lr": float(options["lr"])}

    def _options(self, group: int) -> Mapping[str, Any]:
        groups = self.optimizer.param_groups if self.optimizer is not None else []
        if not 0 <= group < len(groups):
            raise ValueError(
                f"the program updates parameter group {group}, the optimizer has {len(groups)}: its groups must stay as they were when "
                "the step was compiled"
            )
        return groups[group]

    def _count(self, fqn: str, param: torch.Tensor, kind: str) -> torch.Tensor:
        """Updates done so far. Beside the parameter where the kernel reads it; on the CPU for SGD, where only we do."""
        count = self.steps.get(fqn)
        device = torch.device("cpu") if kind == "SGD" else param.device
        if count is None or count.device != device:
            count = torch.zeros((), device=device) if count is None else count.to(device)
            self.steps[fqn] = count
        return count


def _check_slots(kind: str, group: int, options: Mapping[str, Any], states: list[list[torch.Tensor]]) -> None:
    have, want = len(states[0]), len(state_slots(kind, options))
    if have != want:
        raise ValueError(
            f"parameter group {group} of {kind} had {have} state tensors per parameter when the step was compiled, its options now ask for "
            f"{want}: momentum and amsgrad must stay as they were; compile again"
        )


def _aligned(
    params: Sequence[torch.Tensor], grads: Sequence[torch.Tensor], states: Sequence[Sequence[torch.Tensor]]
) -> tuple[list[torch.Tensor], list[torch.Tensor], list[list[torch.Tensor]]]:
    """The same values in one memory layout per parameter: the kernels walk the memory of all of them in parallel.

    A piece that is a strided view is copied; its update then is a new tensor and the old one stays as it was.
    """
    params = [p if _is_dense(p) else p.contiguous() for p in params]
    grads = [_like(g, p) for g, p in zip(grads, params, strict=True)]
    return params, grads, [[_like(s, p) for s in slots] for slots, p in zip(states, params, strict=True)]


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether the elements fill their memory without gaps or overlaps, in any order of dims."""
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _like(value: torch.Tensor, param: torch.Tensor) -> torch.Tensor:
    assert value.shape == param.shape, f"an update of {tuple(param.shape)} with {tuple(value.shape)}"
    return value if value.stride() == param.stride() else torch.empty_like(param, dtype=value.dtype).copy_(value)


def _by_dtype(params: Sequence[torch.Tensor]) -> list[list[int]]:
    """Positions that go into one kernel call."""
    found: dict[torch.dtype, list[int]] = {}
    for i, param in enumerate(params):
        found.setdefault(param.dtype, []).append(i)
    return list(found.values())


Tensors = list[torch.Tensor]

WIDENED_ELEMENTS = 1 << 24
"""Gradients of a narrower type than their parameter are widened so many at a time: 64 MiB of float32."""


@dataclass(frozen=True, slots=True)
class _Call:
    """Operands of one call of a kernel."""

    params: Tensors
    grads: Tensors
    states: list[Tensors]
    counts: Tensors


def _calls(params: Tensors, grads: Tensors, states: list[Tensors], counts: Tensors) -> Iterator[_Call]:
    """One call for all, or where gradients are of a narrower type than their parameters one per piece, widened for it."""
    if all(grad.dtype == param.dtype for param, grad in zip(params, grads, strict=True)):
        yield _Call(params, grads, states, counts)
        return
    for param, grad, slots, count in zip(params, grads, states, counts, strict=True):
        whole, narrow, *flat = (_flat(tensor) for tensor in (param, grad, *slots))
        for start in range(0, param.numel(), WIDENED_ELEMENTS):
            piece = slice(start, start + WIDENED_ELEMENTS)
            yield _Call([whole[piece]], [narrow[piece].to(param.dtype)], [[slot[piece] for slot in flat]], [count])


def _flat(dense: torch.Tensor) -> torch.Tensor:
    """The elements of a dense tensor in the order of its memory."""
    return dense.as_strided((dense.numel(),), (1,))


def _adam(params: Tensors, grads: Tensors, states: list[Tensors], counts: Tensors, options: Mapping[str, Any], decoupled: bool) -> None:
    torch_compat.foreach_add_(counts, 1)
    kernel = torch_compat.fused_adamw if decoupled or options.get("decoupled_weight_decay") else torch_compat.fused_adam
    beta1, beta2 = options["betas"]
    for part in _calls(params, grads, states, counts):
        kernel(
            part.params,
            part.grads,
            [slots[0] for slots in part.states],
            [slots[1] for slots in part.states],
            [slots[2] for slots in part.states] if options["amsgrad"] else [],
            part.counts,
            amsgrad=options["amsgrad"],
            lr=float(options["lr"]),
            beta1=float(beta1),
            beta2=float(beta2),
            weight_decay=options["weight_decay"],
            eps=options["eps"],
            maximize=options["maximize"],
        )


def _sgd(params: Tensors, grads: Tensors, states: list[Tensors], counts: Tensors, options: Mapping[str, Any]) -> None:
    if params[0].device.type == "cpu" and params[0].dtype in (torch.bfloat16, torch.float16):
        # torch's CPU kernel leaves most of a half-precision parameter as it is (pytorch issue 191763, seen in 2.12 and 2.13).
        _sgd_loop(params, grads, states, counts, options)
        return
    # torch's first step takes the gradient itself as momentum buffer, without dampening.
    first = [i for i, count in enumerate(counts) if not count]
    later = [i for i, count in enumerate(counts) if count]
    torch_compat.foreach_add_(counts, 1)
    for chosen, is_first in ((first, True), (later, False)):
        mine = ([params[i] for i in chosen], [grads[i] for i in chosen], [states[i] for i in chosen], [counts[i] for i in chosen])
        for part in _calls(*mine) if chosen else ():
            torch_compat.fused_sgd(
                part.params,
                part.grads,
                [slots[0] for slots in part.states] if options["momentum"] != 0 else [],
                weight_decay=options["weight_decay"],
                momentum=options["momentum"],
                lr=float(options["lr"]),
                dampening=options["dampening"],
                nesterov=options["nesterov"],
                maximize=options["maximize"],
                is_first_step=is_first and options["momentum"] != 0,
            )


def _sgd_loop(params: Tensors, grads: Tensors, states: list[Tensors], counts: Tensors, options: Mapping[str, Any]) -> None:
    """The same update op by op, as `torch.optim.SGD(foreach=False)` rounds it."""
    for param, value, slots, count in zip(params, grads, states, counts, strict=True):
        grad = -value if options["maximize"] else value
        if options["weight_decay"] != 0:
            grad = grad.add(param, alpha=options["weight_decay"])
        if options["momentum"] != 0:
            buffer = slots[0]
            if count:
                buffer.mul_(options["momentum"]).add_(grad, alpha=1 - options["dampening"])
            else:
                buffer.copy_(grad)
            grad = grad.add(buffer, alpha=options["momentum"]) if options["nesterov"] else buffer
        param.add_(grad, alpha=-float(options["lr"]))
        count += 1


_KERNELS: dict[str, Callable[..., None]] = {
    "SGD": _sgd,
    "Adam": functools.partial(_adam, decoupled=False),
    "AdamW": functools.partial(_adam, decoupled=True),
}
