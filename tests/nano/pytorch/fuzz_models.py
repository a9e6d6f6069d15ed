"""Small models drawn at random, each with a sample: what the accelerators are tried on."""

from __future__ import annotations

import math
import random
from collections import namedtuple
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass
class Answer:
    scores: torch.Tensor
    hidden: torch.Tensor | None = None


Pair = namedtuple("Pair", "first second")


class Pictures(nn.Module):
    """Convolutions, norms, pools, activations in any order, over 1, 2 or 3 axes."""

    def __init__(self, draw: random.Random) -> None:
        super().__init__()
        self.axes = draw.choice([1, 2, 2, 2, 3])
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[self.axes - 1]
        transposed = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[self.axes - 1]
        batch_norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[self.axes - 1]
        pools = (
            (nn.MaxPool1d, nn.AvgPool1d, nn.AdaptiveAvgPool1d, nn.AdaptiveMaxPool1d),
            (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d),
            (nn.MaxPool3d, nn.AvgPool3d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool3d),
        )[self.axes - 1]
        self.channels = width = draw.choice([1, 2, 3, 5])
        layers = []
        for _ in range(draw.randint(1, 4)):
            kind = draw.choice(["conv", "conv", "conv", "grouped", "transposed", "dilated"])
            new = draw.choice([1, 2, 4, 7, 8])
            kernel = draw.choice([1, 2, 3, 5])
            if kind == "grouped":
                layers.append(conv(width, width * 2, kernel, padding=2, groups=width))
                new = width * 2
            elif kind == "transposed":
                layers.append(transposed(width, new, kernel, stride=draw.choice([1, 2])))
            elif kind == "dilated":
                layers.append(conv(width, new, kernel, padding=4, dilation=2))
            else:
                mode = draw.choice(["zeros", "zeros", "reflect", "replicate", "circular"])
                stride = draw.choice([1, 1, 2])
                layers.append(
                    conv(width, new, kernel, stride, padding=kernel // 2, padding_mode=mode)
                )
            width = new
            norm = draw.choice(["batch", "batch", "group", "instance", "none"])
            if norm == "batch":
                layers.append(batch_norm(width))
            elif norm == "group":
                layers.append(nn.GroupNorm(1, width))
            elif norm == "instance":
                layers.append(nn.GroupNorm(width, width))
            layers.append(activation(draw))
            if draw.random() < 0.3:
                layers.append(draw.choice([nn.Dropout(0.5), nn.Identity()]))
            if draw.random() < 0.25:
                layers.append(draw.choice(pools[:2])(2, padding=draw.choice([0, 1])))
        self.layers = nn.Sequential(*layers)
        size = draw.choice([1, 2, 3])
        self.pool = draw.choice(pools[2:])(size)
        self.head = nn.Linear(width * size**self.axes, draw.choice([1, 2, 10]))
        self.residual = draw.random() < 0.3
        self.softmax = draw.random() < 0.3

    def sample(self, draw: random.Random) -> tuple[torch.Tensor, ...]:
        shape = [draw.choice([9, 12, 15, 16]) for _ in range(self.axes)]
        return (torch.randn(draw.choice([1, 2, 4]), self.channels, *shape),)

    def forward(self, x):
        y = self.layers(x)
        if self.residual:
            y = y + torch.sigmoid(y).mean(1, keepdim=True)
        y = self.head(self.pool(y).flatten(1))
        return y.softmax(-1) if self.softmax else y


class Words(nn.Module):
    """Embeddings, attention or a recurrent layer, with or without a mask."""

    def __init__(self, draw: random.Random) -> None:
        super().__init__()
        self.heads = draw.choice([1, 2, 4])
        self.width = self.heads * draw.choice([2, 4, 8])
        self.words = draw.choice([11, 50])
        self.embed = nn.Embedding(self.words, self.width, padding_idx=draw.choice([None, 0]))
        self.position = nn.Parameter(torch.randn(1, 32, self.width))
        self.kind = draw.choice(["sdpa", "own", "mha", "encoder", "lstm", "gru", "bag", "conv"])
        if self.kind == "mha":
            self.mix = nn.MultiheadAttention(self.width, self.heads, batch_first=True)
        elif self.kind == "encoder":
            self.mix = nn.TransformerEncoderLayer(
                self.width, self.heads, 16, batch_first=True, norm_first=draw.random() < 0.5
            )
        elif self.kind in ("lstm", "gru"):
            cell = nn.LSTM if self.kind == "lstm" else nn.GRU
            self.mix = cell(
                self.width, self.width, num_layers=draw.choice([1, 2]), batch_first=True,
                bidirectional=draw.random() < 0.5,
            )  # fmt: skip
        elif self.kind == "conv":
            self.mix = nn.Conv1d(self.width, self.width, 3, padding=1)
        else:
            self.mix = nn.Linear(self.width, 3 * self.width)
        wide = self.width * (2 if getattr(self.mix, "bidirectional", False) else 1)
        self.norm = nn.LayerNorm(wide)
        self.head = nn.Linear(wide, draw.choice([2, self.words]))
        self.masked = draw.random() < 0.6
        self.form = draw.choice(["tensor", "tuple", "dict", "object"])

    def sample(self, draw: random.Random) -> dict[str, torch.Tensor]:
        rows, length = draw.choice([1, 2, 3]), draw.choice([5, 8])
        kind = draw.choice([torch.int64, torch.int64, torch.int32])
        batch = {"ids": torch.randint(0, self.words, (rows, length)).to(kind)}
        if self.masked:
            mask = torch.ones(rows, length, dtype=draw.choice([torch.bool, torch.int64]))
            mask[:, -2:] = 0
            batch["mask"] = mask
        return batch

    def forward(self, ids, mask=None):
        x = self.embed(ids) + self.position[:, : ids.shape[1]]
        if self.kind == "mha":
            ignored = None if mask is None else ~mask.bool()
            x = x + self.mix(x, x, x, key_padding_mask=ignored, need_weights=False)[0]
        elif self.kind == "encoder":
            x = self.mix(x, src_key_padding_mask=None if mask is None else ~mask.bool())
        elif self.kind in ("lstm", "gru"):
            x = self.mix(x)[0]
        elif self.kind == "conv":
            x = self.mix(x.transpose(1, 2)).transpose(1, 2)
        elif self.kind != "bag":
            x = x + self.attend(x, mask)
        x = self.norm(x)
        weights = torch.ones_like(x[..., :1]) if mask is None else mask[..., None].to(x.dtype)
        pooled = (x * weights).sum(1) / weights.sum(1).clamp(min=1)
        scores = self.head(pooled)
        return {
            "tensor": lambda: scores,
            "tuple": lambda: (scores, x),
            "dict": lambda: {"scores": scores, "best": scores.argmax(-1)},
            "object": lambda: Answer(scores, x),
        }[self.form]()

    def attend(self, x, mask):
        rows, length, width = x.shape
        q, k, v = (
            part.view(rows, length, self.heads, -1).transpose(1, 2)
            for part in self.mix(x).chunk(3, -1)
        )
        keep = None if mask is None else mask.bool()[:, None, None, :]
        if self.kind == "sdpa":
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=keep)
        else:
            scores = q @ k.transpose(-1, -2) / math.sqrt(width // self.heads)
            if keep is not None:
                scores = scores.masked_fill(~keep, float("-inf"))
            y = scores.softmax(-1) @ v
        return y.transpose(1, 2).reshape(rows, length, width)


class Table(nn.Module):
    """Dense layers over numbers and categories, several inputs, many odd operators."""

    def __init__(self, draw: random.Random) -> None:
        super().__init__()
        self.numbers, self.categories = draw.randint(1, 9), draw.randint(1, 4)
        self.sizes = [draw.choice([2, 7, 30]) for _ in range(self.categories)]
        self.embed = nn.ModuleList(nn.Embedding(n, 3) for n in self.sizes)
        width = self.numbers + 3 * self.categories
        layers = []
        for _ in range(draw.randint(1, 3)):
            new = draw.choice([4, 16, 33])
            layers += [nn.Linear(width, new, bias=draw.random() < 0.8), activation(draw)]
            if draw.random() < 0.5:
                layers.append(draw.choice([nn.BatchNorm1d(new), nn.LayerNorm(new)]))
            width = new
        self.body = nn.Sequential(*layers)
        self.heads = nn.ModuleList(nn.Linear(width, draw.choice([1, 3])) for _ in range(2))
        self.twist = draw.choice(TWISTS)
        self.form = draw.choice(["tuple", "list", "dict", "named", "nested", "one"])

    def sample(self, draw: random.Random) -> tuple[torch.Tensor, ...]:
        rows = draw.choice([1, 2, 3, 8])
        categories = [torch.randint(0, n, (rows,)) for n in self.sizes]
        return torch.randn(rows, self.numbers), torch.stack(categories, 1)

    def forward(self, numbers, categories, scale: float = 1.0):
        parts = [embed(categories[:, i]) for i, embed in enumerate(self.embed)]
        x = self.twist(self.body(torch.cat([numbers * scale, *parts], 1)))
        a, b = (head(x) for head in self.heads)
        return {
            "tuple": lambda: (a, b),
            "list": lambda: [a, b.exp().clamp(max=5)],
            "dict": lambda: {"a": a, "b": b, "none": None},
            "named": lambda: Pair(a, b),
            "nested": lambda: {"a": (a, [b]), "both": torch.cat([a, b], 1)},
            "one": lambda: a.squeeze(-1) if a.shape[-1] == 1 else a,
        }[self.form]()


TWISTS = (
    lambda x: x,
    lambda x: x - x.mean(0, keepdim=True),  # over the rows: legal, if unusual
    lambda x: torch.where(x > 0, x, 0.1 * x),
    lambda x: x / (x.norm(dim=1, keepdim=True) + 1e-3),
    lambda x: x.cumsum(1),
    lambda x: torch.sort(x, dim=1).values,
    lambda x: torch.topk(x, 2, dim=1).values.repeat(1, (x.shape[1] + 1) // 2)[:, : x.shape[1]],
    lambda x: torch.einsum("bi,bj->bij", x, x).mean(2),
    lambda x: x.flip(1) + torch.roll(x, 1, 1),
    lambda x: torch.atan(x) + torch.erf(x) + x.abs().sqrt(),
    lambda x: F.pad(x, (1, 1))[:, 1:-1] * x.var(1, keepdim=True),
    lambda x: F.one_hot(x.argmax(1), x.shape[1]).to(x.dtype) + x,
    lambda x: x.gather(1, x.argsort(1)),
    lambda x: torch.stack([x, -x], 2).amax(2),
    lambda x: F.normalize(x, dim=1) @ torch.eye(x.shape[1]),
    lambda x: x + torch.arange(x.shape[0], dtype=x.dtype)[:, None] / 10,
    lambda x: torch.logsumexp(x, 1, keepdim=True) + torch.tril(x[:, :, None] * x[:, None]).sum(2),
    lambda x: F.interpolate(x[:, None], scale_factor=2.0, mode="linear").squeeze(1)[:, ::2],
)


class Scene(nn.Module):
    """An encoder and a decoder that meet: a picture the size of the input comes out."""

    def __init__(self, draw: random.Random) -> None:
        super().__init__()
        width = draw.choice([4, 8])
        self.down = nn.Conv2d(3, width, 3, stride=2, padding=1)
        self.mid = nn.Conv2d(width, width, 3, padding=1, groups=draw.choice([1, width]))
        self.up_mode = draw.choice(["nearest", "bilinear", "transposed", "shuffle"])
        self.up = {
            "transposed": lambda: nn.ConvTranspose2d(width, width, 2, stride=2),
            "shuffle": lambda: nn.Sequential(nn.Conv2d(width, 4 * width, 1), nn.PixelShuffle(2)),
        }.get(self.up_mode, nn.Identity)()
        self.out = nn.Conv2d(width + 3, draw.choice([1, 2]), 1)
        self.act = activation(draw)
        self.labels = draw.random() < 0.3

    def sample(self, draw: random.Random) -> tuple[torch.Tensor, ...]:
        side = draw.choice([8, 12])
        return (torch.rand(draw.choice([1, 3]), 3, side, side),)

    def forward(self, picture):
        y = self.act(self.mid(self.act(self.down(picture))))
        if self.up_mode in ("nearest", "bilinear"):
            y = F.interpolate(y, size=picture.shape[-2:], mode=self.up_mode)
        y = self.out(torch.cat([self.up(y), picture], 1))
        return (y, y.argmax(1)) if self.labels else y


def activation(draw: random.Random) -> nn.Module:
    return draw.choice(
        [nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Tanh, nn.LeakyReLU, nn.ELU, nn.Hardswish,
         nn.Sigmoid, nn.Softplus, nn.Mish, nn.PReLU, nn.Hardtanh, nn.CELU]
    )()  # fmt: skip


FAMILIES = (Pictures, Pictures, Words, Words, Table, Table, Scene)


def make(seed: int) -> tuple[nn.Module, object]:
    """Model and sample of ``seed``; the global random streams are left alone."""
    draw = random.Random(seed)
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        while True:  # some draws shrink a picture away
            try:
                model, sample = _drawn(draw)
            except RuntimeError:
                continue
            break
    model.train(draw.random() < 0.5)
    return model, sample


def _drawn(draw: random.Random) -> tuple[nn.Module, object]:
    with torch.no_grad():
        model = draw.choice(FAMILIES)(draw).eval()
        for module in model.modules():  # statistics that are not those of a fresh layer
            if isinstance(getattr(module, "running_mean", None), torch.Tensor):
                nn.init.normal_(module.running_mean, 0, 0.3)
                nn.init.uniform_(module.running_var, 0.5, 2)
        sample = model.sample(draw)
        args, kwargs = ((), sample) if isinstance(sample, dict) else (sample, {})
        model(*args, **kwargs)
    return model, sample
