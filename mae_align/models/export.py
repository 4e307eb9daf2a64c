"""Trained networks as files that other libraries open."""

from __future__ import annotations

import enum
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mae_align.data.patches import patch_hw
from mae_align.models.base import Autoencoder
from mae_align.models.layers import Dense, LayerNorm, gelu_exact
from mae_align.models.vit_mae import MaskedAutoencoder
from mae_align.runtime.errors import InputError


class Layout(enum.Enum):
    """Whose names and settings a file has."""

    huggingface = "huggingface"
    timm = "timm"


def export_encoder(network: Autoencoder, folder: str | Path, layout: Layout = Layout.huggingface) -> Path:
    """Write an encoder as ``model.safetensors`` and ``config.json``.

    A masked autoencoder is opened by ``transformers.ViTMAEModel.from_pretrained(folder)``, or by timm. Pixel statistics
    are folded into the patch kernel and the positions: the exported network takes pixels divided by 255 and nothing
    else, as ``preprocessor_config.json`` says. Its mask ratio is 0: it sees whole images. Other networks are written as
    they are, under the names of their parts, with the mean image and the scale of their pixels.

    Args:
        network: trained.
        folder: made if missing; it must not hold another network.
        layout: for masked autoencoders.

    Returns:
        The folder.

    Raises:
        InputError: a folder that holds a network, or an activation that the layout does not know.

    Example:
        >>> import tempfile
        >>> from mae_align.models import MLPAutoencoder, Pixels
        >>> pixels = Pixels(np.zeros((2, 2, 1), np.float32), np.float32(1))
        >>> network = MLPAutoencoder(pixels, latent=2, hidden=(4,), rngs=nnx.Rngs(0))
        >>> sorted(path.name for path in export_encoder(network, Path(tempfile.mkdtemp()) / "out").iterdir())
        ['config.json', 'model.safetensors']
    """
    from safetensors.numpy import save_file

    folder = Path(folder).expanduser()
    if any((folder / name).exists() for name in ("model.safetensors", "config.json")):
        raise InputError(f"{folder} holds a network already: choose another folder")
    if isinstance(network, MaskedAutoencoder):
        arrays, about = (_huggingface if layout is Layout.huggingface else _timm)(network)
        more = {"preprocessor_config.json": _preprocessor(network)} if layout is Layout.huggingface else {}
    else:
        arrays, about, more = _plain(network), _about(network), {}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: np.ascontiguousarray(array, np.float32) for name, array in arrays.items()}, folder / "model.safetensors"
    )
    for name, content in {"config.json": about, **more}.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return folder


def _folded(network: MaskedAutoencoder) -> tuple[np.ndarray, np.ndarray]:
    """Patch kernel [width, c, ph, pw] and positions [1 + N, width] of a network that takes pixels divided by 255."""
    (ph, pw), channels = network.patch_size, network.image_shape[2]
    kernel = np.asarray(network.embed.kernel[...], np.float64).reshape(ph, pw, channels, -1)
    scale = np.broadcast_to(np.asarray(network.pixels.scale, np.float64).reshape(-1), (channels,))
    kernel = kernel / scale[None, None, :, None]
    mean = np.asarray(network.patchify(jnp.asarray(network.pixels.mean)[None]), np.float64)[0]
    positions = np.asarray(network.positions[...], np.float64) - mean @ kernel.reshape(mean.shape[1], -1)
    return 255 * kernel.transpose(3, 2, 0, 1), np.concatenate([np.zeros((1, positions.shape[1])), positions])


def _activation(network: MaskedAutoencoder, tanh: str) -> str:
    """The name of the activation where the exact form of gelu is "gelu"."""
    known = {gelu_exact: "gelu", jax.nn.gelu: tanh}
    found = {block.activation for block in network.blocks}
    if not found <= known.keys():
        raise InputError("the activation of this network has no name in this layout: only forms of gelu have")
    return known[found.pop()] if found else "gelu"


def _heads(network: MaskedAutoencoder) -> int:
    return network.blocks[0].attention.heads if len(network.blocks) else 1


def _hidden(network: MaskedAutoencoder) -> int:
    return network.blocks[0].up.kernel[...].shape[1] if len(network.blocks) else 4 * network.latent


def _layer(dense: Dense) -> dict[str, np.ndarray]:
    return {"weight": np.asarray(dense.kernel[...]).T, "bias": np.asarray(dense.bias[...])}


def _norm(norm: LayerNorm) -> dict[str, np.ndarray]:
    return {"weight": np.asarray(norm.scale[...]), "bias": np.asarray(norm.bias[...])}


