"""The MLP autoencoder and the masked autoencoder in PyTorch, as a PyTorch user would write them: what is to be beaten.

The same arithmetic as `mae_align.models`, after He et al. (2022): same shapes and losses, random patches by sorting
noise, AdamW on the same parameters, clipping by the global norm. Where PyTorch has something faster it is used: fused
attention (`scaled_dot_product_attention`), fused AdamW, autocast for bf16. PyTorch is no dependency of this project:
only `train_step --torch` and a test that is skipped without it import this module.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
import torch.nn.functional as F  # pyright: ignore[reportMissingImports]
from torch import nn  # pyright: ignore[reportMissingImports]

EPSILON = 1e-6  # of every layer normalisation


@dataclass(frozen=True)
class MaskedSizes:
    """Shapes of a masked autoencoder; `visible` of the patches are seen by the encoder."""

    image_shape: tuple[int, int, int]
    patch_size: int
    visible: int
    width: int
    depth: int
    heads: int
    decoder_width: int
    decoder_depth: int
    decoder_heads: int
    mlp_ratio: int = 4

    @property
    def patches(self) -> int:
        height, width, _ = self.image_shape
        return (height // self.patch_size) * (width // self.patch_size)

    @property
    def patch_dim(self) -> int:
        return self.patch_size**2 * self.image_shape[2]


class Normalize(nn.Module):
    """(images - mean) / scale."""

    def __init__(self, mean: np.ndarray, scale: float) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32))
        self.scale = scale

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return (images.float() - self.mean) / self.scale


class MLP(nn.Module):
    """Dense layers with an activation between them, latent and output linear; loss in normalised units per pixel."""

    def __init__(self, normalize: Normalize, hidden: tuple[int, ...], latent: int, approximate: str) -> None:
        super().__init__()
        pixels = normalize.mean.numel()
        self.normalize, self.approximate = normalize, approximate
        sizes = (pixels, *hidden, latent)
        self.down = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))
        self.up = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes[::-1]))

    def _run(self, layers: nn.ModuleList, x: torch.Tensor) -> torch.Tensor:
        for index, layer in enumerate(layers):
            x = layer(x)
            if index < len(layers) - 1:
                x = F.gelu(x, approximate=self.approximate)
        return x

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.normalize(images).flatten(1)
        return F.mse_loss(self._run(self.up, self._run(self.down, x)).float(), x)


class Block(nn.Module):
    """Transformer block with the normalisation first."""

    def __init__(self, width: int, heads: int, mlp_ratio: int, approximate: str) -> None:
        super().__init__()
        self.heads, self.approximate = heads, approximate
        self.norm1, self.norm2 = nn.LayerNorm(width, EPSILON), nn.LayerNorm(width, EPSILON)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, mlp_ratio * width), nn.Linear(mlp_ratio * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = x.shape
        heads = self.qkv(self.norm1(x)).view(batch, tokens, 3, self.heads, width // self.heads)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, tokens, width))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate=self.approximate))


class MaskedAutoencoder(nn.Module):
    """He et al. (2022): the encoder sees the visible patches, a light decoder predicts the hidden ones.

    Tokens stay in their random order (attention does not see it), so nothing is sorted back, as in `mae_align.models`.
    """

    def __init__(
        self,
        normalize: Normalize,
        sizes: MaskedSizes,
        *,
        norm_pix: bool,
        approximate: str,
        positions: np.ndarray,
        decoder_positions: np.ndarray,
    ) -> None:
        super().__init__()
        self.normalize, self.sizes, self.norm_pix = normalize, sizes, norm_pix
        width, decoder_width = sizes.width, sizes.decoder_width
        self.embed = nn.Linear(sizes.patch_dim, width)
        self.class_token = nn.Parameter(torch.randn(width) * 0.02)
        self.mask_token = nn.Parameter(torch.randn(decoder_width) * 0.02)
        self.register_buffer("positions", torch.tensor(positions))
        self.register_buffer("decoder_positions", F.pad(torch.tensor(decoder_positions), (0, 0, 1, 0)))
        self.blocks = nn.ModuleList(Block(width, sizes.heads, sizes.mlp_ratio, approximate) for _ in range(sizes.depth))
        self.norm = nn.LayerNorm(width, EPSILON)
        self.decoder_embed = nn.Linear(width, decoder_width)
        self.decoder_blocks = nn.ModuleList(
            Block(decoder_width, sizes.decoder_heads, sizes.mlp_ratio, approximate) for _ in range(sizes.decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(decoder_width, EPSILON)
        self.head = nn.Linear(decoder_width, sizes.patch_dim)

    def patchify(self, images: torch.Tensor) -> torch.Tensor:
        """[b, h, w, c] to [b, patches, patch_dim]."""
        height, width, channels = self.sizes.image_shape
        side = self.sizes.patch_size
        x = images.view(-1, height // side, side, width // side, side, channels)
        return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, self.sizes.patches, self.sizes.patch_dim)

    def forward(self, images: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """Mean squared error on the hidden patches. noise [b, patches]: the smallest ones stay visible."""
        patches = self.patchify(self.normalize(images))
        batch, count, size = patches.shape
        order = (torch.rand(batch, count) if noise is None else noise).argsort(dim=1)
        visible = self.sizes.visible
        patches = patches.gather(1, order[..., None].expand(-1, -1, size))

        x = self.embed(patches[:, :visible]) + self.positions[order[:, :visible]]
        x = torch.cat([self.class_token.expand(batch, 1, -1).to(x.dtype), x], dim=1)
        for block in self.blocks:
            x = block(x)
        x = self.decoder_embed(self.norm(x))

        x = torch.cat([x, self.mask_token.expand(batch, count - visible, -1).to(x.dtype)], dim=1)
        x = x + self.decoder_positions[F.pad(order + 1, (1, 0))]
        for block in self.decoder_blocks:
            x = block(x)
        prediction = self.head(self.decoder_norm(x)[:, 1 + visible :]).float()

        target = patches[:, visible:]
        if self.norm_pix:
            variance, mean = torch.var_mean(target, dim=-1, keepdim=True)
            target = (target - mean) / (variance + 1e-6).sqrt()
        return F.mse_loss(prediction, target)


class TorchRun:
    """Training steps on images that lie in memory, each batch gathered in random order as in `Training`."""

    def __init__(
        self,
        model: nn.Module,
        images: np.ndarray,
        batch_size: int,
        *,
        half: bool,
        clip_norm: float,
        learning_rate: float,
        weight_decay: float,
        b1: float,
        b2: float,
        eps: float,
    ) -> None:
        self.model, self.batch_size, self.half, self.clip_norm = model.train(), batch_size, half, clip_norm
        self.images = torch.from_numpy(images)
        self.order, self.position = torch.randperm(len(images)), 0
        parameters = list(model.parameters())
        groups = [  # biases, scales of norms and tokens do not decay
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(b1, b2), eps=eps, fused=True)

    def __call__(self, steps: int) -> float:
        """Train this many steps; the last loss."""
        loss = torch.zeros(())
        for _ in range(steps):
            if self.position + self.batch_size > len(self.images):
                self.order, self.position = torch.randperm(len(self.images)), 0
            batch = self.images[self.order[self.position : self.position + self.batch_size]]
            self.position += self.batch_size
            self.optimizer.zero_grad(set_to_none=True)
            with torch.autocast("cpu", torch.bfloat16) if self.half else contextlib.nullcontext():
                loss = self.model(batch)
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
            self.optimizer.step()
        return float(loss.detach())


class MatmulRate:
    """Operations per second of PyTorch's products of square matrices: the best seen so far."""

    def __init__(self, half: bool, sizes: Sequence[int], repeats: int = 3) -> None:
        dtype = torch.bfloat16 if half else torch.float32
        self._squares = [torch.ones(size, size, dtype=dtype) for size in sizes]
        self._repeats = repeats
        self.best = 0.0

    def __call__(self) -> None:
        """Measure once more."""
        for square in self._squares:
            for _ in range(self._repeats):
                start = time.perf_counter()
                _ = square @ square
                self.best = max(self.best, 2 * len(square) ** 3 / (time.perf_counter() - start))


def use_threads(count: int) -> None:
    """Threads of every operation from now on."""
    torch.set_num_threads(count)


def version() -> str:
    """Of PyTorch."""
    return torch.__version__
