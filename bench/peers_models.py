"""The models of `bench.peers`, and how opweave and each of its peers train them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

OURS = "opweave"
Batch = dict[str, torch.Tensor]
Step = Callable[[Batch], torch.Tensor]


# -- models -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One model. make: a fresh one, the same each time. make_batch: a global batch. blocks: what FSDP2 groups by. tensor_plan: styles
    for parallelize_module on so many ranks (it may adapt the model), or the reason there are none."""

    name: str
    make: Callable[[], nn.Module]
    make_batch: Callable[[nn.Module], Batch]
    blocks: Callable[[nn.Module], Sequence[nn.Module]]
    tensor_plan: Callable[[nn.Module, int], dict[str, Any] | str]


def _opt() -> nn.Module:
    from transformers import OPTConfig, OPTForCausalLM

    return OPTForCausalLM(
        OPTConfig(
            hidden_size=384, num_hidden_layers=4, num_attention_heads=6, ffn_dim=1536, word_embed_proj_dim=384, vocab_size=2048,
            max_position_embeddings=256, dropout=0.0, use_cache=False,
        )
    )  # fmt: skip


def _opt_batch(model: nn.Module) -> Batch:
    ids = torch.randint(3, 2048, (8, 128))
    return {"input_ids": ids, "labels": ids.clone()}


def _opt_styles(model: nn.Module, ranks: int) -> dict[str, Any]:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    styles: dict[str, Any] = {}
    for i, layer in enumerate(model.model.decoder.layers):  # type: ignore[union-attr, arg-type]
        layer.self_attn.num_heads //= ranks  # transformers' module counts the heads of its own projections
        at = f"model.decoder.layers.{i}."
        styles |= {at + "self_attn." + name: ColwiseParallel() for name in ("q_proj", "k_proj", "v_proj")}
        styles |= {at + "self_attn.out_proj": RowwiseParallel(), at + "fc1": ColwiseParallel(), at + "fc2": RowwiseParallel()}
    return styles


def _resnet() -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    return ResNetForImageClassification(
        ResNetConfig(embedding_size=32, hidden_sizes=[64, 128, 256], depths=[2, 2, 2], layer_type="basic", num_labels=100)
    )


def _resnet_batch(model: nn.Module) -> Batch:
    return {"pixel_values": torch.randn(16, 3, 96, 96), "labels": torch.randint(0, 100, (16,))}


def _mlp() -> nn.Module:
    from opweave.zoo_modules import Mlp

    return Mlp(width=2048, depth=4, num_classes=512)


def _mlp_batch(model: nn.Module) -> Batch:
    return {"x": torch.randn(128, 2048), "labels": torch.randint(0, 512, (128,))}


def _mlp_styles(model: nn.Module, ranks: int) -> dict[str, Any]:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    return {f"layers.{i}": RowwiseParallel() if i % 2 else ColwiseParallel() for i in range(4)}


CASES = {
    case.name: case
    for case in (
        Case(name="opt", make=_opt, make_batch=_opt_batch, blocks=lambda m: m.model.decoder.layers, tensor_plan=_opt_styles),  # type: ignore
        Case(
            name="resnet", make=_resnet, make_batch=_resnet_batch, blocks=lambda m: m.resnet.encoder.stages,  # type: ignore
            tensor_plan=lambda model, ranks: "parallelize_module has no style for Conv2d and BatchNorm2d",
        ),
        Case(name="mlp", make=_mlp, make_batch=_mlp_batch, blocks=lambda m: m.layers, tensor_plan=_mlp_styles),  # type: ignore
    )
}  # fmt: skip


def loss_of(model: nn.Module, batch: Batch) -> torch.Tensor:
    """transformers' models return an output with a loss, ours the loss."""
    out = model(**batch)
    return out if isinstance(out, torch.Tensor) else out.loss


