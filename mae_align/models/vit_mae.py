"""Masked autoencoder with a vision transformer (He et al., 2022, arXiv 2111.06377)."""

from __future__ import annotations

import dataclasses
import enum
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from mae_align.corruption import Corruption, FixedCountPatchMasking
from mae_align.data.patches import patch_hw
from mae_align.models.base import Autoencoder, Metrics, ModelKind
from mae_align.models.layers import Activation, Block, Dense, LayerNorm, check_heads
from mae_align.models.pixels import Array, Constant, Pixels
from mae_align.runtime.errors import InputError

# Added to the variance of a patch before its root, as in the published code.
_PATCH_EPSILON = 1e-6


class Loss(enum.Enum):
    """What a masked autoencoder is trained for: a mean squared error, of which patches and in which units.

    With x the normalised image (units of :class:`Pixels`) and f the prediction:

    - ``standard``: |f - (x - mean) / deviation|^2 over hidden patches, with the mean and the deviation of each patch
      (unbiased variance + 1e-6), as published.
    - ``hidden``: |f - x|^2 over hidden patches.
    - ``matched``: |f - x|^2 over all pixels, the objective of Theorem 3 with this mask.
    """

    standard = "standard"
    hidden = "hidden"
    matched = "matched"

    def check(self, num_hidden: int, patch_dim: int) -> None:
        """Refuse no hidden patch where only hidden ones count, and ``standard`` with patches of one value."""
        if num_hidden == 0 and self is not Loss.matched:
            raise InputError(
                "a loss on hidden patches is empty where none is hidden: lower num_visible or use Loss.matched"
            )
        if patch_dim < 2 and self is Loss.standard:
            raise InputError("a patch of one value has no variance to divide by: use Loss.hidden")

    def scored(self, patches: jax.Array, num_visible: int) -> jax.Array:
        """The patches that count, of [b, N, ...] with the ``num_visible`` visible ones first."""
        return patches if self is Loss.matched else patches[:, num_visible:]

    def targets(self, patches: jax.Array) -> jax.Array:
        """What is to be predicted for normalised patches [b, N, patch_dim]."""
        if self is not Loss.standard:
            return patches
        mean, deviation = patch_statistics(patches)
        return (patches - mean) / deviation

    def pixels_of(self, predicted: jax.Array, patches: jax.Array) -> jax.Array:
        """Normalised patches of predictions, inverse of :meth:`targets`; ``patches`` lend their statistics."""
        if self is not Loss.standard:
            return predicted
        mean, deviation = patch_statistics(patches)
        return predicted * deviation + mean


@dataclasses.dataclass(frozen=True)
class VitSize:
    """Sizes of encoder and decoder: ``MaskedAutoencoder(pixels, **vars(VIT_SMALL), ...)``.

    BASE and LARGE are those of He et al., with their decoder; the smaller ones scale it down.
    """

    width: int
    depth: int
    heads: int
    decoder_width: int
    decoder_depth: int
    decoder_heads: int


VIT_NANO = VitSize(128, 4, 4, 128, 1, 4)
VIT_TINY = VitSize(192, 12, 3, 128, 2, 4)
VIT_SMALL = VitSize(384, 12, 6, 256, 4, 8)
VIT_BASE = VitSize(768, 12, 12, 512, 8, 16)
VIT_LARGE = VitSize(1024, 24, 16, 512, 8, 16)


class MaskedPrediction(NamedTuple):
    """What a masked autoencoder makes of masked images.

    Attributes:
        mask: [b, N] bool, True where the patch was hidden.
        prediction: [b, N, patch_dim] float32, every patch in the units of :meth:`MaskedAutoencoder.targets`.
        masked_images: [b, h, w, c] float32 in stored pixel units, hidden patches replaced by the mean image.
    """

    mask: jax.Array
    prediction: jax.Array
    masked_images: Array


