"""Published masked autoencoders, from the files in which others keep them."""

from __future__ import annotations

import dataclasses
import enum
import functools
import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mae_align.corruption import FixedCountPatchMasking
from mae_align.models.layers import Activation, Block, Dense, LayerNorm, gelu_exact
from mae_align.models.pixels import Array, Constant, Pixels
from mae_align.models.vit_mae import Loss, MaskedAutoencoder
from mae_align.runtime.errors import InputError

# Mean and standard deviation of ImageNet's channels, in shares of 255: what published networks were trained with.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_WEIGHTS, _INDEX, _CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
_TO_SAFETENSORS = (
    'convert it once, where torch is installed: python -c "import torch, safetensors.torch as s; '
    "s.save_file({k: v.contiguous() for k, v in torch.load('FILE.pth', map_location='cpu')['model'].items()}, "
    "'FILE.safetensors')\""
)
_SHOWN = 4


class Pooling(enum.Enum):
    """Which tokens of the encoder are the features of an image."""

    mean = "mean"
    cls = "cls"
    tokens = "tokens"


@dataclasses.dataclass(frozen=True)
class Architecture:
    """Sizes of a published masked autoencoder.

    Attributes:
        image_shape: (h, w, c) that the positions of the file are for.
        patch_size: side of the patches, in pixels.
        width, depth, heads: of the encoder.
        mlp_width: of its hidden layers.
        decoder_width, decoder_depth, decoder_heads, decoder_mlp_width: of the decoder; a depth of -1 without one.
        mask_ratio: share of patches hidden in training.
        objective: the loss.
        activation: of the hidden layers.
        epsilon: of the layer norms.
    """

    image_shape: tuple[int, int, int]
    patch_size: int
    width: int
    depth: int
    heads: int
    mlp_width: int
    decoder_width: int
    decoder_depth: int
    decoder_heads: int
    decoder_mlp_width: int
    mask_ratio: float
    objective: Loss
    activation: Activation
    epsilon: float

    @property
    def grid(self) -> tuple[int, int]:
        """Patches down and across."""
        return self.image_shape[0] // self.patch_size, self.image_shape[1] // self.patch_size