def make_optimizer(params: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    """The same for every peer; split and whole parameters in groups of their own, since one kernel call takes one kind."""
    from torch.distributed.tensor import DTensor

    split, whole = [p for p in params if isinstance(p, DTensor)], [p for p in params if not isinstance(p, DTensor)]
    return torch.optim.AdamW([{"params": group} for group in (split, whole) if group], lr=1e-3, fused=True)


# -- peers ------------------------------------------------------------------------------------------------------------------


class NotApplicableError(Exception):
    """A peer cannot run a model; the text says why."""


def eager_step(model: nn.Module, part: Callable[[Batch], Batch]) -> Step:
    """A plain training step; part: what of the global batch this rank takes."""
    optimizer = make_optimizer(list(model.parameters()))

    def step(batch: Batch) -> torch.Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, part(batch))
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def _own_part(batch: Batch) -> Batch:
    """This rank's part of a global batch."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    return {name: tensor.chunk(ranks)[rank] for name, tensor in batch.items()}


def whole_batch(batch: Batch) -> Batch:
    """The global batch."""
    return batch


def build_opweave(case: Case, model: nn.Module, batch: Batch) -> Step:
    """What is measured. The cluster is measured too, so the plan is this machine's."""
    import opweave as ow

    # Like its peers, which train the model they are given, it needs no second copy of the parameters.
    step = ow.compile(model, ow.Cluster.detect(), optimizer=make_optimizer(list(model.parameters())), keep_model=False)
    step.prepare(batch)
    return step


def build_ddp(case: Case, model: nn.Module, batch: Batch) -> Step:
    """DistributedDataParallel with the batch norm of the global batch."""
    return build_ddp_local_bn(case, _synchronised(model), batch)


def build_ddp_local_bn(case: Case, model: nn.Module, batch: Batch) -> Step:
    """DistributedDataParallel as it comes."""
    return eager_step(nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True), _own_part)


def build_fsdp2(case: Case, model: nn.Module, batch: Batch) -> Step:
    """fully_shard of each block and of the rest."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = _synchronised(model)
    for block in case.blocks(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return eager_step(model, _own_part)


def build_tp(case: Case, model: nn.Module, batch: Batch) -> Step:
    """parallelize_module with the case's styles."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import parallelize_module

    styles = case.tensor_plan(model, dist.get_world_size())
    if isinstance(styles, str):
        raise NotApplicableError(styles)
    return eager_step(parallelize_module(model, init_device_mesh("cpu", (dist.get_world_size(),)), styles), whole_batch)


PEERS: dict[str, Callable[[Case, nn.Module, Batch], Step]] = {
    OURS: build_opweave, "ddp": build_ddp, "fsdp2": build_fsdp2, "tp": build_tp, "ddp-local-bn": build_ddp_local_bn,
}  # fmt: skip


class _GlobalBatchNorm(torch.autograd.Function):
    """Batch norm over all ranks with one exchange each way."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> tuple[torch.Tensor, ...]:
        dims = [0, *range(2, x.dim())]
        sums = torch.stack([x.sum(dims), (x * x).sum(dims)])
        dist.all_reduce(sums)
        count = x.numel() // x.shape[1] * dist.get_world_size()
        mean = sums[0] / count
        var = sums[1] / count - mean * mean
        rstd = (var + eps).rsqrt()
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.count = count
        ctx.mark_non_differentiable(mean, var)
        scale = weight * rstd
        return torch.addcmul(_channels(bias - mean * scale, x), x, _channels(scale, x)), mean, var

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        x, weight, mean, rstd = ctx.saved_tensors
        grad, dims = grads[0], [0, *range(2, x.dim())]
        db = grad.sum(dims)
        dw = ((grad * x).sum(dims) - mean * db) * rstd
        sums = torch.stack([db, dw])
        dist.all_reduce(sums)
        sums /= ctx.count
        slope = weight * rstd
        by_x = slope * rstd * sums[1]
        dx = grad * _channels(slope, x)
        dx.addcmul_(x, _channels(-by_x, x)).add_(_channels(by_x * mean - slope * sums[0], x))
        return dx, dw, db, None


def _channels(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return values.view(1, -1, *[1] * (like.dim() - 2))


class _SynchronisedBatchNorm(nn.BatchNorm2d):
    """nn.SyncBatchNorm computes on GPUs only; this is the same for gloo."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out, mean, var = _GlobalBatchNorm.apply(x, self.weight, self.bias, self.eps)  # type: ignore[no-untyped-call]
        count = x.numel() // x.shape[1] * dist.get_world_size()
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)  # type: ignore[union-attr, arg-type]
            self.running_var.lerp_(var * (count / (count - 1)), self.momentum)  # type: ignore[union-attr, arg-type]
        return out


def _synchronised(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = _SynchronisedBatchNorm
    return model


def peers_of(case: Case) -> list[str]:
    """The peers that say something about a model."""
    has_batch_norm = any(isinstance(m, nn.BatchNorm2d) for m in case.make().modules())
    return [name for name in PEERS if name != "ddp-local-bn" or has_batch_norm]