class MaskedAutoencoder(Autoencoder):
    """Vision transformer that sees n of N patches and predicts the others.

    Patches are numbered as in :mod:`mae_align.data.patches`. The encoder sees a class token and the visible patches,
    with fixed sin-cos positions; a light decoder sees these and a learned mask token at each hidden place.
    :class:`Loss` says what the predictions are compared with.

    Features are the mean over patches of the encoder's output after its last norm, of the whole image without a mask.

    Args:
        pixels: normalisation, and the image shape.
        corruption: the mask, with an exact number of visible patches. Its patches divide the image. It has no fill:
            the network never sees hidden patches.
        width: of the encoder, the number of features k; a multiple of 4.
        depth: blocks of the encoder.
        heads: attention heads of the encoder, dividing its width.
        decoder_width: of the decoder; a multiple of 4.
        decoder_depth: blocks of the decoder.
        decoder_heads: attention heads of the decoder, dividing its width.
        mlp_ratio: hidden width of a block's dense layers over its width.
        objective: the loss.
        activation: ``jax.nn.gelu`` (tanh form) or :func:`mae_align.models.gelu_exact` (as published).
        dtype: of the products; parameters, norms and losses are float32.
        rngs: of the initial parameters.

    Raises:
        InputError: another corruption, patches that do not divide the image, heads that do not divide a width, a width
            that is no multiple of 4, a depth below 0, or a loss on hidden patches where none is hidden.

    Example:
        >>> images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 1), dtype=np.uint8)
        >>> model = MaskedAutoencoder(
        ...     Pixels.from_images(images),
        ...     corruption=FixedCountPatchMasking(2, num_visible=4),
        ...     width=8,
        ...     depth=1,
        ...     heads=2,
        ...     decoder_width=8,
        ...     decoder_depth=1,
        ...     decoder_heads=2,
        ...     rngs=nnx.Rngs(0),
        ... )
        >>> jax.eval_shape(model.encode, images).shape
        (5, 8)
    """

    kind: ClassVar[ModelKind] = ModelKind.MATMUL

    def __init__(
        self,
        pixels: Pixels,
        *,
        corruption: FixedCountPatchMasking,
        width: int,
        depth: int,
        heads: int,
        decoder_width: int,
        decoder_depth: int,
        decoder_heads: int,
        mlp_ratio: int = 4,
        objective: Loss = Loss.standard,
        activation: Activation = jax.nn.gelu,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        super().__init__(pixels, width)
        self.corruption = _exact_count(corruption)
        self.corruption.check(self.image_shape)
        self.patch_size, self.grid = _whole_patches(self.image_shape, self.corruption)
        self.num_patches = self.grid[0] * self.grid[1]
        self.objective = objective
        objective.check(self.num_patches - corruption.num_visible, self.patch_dim)
        if depth < 0 or decoder_depth < 0 or mlp_ratio < 1:
            raise InputError(
                f"depth={depth}, decoder_depth={decoder_depth}, mlp_ratio={mlp_ratio}: give depths of 0 or more and a "
                "ratio of 1 or more"
            )
        check_heads(width, heads)
        check_heads(decoder_width, decoder_heads)
        self.positions = Constant(jnp.asarray(sincos_positions(self.grid, width)))
        self.decoder_positions = Constant(jnp.asarray(sincos_positions(self.grid, decoder_width)))

        def blocks(count: int, width: int, heads: int) -> nnx.List[Block]:
            return nnx.List(
                [Block(width, heads, mlp_ratio, activation=activation, dtype=dtype, rngs=rngs) for _ in range(count)]
            )

        token = nnx.initializers.normal(0.02)
        self.embed = Dense(self.patch_dim, width, dtype=dtype, rngs=rngs)
        self.class_token = nnx.Param(token(rngs.params(), (width,), jnp.float32))
        self.blocks = blocks(depth, width, heads)
        self.norm = LayerNorm(width, dtype=dtype)
        self.decoder_embed = Dense(width, decoder_width, dtype=dtype, rngs=rngs)
        self.mask_token = nnx.Param(token(rngs.params(), (decoder_width,), jnp.float32))
        self.decoder_blocks = blocks(decoder_depth, decoder_width, decoder_heads)
        self.decoder_norm = LayerNorm(decoder_width, dtype=dtype)
        self.head = Dense(decoder_width, self.patch_dim, dtype=dtype, rngs=rngs)
        self.dtype = jnp.dtype(dtype)

    @property
    def patch_dim(self) -> int:
        """Values of a patch, ph pw c."""
        return self.patch_size[0] * self.patch_size[1] * self.image_shape[2]

    def patchify(self, images: jax.Array) -> jax.Array:
        """[b, N, patch_dim] of [b, h, w, c], numbered as in :mod:`mae_align.data.patches`, channels last in a patch."""
        (down, across), (ph, pw) = self.grid, self.patch_size
        parts = images.reshape(len(images), down, ph, across, pw, -1).swapaxes(2, 3)
        return parts.reshape(len(images), self.num_patches, -1)

    def unpatchify(self, patches: jax.Array) -> jax.Array:
        """[b, h, w, c] of [b, N, patch_dim]: the inverse of :meth:`patchify`."""
        (down, across), (ph, pw) = self.grid, self.patch_size
        parts = patches.reshape(len(patches), down, across, ph, pw, -1).swapaxes(2, 3)
        return parts.reshape(len(patches), *self.image_shape)

    def targets(self, images: Array) -> jax.Array:
        """What the decoder is to predict for every patch of images in stored pixel units, [b, N, patch_dim] float32."""
        return self.objective.targets(self._patches(images))

    def encode(self, images: Array) -> jax.Array:
        """Mean over all patches of the encoder's output, nothing masked; see :meth:`Autoencoder.encode`."""
        tokens = self._encode_tokens(self._patches(images), self.positions[...][None])
        return tokens[:, 1:].astype(jnp.float32).mean(axis=1)

    def reconstruct(self, images: Array) -> jax.Array:
        """Decoder's output with no patch hidden; see :meth:`Autoencoder.reconstruct`.

        A loss on hidden patches never trained the decoder for this. With ``Loss.standard`` the mean and the deviation
        of a patch are those of the image as given: the network does not predict them.
        """
        patches = self._patches(images)
        tokens = self._encode_tokens(patches, self.positions[...][None])
        predicted = self._decode_tokens(tokens, self.decoder_positions[...][None])
        return self.pixels.restore(self.unpatchify(self.objective.pixels_of(predicted, patches)))

    def predict(self, images: Array, key: jax.Array) -> MaskedPrediction:
        """Mask images as the loss does with this key, and predict every patch.

        Args:
            images: [b, h, w, c] in stored pixel units.
            key: PRNG key of the masks.

        Returns:
            Masks, predictions and masked images.

        Raises:
            InputError: images of another shape.
        """
        order = self.corruption.sample_order(key, len(images), self.num_patches)
        place = jnp.argsort(order, axis=1)
        mask = place >= self.corruption.num_visible
        predicted = jnp.take_along_axis(self._predict_in(order, self._patches(images)), place[:, :, None], axis=1)
        masked = self.unpatchify(jnp.where(mask[:, :, None], 0.0, self._patches(images)))
        return MaskedPrediction(mask, predicted, self.pixels.restore(masked))

    def loss(self, images: Array, key: jax.Array) -> tuple[jax.Array, Metrics]:
        """Mean squared error over hidden patches, or over all pixels; see :meth:`Autoencoder.loss`.

        The masks are those of ``corruption.sample(key, ...)``.
        """
        patches = self._patches(images)
        order = self.corruption.sample_order(key, len(images), self.num_patches)
        predicted, ordered = (
            self.objective.scored(all_patches, self.corruption.num_visible)
            for all_patches in (self._predict_in(order, patches), _take(patches, order))
        )
        loss = jnp.mean(jnp.square(predicted - self.objective.targets(ordered)))
        return loss, {"reconstruction": loss}

    def _patches(self, images: Array) -> jax.Array:
        self.check_shape(images)
        return self.patchify(self.pixels.normalize(images))

    def _predict_in(self, order: jax.Array, patches: jax.Array) -> jax.Array:
        """Predictions [b, N, patch_dim] in the given order, of which the first n are visible.

        Self-attention does not see the order of tokens, so they stay in it and only positions are looked up.
        """
        visible = order[:, : self.corruption.num_visible]
        tokens = self._encode_tokens(_take(patches, visible), self.positions[...][visible])
        return self._decode_tokens(tokens, self.decoder_positions[...][order])

    def _encode_tokens(self, patches: jax.Array, positions: jax.Array) -> jax.Array:
        tokens = self.embed(patches) + positions.astype(self.dtype)
        # The position of the class token is 0.
        first = jnp.broadcast_to(self.class_token[...].astype(self.dtype), (len(tokens), 1, self.latent))
        x = jnp.concatenate([first, tokens], axis=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def _decode_tokens(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        """Predictions [b, N, patch_dim] float32 from 1 + n tokens; mask tokens stand for the others."""
        x = self.decoder_embed(tokens)
        hidden = (len(x), self.num_patches + 1 - x.shape[1], x.shape[2])
        x = jnp.concatenate([x, jnp.broadcast_to(self.mask_token[...].astype(self.dtype), hidden)], axis=1)
        x = x + jnp.pad(positions, ((0, 0), (1, 0), (0, 0))).astype(self.dtype)
        for block in self.decoder_blocks:
            x = block(x)
        return self.head(self.decoder_norm(x)[:, 1:]).astype(jnp.float32)


def patch_statistics(patches: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and sqrt(unbiased variance + 1e-6) over the values of each patch.

    Args:
        patches: [b, N, patch_dim].

    Returns:
        [b, N, 1] twice.

    Example:
        >>> mean, deviation = patch_statistics(jnp.array([[[1.0, 3.0]]]))
        >>> mean.item(), round(deviation.item(), 4)
        (2.0, 1.4142)
    """
    variance = patches.var(axis=2, ddof=1, keepdims=True)
    return patches.mean(axis=2, keepdims=True), jnp.sqrt(variance + _PATCH_EPSILON)


def sincos_positions(grid: tuple[int, int], width: int) -> np.ndarray:
    """Fixed positions of He et al.: [sin, cos] of the column, then [sin, cos] of the row.

    Angles are index / 10000^(4 i / width) for i < width / 4.

    Args:
        grid: patches down and across.
        width: of a token.

    Returns:
        [down * across, width] float32, in the order of :mod:`mae_align.data.patches`.

    Raises:
        InputError: a width that is no multiple of 4.

    Example:
        >>> sincos_positions((1, 2), 4).round(2)
        array([[0.  , 1.  , 0.  , 1.  ],
               [0.84, 0.54, 0.  , 1.  ]], dtype=float32)
    """
    if width < 4 or width % 4:
        raise InputError(f"width {width}: sin-cos positions need a multiple of 4")
    rate = 10000.0 ** -(np.arange(width // 4) / (width / 4))
    row, column = (index.reshape(-1) for index in np.indices(grid))
    angles = (column[:, None] * rate, row[:, None] * rate)
    return np.concatenate([f(angle) for angle in angles for f in (np.sin, np.cos)], axis=1).astype(np.float32)


def _take(patches: jax.Array, index: jax.Array) -> jax.Array:
    return jnp.take_along_axis(patches, index[:, :, None], axis=1)


def _exact_count(corruption: Corruption) -> FixedCountPatchMasking:
    """The corruption, if a masked autoencoder can take it."""
    if not isinstance(corruption, FixedCountPatchMasking) or corruption.fill is not None:
        raise InputError(
            f"{corruption!r}: a masked autoencoder leaves out an exact number of patches, give "
            "FixedCountPatchMasking(patch_size, num_visible) without a fill"
        )
    return corruption


def _whole_patches(
    image_shape: tuple[int, int, int], corruption: FixedCountPatchMasking
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Sides of a patch, and patches down and across."""
    (height, width), (ph, pw) = image_shape[:2], patch_hw(corruption.patch_size)
    if height % ph or width % pw:
        raise InputError(f"patch {ph}x{pw} does not divide the image {height}x{width}: choose one that does")
    return (ph, pw), (height // ph, width // pw)
