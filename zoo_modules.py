"""Plain modules of the zoo: what users write themselves. Each returns its loss and makes its own batches."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

Batch = dict[str, torch.Tensor]


class Mlp(nn.Module):
    """`depth` hidden layers of `width`, then a classifier."""

    def __init__(self, width: int, depth: int, num_classes: int) -> None:
        super().__init__()
        self.width, self.num_classes = width, num_classes
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.head = nn.Linear(width, num_classes)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """x [b, width], labels [b] -> loss."""
        for layer in self.layers:
            x = F.gelu(layer(x))
        return F.cross_entropy(self.head(x), labels)

    def make_batch(self, size: int, width: int) -> Batch:
        """`width` is given by the model."""
        return {"x": torch.randn(size, self.width), "labels": torch.randint(0, self.num_classes, (size,))}


class ConvNet(nn.Module):
    """Convolution, batch norm, ReLU and max-pooling per stage, then a classifier. A bias in front of a batch norm would do nothing."""

    def __init__(self, channels: tuple[int, ...], num_classes: int, in_channels: int = 3) -> None:
        super().__init__()
        self.in_channels, self.num_classes = in_channels, num_classes
        self.stages = nn.ModuleList()
        before = in_channels
        for count in channels:
            self.stages.append(nn.Sequential(nn.Conv2d(before, count, 3, padding=1, bias=False), nn.BatchNorm2d(count), nn.ReLU(True)))
            before = count
        self.head = nn.Linear(before, num_classes)

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """images [b, c, h, w], labels [b] -> loss."""
        for stage in self.stages:
            images = F.max_pool2d(stage(images), 2)
        return F.cross_entropy(self.head(images.mean((2, 3))), labels)

    def make_batch(self, size: int, side: int) -> Batch:
        """Square images."""
        images = torch.randn(size, self.in_channels, side, side)
        return {"images": images, "labels": torch.randint(0, self.num_classes, (size,))}


def _conv3d_block(before: int, after: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv3d(before, after, 3, padding=1, bias=False), nn.BatchNorm3d(after), nn.ReLU(inplace=True),
        nn.Conv3d(after, after, 3, padding=1, bias=False), nn.BatchNorm3d(after), nn.ReLU(inplace=True),
    )  # fmt: skip


class UNet3d(nn.Module):
    """The 3-D U-Net: a path down by max-pooling, a path up by transposed convolution, with skip connections."""

    def __init__(self, in_channels: int, channels: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        self.in_channels, self.num_classes = in_channels, num_classes
        pairs = list(zip((in_channels, *channels), channels, strict=False))
        self.down = nn.ModuleList(_conv3d_block(before, after) for before, after in pairs)
        ups = list(zip(reversed(channels), list(reversed(channels))[1:], strict=False))
        self.up = nn.ModuleList(nn.ConvTranspose3d(before, after, 2, stride=2) for before, after in ups)
        self.merge = nn.ModuleList(_conv3d_block(2 * after, after) for _, after in ups)
        self.head = nn.Conv3d(channels[0], num_classes, 1)

    def forward(self, volumes: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """volumes [b, c, d, h, w], labels [b, d, h, w] -> loss."""
        skips = []
        for i, block in enumerate(self.down):
            volumes = block(F.max_pool3d(volumes, 2) if i else volumes)
            skips.append(volumes)
        skips.pop()
        for up, merge in zip(self.up, self.merge, strict=True):
            volumes = merge(torch.cat((skips.pop(), up(volumes)), dim=1))
        return F.cross_entropy(self.head(volumes), labels)

    def make_batch(self, size: int, side: int) -> Batch:
        """Cubes of `side` voxels, which must divide by 2 for each level below the first."""
        volumes = torch.randn(size, self.in_channels, side, side, side)
        return {"volumes": volumes, "labels": torch.randint(0, self.num_classes, (size, side, side, side))}


class Gnn(nn.Module):
    """Graph convolutions: each node adds up its neighbours' messages; nodes are classified."""

    def __init__(self, features: int, width: int, depth: int, num_classes: int) -> None:
        super().__init__()
        self.features, self.num_classes = features, num_classes
        self.encode = nn.Linear(features, width)
        self.message = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.update = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(depth))
        self.head = nn.Linear(width, num_classes)

    def forward(self, nodes: torch.Tensor, source: torch.Tensor, target: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """nodes [n, features], edges from source [e] to target [e], labels [n] -> loss."""
        x = F.relu(self.encode(nodes))
        for message, update in zip(self.message, self.update, strict=True):
            gathered = torch.zeros_like(x).index_add(0, target, message(x)[source])
            x = x + F.relu(update(torch.cat((x, gathered), dim=-1)))
        return F.cross_entropy(self.head(x), labels)

    def make_batch(self, size: int, num_nodes: int) -> Batch:
        """`size` graphs of `num_nodes` nodes as one; four random edges per node, each within its graph."""
        count = size * num_nodes
        source = torch.arange(count).repeat(4)
        target = source - source % num_nodes + torch.randint(0, num_nodes, (4 * count,))
        nodes, labels = torch.randn(count, self.features), torch.randint(0, self.num_classes, (count,))
        return {"nodes": nodes, "source": source, "target": target, "labels": labels}