class PublishedAutoencoder(MaskedAutoencoder):
    """A masked autoencoder with the weights of a file: what :func:`load_mae` returns.

    It is a :class:`MaskedAutoencoder` whose positions, also that of the class token, come from the file, and whose
    pixels are normalised by channel. Without a decoder in the file it encodes and refuses to reconstruct.

    Attributes:
        architecture: its sizes.
        decoder_class_position: [decoder width] position of the class token in the decoder.
        has_decoder: whether the file has one.
    """

    def __init__(self, architecture: Architecture, pixels: Pixels, *, has_decoder: bool) -> None:
        a, count = architecture, math.prod(architecture.grid)
        # int, as in both published codes.
        visible = int(count * (1 - a.mask_ratio))
        mlp_ratio, decoder_ratio = (
            _ratio(*pair) for pair in ((a.mlp_width, a.width), (a.decoder_mlp_width, a.decoder_width))
        )
        super().__init__(
            pixels,
            corruption=FixedCountPatchMasking(a.patch_size, max(1, min(visible, count - 1))),
            width=a.width,
            depth=a.depth,
            heads=a.heads,
            decoder_width=a.decoder_width,
            decoder_depth=0,
            decoder_heads=a.decoder_heads,
            mlp_ratio=mlp_ratio,
            objective=a.objective,
            activation=a.activation,
            rngs=nnx.Rngs(0),
        )
        self.decoder_blocks = nnx.List(
            [
                Block(a.decoder_width, a.decoder_heads, decoder_ratio, activation=a.activation, rngs=nnx.Rngs(0))
                for _ in range(a.decoder_depth)
            ]
        )
        for norm in self._norms():
            norm.epsilon = a.epsilon
        self.decoder_class_position = Constant(jnp.zeros(a.decoder_width))
        self.architecture, self.has_decoder = architecture, has_decoder

    def untrained(self) -> PublishedAutoencoder:
        """A network of the same shape as training starts it: weights drawn at random, sin-cos positions."""
        return PublishedAutoencoder(self.architecture, self.pixels, has_decoder=self.has_decoder)

    def _norms(self) -> list[LayerNorm]:
        blocks = [*self.blocks, *self.decoder_blocks]
        return [self.norm, self.decoder_norm, *(norm for block in blocks for norm in (block.norm1, block.norm2))]

    def encode(self, images: Array, pooling: Pooling = Pooling.mean) -> jax.Array:
        """Features of whole images, nothing masked.

        Args:
            images: [b, h, w, c] in stored pixel units, 0 to 255.
            pooling: the mean over patches, the class token, or all tokens, that of the class first.

        Returns:
            [b, width] float32, or [b, 1 + N, width] for all tokens.

        Raises:
            InputError: images of another shape.
        """
        if pooling is Pooling.mean:
            return super().encode(images)
        tokens = self._encode_tokens(self._patches(images), self.positions[...][None]).astype(jnp.float32)
        return tokens[:, 0] if pooling is Pooling.cls else tokens

    def _decode_tokens(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        if not self.has_decoder:
            raise InputError("this file holds an encoder alone: give one with a decoder (ViTMAEForPreTraining)")
        x = self.decoder_embed(tokens)
        hidden = (len(x), self.num_patches + 1 - x.shape[1], x.shape[2])
        x = jnp.concatenate([x, jnp.broadcast_to(self.mask_token[...].astype(self.dtype), hidden)], axis=1)
        first = jnp.broadcast_to(self.decoder_class_position[...], (len(positions), 1, x.shape[2]))
        x = x + jnp.concatenate([first, positions], axis=1).astype(self.dtype)
        for block in self.decoder_blocks:
            x = block(x)
        return self.head(self.decoder_norm(x)[:, 1:]).astype(jnp.float32)


def load_mae(path: str | Path, *, image_size: tuple[int, int] | None = None) -> PublishedAutoencoder:
    """A masked autoencoder from the file of another library.

    Read are folders in Hugging Face layout (``config.json`` and ``model.safetensors``, also in shards), of
    ``ViTMAEModel`` or ``ViTMAEForPreTraining``, and ``.safetensors`` files with the names of facebookresearch/mae.
    Pixels are normalised by the mean and standard deviation of ImageNet's channels, or as ``preprocessor_config.json``
    beside the file says.

    Args:
        path: the folder or the file.
        image_size: (height, width) of the images, multiples of the patch; positions are interpolated (bicubic) where it
            is not that of the file. None for that of the file.

    Returns:
        The network, float32: ``.encode(images)``, ``.reconstruct(images)``, ``.predict(images, key)``, ``.loss``.

    Raises:
        InputError: missing, damaged or foreign files, missing or surplus weights, sizes that do not fit together.

    Example:
        >>> load_mae("/nowhere")
        Traceback (most recent call last):
        ...
        mae_align.runtime.errors.InputError: /nowhere: there is no such file or folder
    """
    path = Path(path).expanduser()
    weights = _weights(path)
    folder = path if path.is_dir() else path.parent
    try:
        names, architecture = _huggingface(folder, weights) if (folder / _CONFIG).is_file() else _facebook(weights)
    except KeyError as error:
        raise InputError(f"{path} lacks {error.args[0]}: it is no masked autoencoder of a known layout") from None
    size = architecture.image_shape[:2] if image_size is None else image_size
    if any(side < architecture.patch_size or side % architecture.patch_size for side in size):
        raise InputError(f"image_size {size}: give multiples of the patch, {architecture.patch_size} pixels")
    here = dataclasses.replace(architecture, image_shape=(*size, architecture.image_shape[2]))
    has_decoder = architecture.decoder_depth >= 0
    if not has_decoder:
        here = dataclasses.replace(here, decoder_depth=0)
    network = PublishedAutoencoder(here, _pixels(folder, here.image_shape), has_decoder=has_decoder)
    _fill(network, architecture, _Reader(path, weights, names), has_decoder=has_decoder)
    return network


def _ratio(hidden: int, width: int) -> int:
    if hidden % width:
        raise InputError(f"hidden layers of {hidden} for a width of {width}: only whole multiples are read")
    return hidden // width


def _weights(path: Path) -> dict[str, np.ndarray]:
    """All arrays of a folder or file, float32."""
    if not path.exists():
        raise InputError(f"{path}: there is no such file or folder")
    if path.is_file():
        if path.suffix != ".safetensors":
            raise InputError(f"{path} is not read, for its format can run code: {_TO_SAFETENSORS}")
        return _arrays(path)
    if (path / _INDEX).is_file():
        files = sorted(set(_json(path / _INDEX).get("weight_map", {}).values()))
        return {name: array for file in files for name, array in _arrays(path / file).items()}
    if (path / _WEIGHTS).is_file():
        return _arrays(path / _WEIGHTS)
    others = sorted(p.name for pattern in ("*.bin", "*.pth", "*.pt") for p in path.glob(pattern))
    hint = (
        f" ({others[0]} is not read, for its format can run code: save with safe_serialization=True)" if others else ""
    )
    raise InputError(f"{path} holds no {_WEIGHTS}{hint}")


def _arrays(file: Path) -> dict[str, np.ndarray]:
    import safetensors
    from safetensors.flax import load_file

    try:
        found = load_file(file)
    except FileNotFoundError:
        raise InputError(f"{file}: there is no such file") from None
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{file} is damaged or no safetensors file ({str(error).splitlines()[0]})") from None
    # transformers 5 writes the decoder's layers under a name that transformers 4 does not.
    plain = {name.replace(".decoder_encoder.layer.", ".decoder_layers."): array for name, array in found.items()}
    return {name: np.asarray(array, np.float32) for name, array in plain.items()}


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise InputError(f"{file} is damaged or cannot be read") from None
    if not isinstance(found, dict):
        raise InputError(f"{file} is damaged: it holds no settings")
    return found


def _pixels(folder: Path, image_shape: tuple[int, int, int]) -> Pixels:
    """The normalisation by channel, in stored pixel units."""
    mean, std, scale = IMAGENET_MEAN, IMAGENET_STD, 255.0
    if (folder / "preprocessor_config.json").is_file():
        about = _json(folder / "preprocessor_config.json")
        mean, std = about.get("image_mean", mean), about.get("image_std", std)
        scale = 1 / about.get("rescale_factor", 1 / 255)
    channels = image_shape[2]
    mean, std = (np.ravel(np.asarray(values, np.float32)) * np.float32(scale) for values in (mean, std))
    if len(mean) != channels or len(std) != channels:
        if channels != 1:
            raise InputError(f"{folder}: means of {len(mean)} channels for images of {channels}")
        mean, std = mean.mean(keepdims=True), std.mean(keepdims=True)
    return Pixels(np.broadcast_to(mean, image_shape).copy(), std[None, None, None])


class _Reader:
    """The weights of a file under the names of :class:`PublishedAutoencoder`'s parts; each is to be taken once.

    Attributes:
        path: of the file, for messages.
        weights: by their names in the file.
        names: our names as patterns of theirs.
    """

    def __init__(self, path: Path, weights: Mapping[str, np.ndarray], names: Mapping[str, str]) -> None:
        self.path, self.weights, self.names, self.left = path, weights, names, set(weights)
        self.missing: list[str] = []

    def take(self, name: str, shape: tuple[int, ...], layer: int = 0) -> np.ndarray:
        """One array; where it is missing that is noted, and zeros stand in.

        Raises:
            InputError: another shape.
        """
        theirs = self.names[name].format(layer)
        if theirs not in self.weights:
            self.missing.append(theirs)
            return np.zeros(shape, np.float32)
        self.left.discard(theirs)
        array = self.weights[theirs]
        if array.shape != shape:
            raise InputError(f"{theirs} of {self.path} has shape {list(array.shape)}, not {list(shape)}")
        return array

    def has(self, name: str, layer: int = 0) -> bool:
        """Whether the file holds an array."""
        return name in self.names and self.names[name].format(layer) in self.weights

    def check(self) -> None:
        """Refuse weights that are missing or were not asked for."""
        for what, names in (("lacks", self.missing), ("holds weights that are not known:", sorted(self.left))):
            if names:
                more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
                raise InputError(f"{self.path} {what} {', '.join(names[:_SHOWN])}{more}")


def _fill(network: PublishedAutoencoder, a: Architecture, read: _Reader, *, has_decoder: bool) -> None:
    """Put the weights of a file into a network."""
    width, channels, patch = a.width, a.image_shape[2], a.patch_size
    kernel = read.take("embed.weight", (width, channels, patch, patch))
    # Theirs are rows of channels, ours have channels last.
    _set(network.embed, kernel.transpose(2, 3, 1, 0).reshape(-1, width), read.take("embed.bias", (width,)))
    positions = read.take("positions", (1, 1 + math.prod(a.grid), width))[0]
    network.class_token[...] = jnp.asarray(read.take("class_token", (1, 1, width))[0, 0] + positions[0])
    network.positions[...] = jnp.asarray(_interpolated(positions[1:], a.grid, network.grid))
    for i, block in enumerate(network.blocks):
        _fill_block(block, functools.partial(read.take, layer=i), functools.partial(read.has, layer=i), "", width)
    _set_norm(network.norm, *(read.take(f"norm.{part}", (width,)) for part in ("weight", "bias")))
    if has_decoder:
        inner = a.decoder_width
        _set(
            network.decoder_embed,
            read.take("decoder_embed.weight", (inner, width)).T,
            read.take("decoder_embed.bias", (inner,)),
        )
        positions = read.take("decoder_positions", (1, 1 + math.prod(a.grid), inner))[0]
        network.decoder_class_position[...] = jnp.asarray(positions[0])
        network.decoder_positions[...] = jnp.asarray(_interpolated(positions[1:], a.grid, network.grid))
        network.mask_token[...] = jnp.asarray(read.take("mask_token", (1, 1, inner))[0, 0])
        for i, block in enumerate(network.decoder_blocks):
            _fill_block(
                block, functools.partial(read.take, layer=i), functools.partial(read.has, layer=i), "decoder_", inner
            )
        _set_norm(network.decoder_norm, *(read.take(f"decoder_norm.{part}", (inner,)) for part in ("weight", "bias")))
        values = patch * patch * channels
        _set(network.head, read.take("head.weight", (values, inner)).T, read.take("head.bias", (values,)))
    read.check()


def _fill_block(
    block: Block, take: Callable[[str, tuple[int, ...]], np.ndarray], has: Callable[[str], bool], part: str, width: int
) -> None:
    """Put the weights of a file into a block of the encoder or the decoder."""
    hidden = block.up.kernel[...].shape[1]
    for name, norm in (("norm1", block.norm1), ("norm2", block.norm2)):
        _set_norm(norm, *(take(f"{part}{name}.{each}", (width,)) for each in ("weight", "bias")))
    if has(f"{part}qkv.weight"):
        kernel, joint = take(f"{part}qkv.weight", (3 * width, width)).T, f"{part}qkv.bias"
        bias = take(joint, (3 * width,)) if has(joint) else np.zeros(3 * width)
    else:
        three = [f"{part}{name}" for name in ("query", "key", "value")]
        kernel = np.concatenate([take(f"{name}.weight", (width, width)).T for name in three], axis=1)
        # A file may leave out the biases of all three (qkv_bias=False).
        some = any(has(f"{name}.bias") for name in three)
        bias = np.concatenate([take(f"{name}.bias", (width,)) for name in three]) if some else np.zeros(3 * width)
    _set(block.attention.qkv, kernel, bias)
    for name, layer, shape in (
        ("out", block.attention.out, (width, width)),
        ("up", block.up, (hidden, width)),
        ("down", block.down, (width, hidden)),
    ):
        _set(layer, take(f"{part}{name}.weight", shape).T, take(f"{part}{name}.bias", shape[:1]))


def _set(layer: Dense, kernel: np.ndarray, bias: np.ndarray) -> None:
    layer.kernel[...], layer.bias[...] = jnp.asarray(kernel, jnp.float32), jnp.asarray(bias, jnp.float32)


def _set_norm(norm: LayerNorm, scale: np.ndarray, bias: np.ndarray) -> None:
    norm.scale[...], norm.bias[...] = jnp.asarray(scale), jnp.asarray(bias)


def _interpolated(positions: np.ndarray, grid: tuple[int, int], wanted: tuple[int, int]) -> np.ndarray:
    """Positions [N, width] of one grid at the places of another, bicubic as in torch; as they are for the same grid."""
    if grid == wanted:
        return positions
    down, across = (_bicubic(*sizes) for sizes in zip(grid, wanted, strict=True))
    table = positions.reshape(*grid, -1).astype(np.float64)
    return np.einsum("ij,kl,jlw->ikw", down, across, table).reshape(math.prod(wanted), -1).astype(np.float32)


def _bicubic(size: int, wanted: int) -> np.ndarray:
    """[wanted, size] weights of the cubic convolution with a = -0.75, edges repeated, pixels between their corners."""
    at = (np.arange(wanted) + 0.5) * size / wanted - 0.5
    taps = np.floor(at)[:, None] + np.arange(-1, 3)
    t = np.abs(at[:, None] - taps)
    a = -0.75
    near, far = (a + 2) * t**3 - (a + 3) * t**2 + 1, a * (t**3 - 5 * t**2 + 8 * t - 4)
    weights = np.zeros((wanted, size))
    np.add.at(
        weights, (np.arange(wanted)[:, None], np.clip(taps, 0, size - 1).astype(int)), np.where(t <= 1, near, far)
    )
    return weights


def _layer_names(theirs: str, parts: Mapping[str, str], ours: str = "") -> dict[str, str]:
    """Names of the weights and biases of a layer, {} standing for its number."""
    return {
        f"{ours}{name}.{each}": f"{theirs}.{part}.{each}" for name, part in parts.items() for each in ("weight", "bias")
    }


def _pairs(names: Mapping[str, str]) -> dict[str, str]:
    return {f"{ours}.{each}": f"{theirs}.{each}" for ours, theirs in names.items() for each in ("weight", "bias")}


_HF_LAYER = {
    "norm1": "layernorm_before",
    "query": "attention.attention.query",
    "key": "attention.attention.key",
    "value": "attention.attention.value",
    "out": "attention.output.dense",
    "norm2": "layernorm_after",
    "up": "intermediate.dense",
    "down": "output.dense",
}
_HF_DECODER = {
    "mask_token": "decoder.mask_token",
    "decoder_positions": "decoder.decoder_pos_embed",
    **_pairs(
        {
            "decoder_embed": "decoder.decoder_embed",
            "decoder_norm": "decoder.decoder_norm",
            "head": "decoder.decoder_pred",
        }
    ),
    **_layer_names("decoder.decoder_layers.{}", _HF_LAYER, "decoder_"),
}
_HF_ENCODER = {
    "class_token": "embeddings.cls_token",
    "positions": "embeddings.position_embeddings",
    **_pairs({"embed": "embeddings.patch_embeddings.projection", "norm": "layernorm"}),
    **_layer_names("encoder.layer.{}", _HF_LAYER),
}
_FB_LAYER = {
    "norm1": "norm1",
    "qkv": "attn.qkv",
    "out": "attn.proj",
    "norm2": "norm2",
    "up": "mlp.fc1",
    "down": "mlp.fc2",
}
_FACEBOOK = {
    "class_token": "cls_token",
    "positions": "pos_embed",
    "mask_token": "mask_token",
    "decoder_positions": "decoder_pos_embed",
    **_pairs({"embed": "patch_embed.proj", "norm": "norm", "decoder_embed": "decoder_embed"}),
    **_pairs({"decoder_norm": "decoder_norm", "head": "decoder_pred"}),
    **_layer_names("blocks.{}", _FB_LAYER),
    **_layer_names("decoder_blocks.{}", _FB_LAYER, "decoder_"),
}
_ACTIVATIONS = {"gelu": gelu_exact, "gelu_new": jax.nn.gelu, "gelu_pytorch_tanh": jax.nn.gelu, "relu": jax.nn.relu}
# Heads of the published networks by the width of encoder or decoder; a file of weights does not say them.
_HEADS = {768: 12, 1024: 16, 1280: 16, 512: 16}


def _huggingface(folder: Path, weights: Mapping[str, np.ndarray]) -> tuple[dict[str, str], Architecture]:
    """Names and sizes of a folder in Hugging Face layout."""
    about = _json(folder / _CONFIG)
    if about.get("model_type") != "vit_mae":
        raise InputError(f"{folder / _CONFIG} is of a {about.get('model_type')!r}: give a masked autoencoder (vit_mae)")
    activation = about.get("hidden_act", "gelu")
    if activation not in _ACTIVATIONS:
        raise InputError(f"{folder / _CONFIG}: hidden_act {activation!r} is not known, only {', '.join(_ACTIVATIONS)}")
    prefix = "vit." if any(name.startswith("vit.") for name in weights) else ""
    names = {ours: prefix + theirs for ours, theirs in _HF_ENCODER.items()} | _HF_DECODER
    has_decoder = any(name.startswith("decoder.") for name in weights)
    side = about["image_size"]
    height, width = (side, side) if isinstance(side, int) else side
    return names, Architecture(
        (height, width, about.get("num_channels", 3)),
        about["patch_size"],
        about["hidden_size"],
        about["num_hidden_layers"],
        about["num_attention_heads"],
        about["intermediate_size"],
        about["decoder_hidden_size"],
        about["decoder_num_hidden_layers"] if has_decoder else -1,
        about["decoder_num_attention_heads"],
        about["decoder_intermediate_size"],
        about.get("mask_ratio", 0.75),
        Loss.standard if about.get("norm_pix_loss", False) else Loss.hidden,
        _ACTIVATIONS[activation],
        about.get("layer_norm_eps", 1e-12),
    )


def _facebook(weights: Mapping[str, np.ndarray]) -> tuple[dict[str, str], Architecture]:
    """Names and sizes of a file with the names of facebookresearch/mae, whose positions are of a square."""
    kernel, positions = weights["patch_embed.proj.weight"], weights["pos_embed"]
    width, channels, patch = kernel.shape[:3]
    side = math.isqrt(positions.shape[1] - 1) * patch
    depth, decoder_depth = (
        1 + max((int(found[1]) for name in weights if (found := re.match(rf"{part}\.(\d+)\.", name))), default=-1)
        for part in ("blocks", "decoder_blocks")
    )
    has_decoder = "decoder_embed.weight" in weights
    inner = len(weights["decoder_embed.weight"]) if has_decoder else 512
    for each in (width, inner):
        if each not in _HEADS:
            raise InputError(
                f"a width of {each} is of no published network, and the file does not say its heads: "
                "give it in Hugging Face layout"
            )
    return _FACEBOOK, Architecture(
        (side, side, channels),
        patch,
        width,
        depth,
        _HEADS[width],
        len(weights["blocks.0.mlp.fc1.weight"]),
        inner,
        decoder_depth if has_decoder else -1,
        _HEADS[inner],
        len(weights["decoder_blocks.0.mlp.fc1.weight"]) if decoder_depth else 4 * inner,
        0.75,
        Loss.standard,
        gelu_exact,
        1e-6,
    )