def _named(parts: dict[str, dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {f"{name}.{each}": array for name, arrays in parts.items() for each, array in arrays.items()}


def _huggingface(network: MaskedAutoencoder) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    kernel, positions = _folded(network)
    parts = {"embeddings.patch_embeddings.projection": {"weight": kernel, "bias": np.asarray(network.embed.bias[...])}}
    parts["layernorm"] = _norm(network.norm)
    for i, block in enumerate(network.blocks):
        joint = _layer(block.attention.qkv)
        weights, biases = np.split(joint["weight"], 3), np.split(joint["bias"], 3)
        for name, weight, bias in zip(("query", "key", "value"), weights, biases, strict=True):
            parts[f"encoder.layer.{i}.attention.attention.{name}"] = {"weight": weight, "bias": bias}
        parts[f"encoder.layer.{i}.attention.output.dense"] = _layer(block.attention.out)
        parts[f"encoder.layer.{i}.intermediate.dense"] = _layer(block.up)
        parts[f"encoder.layer.{i}.output.dense"] = _layer(block.down)
        parts[f"encoder.layer.{i}.layernorm_before"] = _norm(block.norm1)
        parts[f"encoder.layer.{i}.layernorm_after"] = _norm(block.norm2)
    arrays = _named(parts)
    arrays["embeddings.cls_token"] = np.asarray(network.class_token[...])[None, None]
    arrays["embeddings.position_embeddings"] = positions[None]
    h, w, c = network.image_shape
    ph, pw = patch_hw(network.corruption.patch_size)
    about = {
        "architectures": ["ViTMAEModel"],
        "model_type": "vit_mae",
        "image_size": h if h == w else [h, w],
        "patch_size": ph if ph == pw else [ph, pw],
        "num_channels": c,
        "hidden_size": network.latent,
        "num_hidden_layers": len(network.blocks),
        "num_attention_heads": _heads(network),
        "intermediate_size": _hidden(network),
        "hidden_act": _activation(network, "gelu_pytorch_tanh"),
        "layer_norm_eps": network.norm.epsilon,
        "mask_ratio": 0.0,
        "qkv_bias": True,
        "decoder_hidden_size": 512,
        "decoder_num_hidden_layers": 8,
        "decoder_num_attention_heads": 16,
        "decoder_intermediate_size": 2048,
    }
    return arrays, about


def _preprocessor(network: MaskedAutoencoder) -> dict[str, Any]:
    """How pixels reach the exported network: divided by 255."""
    h, w, c = network.image_shape
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": h, "width": w},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": False,
        "image_mean": [0.0] * c,
        "image_std": [1.0] * c,
    }


def _timm(network: MaskedAutoencoder) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    kernel, positions = _folded(network)
    parts = {"patch_embed.proj": {"weight": kernel, "bias": np.asarray(network.embed.bias[...])}}
    parts["norm"] = _norm(network.norm)
    for i, block in enumerate(network.blocks):
        parts[f"blocks.{i}.norm1"] = _norm(block.norm1)
        parts[f"blocks.{i}.attn.qkv"] = _layer(block.attention.qkv)
        parts[f"blocks.{i}.attn.proj"] = _layer(block.attention.out)
        parts[f"blocks.{i}.norm2"] = _norm(block.norm2)
        parts[f"blocks.{i}.mlp.fc1"] = _layer(block.up)
        parts[f"blocks.{i}.mlp.fc2"] = _layer(block.down)
    arrays = _named(parts)
    arrays["cls_token"] = np.asarray(network.class_token[...])[None, None]
    arrays["pos_embed"] = positions[None]
    h, w, c = network.image_shape
    if not math.isclose(network.norm.epsilon, 1e-6):
        raise InputError(f"layer norms with an epsilon of {network.norm.epsilon:g} are not those of timm (1e-6)")
    about = {
        "architecture": "vit_base_patch16_224",
        "num_classes": 0,
        "num_features": network.latent,
        "global_pool": "token",
        "model_args": {
            "img_size": [h, w],
            "patch_size": list(network.patch_size),
            "in_chans": c,
            "embed_dim": network.latent,
            "depth": len(network.blocks),
            "num_heads": _heads(network),
            "mlp_ratio": _hidden(network) / network.latent,
            "act_layer": _activation(network, "gelu_tanh"),
        },
        "pretrained_cfg": {"input_size": [c, h, w], "mean": [0.0] * c, "std": [1.0] * c, "num_classes": 0},
    }
    return arrays, about


def _plain(network: Autoencoder) -> dict[str, np.ndarray]:
    """All arrays of a network under the names of its parts, and what normalises its pixels."""
    leaves = jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(nnx.state(network)))
    arrays = {".".join(str(getattr(key, "key", key)) for key in path): np.asarray(leaf) for path, leaf in leaves}
    pixels = {"pixels.mean": np.asarray(network.pixels.mean), "pixels.scale": np.asarray(network.pixels.scale)}
    return arrays | pixels


def _about(network: Autoencoder) -> dict[str, Any]:
    return {
        "network": type(network).__name__,
        "image_shape": list(network.image_shape),
        "num_features": network.latent,
        "input": "(pixels - pixels.mean) / pixels.scale",
    }
