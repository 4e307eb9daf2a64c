"""Published masked autoencoders: the files of others give the numbers of others.

Without torch: files with the names of both published codes, written with the safetensors library, against a float64
forward pass in NumPy. With torch and transformers: tests/models/test_published_parity.py.
"""

from __future__ import annotations

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from scipy.special import erf

import mae_align as ma
from mae_align.models import Loss, Pooling, load_mae
from mae_align.models.published import IMAGENET_MEAN, IMAGENET_STD

CONFIG = {
    "model_type": "vit_mae",
    "image_size": [12, 20],
    "num_channels": 3,
    "patch_size": 4,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "decoder_hidden_size": 8,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 16,
    "mask_ratio": 0.6,
    "norm_pix_loss": True,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-3,
}
COUNT = 15  # 3 by 5 patches
RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (3, 12, 20, 3), dtype=np.uint8)


def shapes(about, *, decoder=True):
    """Names and shapes of ViTMAEForPreTraining, written out by hand."""
    d, e, p, c = about["hidden_size"], about["decoder_hidden_size"], about["patch_size"], about["num_channels"]
    found = {"vit.embeddings.cls_token": (1, 1, d), "vit.embeddings.position_embeddings": (1, COUNT + 1, d)}
    found |= {"vit.embeddings.patch_embeddings.projection.weight": (d, c, p, p)}
    found |= {"vit.embeddings.patch_embeddings.projection.bias": (d,)}
    found |= {"vit.layernorm.weight": (d,), "vit.layernorm.bias": (d,)}

    def layers(prefix, count, width, hidden):
        for i in range(count):
            for name in ("attention.attention.query", "attention.attention.key", "attention.attention.value"):
                yield f"{prefix}.{i}.{name}", (width, width)
            yield f"{prefix}.{i}.attention.output.dense", (width, width)
            yield f"{prefix}.{i}.intermediate.dense", (hidden, width)
            yield f"{prefix}.{i}.output.dense", (width, hidden)
            for name in ("layernorm_before", "layernorm_after"):
                yield f"{prefix}.{i}.{name}", (width,)

    parts = [*layers("vit.encoder.layer", about["num_hidden_layers"], d, about["intermediate_size"])]
    if decoder:
        found |= {"decoder.mask_token": (1, 1, e), "decoder.decoder_pos_embed": (1, COUNT + 1, e)}
        parts += [
            ("decoder.decoder_embed", (e, d)),
            ("decoder.decoder_norm", (e,)),
            ("decoder.decoder_pred", (p * p * c, e)),
        ]
        parts += layers(
            "decoder.decoder_layers", about["decoder_num_hidden_layers"], e, about["decoder_intermediate_size"]
        )
    for name, shape in parts:
        found |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return found


def weights(about=CONFIG, **options):
    rng = np.random.default_rng(1)
    return {name: rng.normal(0, 0.3, shape).astype(np.float32) for name, shape in shapes(about, **options).items()}


def write(folder, arrays, about=CONFIG, name="model.safetensors"):
    folder.mkdir(parents=True, exist_ok=True)
    save_file(arrays, folder / name)
    (folder / "config.json").write_text(json.dumps(about))
    return folder


class Forward:
    """The published network in float64 NumPy."""

    def __init__(self, arrays, about=CONFIG):
        self.w, self.about = {name: array.astype(np.float64) for name, array in arrays.items()}, about

    def dense(self, x, name):
        return x @ self.w[f"{name}.weight"].T + self.w[f"{name}.bias"]

    def norm(self, x, name):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + self.about["layer_norm_eps"])
        return x * self.w[f"{name}.weight"] + self.w[f"{name}.bias"]

    def block(self, x, name, heads):
        y = self.norm(x, f"{name}.layernorm_before")
        b, n, d = y.shape
        split = [
            self.dense(y, f"{name}.attention.attention.{part}").reshape(b, n, heads, d // heads)
            for part in ("query", "key", "value")
        ]
        scores = np.einsum("bnhd,bmhd->bhnm", split[0], split[1]) / math.sqrt(d // heads)
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = np.einsum("bhnm,bmhd->bnhd", scores / scores.sum(-1, keepdims=True), split[2]).reshape(b, n, d)
        x = x + self.dense(mixed, f"{name}.attention.output.dense")
        hidden = self.dense(self.norm(x, f"{name}.layernorm_after"), f"{name}.intermediate.dense")
        return x + self.dense(hidden * (1 + erf(hidden / math.sqrt(2))) / 2, f"{name}.output.dense")

    def patches(self, images):
        """[b, N, c, p, p] of normalised images, row by row."""
        x = (images / 255 - np.array(IMAGENET_MEAN)) / np.array(IMAGENET_STD)
        p = self.about["patch_size"]
        return np.stack(
            [
                x[:, i : i + p, j : j + p].transpose(0, 3, 1, 2)
                for i in range(0, x.shape[1], p)
                for j in range(0, x.shape[2], p)
            ],
            axis=1,
        )

    def encode(self, images, keep=None):
        kernel = self.w["vit.embeddings.patch_embeddings.projection.weight"]
        positions = self.w["vit.embeddings.position_embeddings"][0]
        x = np.einsum("bncij,dcij->bnd", self.patches(images), kernel)
        x = x + self.w["vit.embeddings.patch_embeddings.projection.bias"] + positions[1:]
        if keep is not None:
            x = np.take_along_axis(x, keep[:, :, None], 1)
        first = np.broadcast_to(self.w["vit.embeddings.cls_token"][0] + positions[:1], (len(x), 1, x.shape[2]))
        x = np.concatenate([first, x], 1)
        for i in range(self.about["num_hidden_layers"]):
            x = self.block(x, f"vit.encoder.layer.{i}", self.about["num_attention_heads"])
        return self.norm(x, "vit.layernorm")

    def predict(self, images, order, visible):
        """Predictions of all patches in their places, for masks that hide those after the first in ``order``."""
        x = self.dense(self.encode(images, order[:, :visible]), "decoder.decoder_embed")
        masks = np.broadcast_to(self.w["decoder.mask_token"][0], (len(x), COUNT - visible, x.shape[2]))
        shuffled = np.concatenate([x[:, 1:], masks], 1)
        placed = np.take_along_axis(shuffled, np.argsort(order, 1)[:, :, None], 1)
        x = np.concatenate([x[:, :1], placed], 1) + self.w["decoder.decoder_pos_embed"]
        for i in range(self.about["decoder_num_hidden_layers"]):
            x = self.block(x, f"decoder.decoder_layers.{i}", self.about["decoder_num_attention_heads"])
        return self.dense(self.norm(x, "decoder.decoder_norm"), "decoder.decoder_pred")[:, 1:]

    def loss(self, images, order, visible):
        targets = self.patches(images).transpose(0, 1, 3, 4, 2).reshape(len(images), COUNT, -1)
        if self.about["norm_pix_loss"]:
            mean, variance = targets.mean(-1, keepdims=True), targets.var(-1, ddof=1, keepdims=True)
            targets = (targets - mean) / np.sqrt(variance + 1e-6)
        wrong = ((self.predict(images, order, visible) - targets) ** 2).mean(-1)
        hidden = np.argsort(order, 1) >= visible
        return (wrong * hidden).sum() / hidden.sum()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("hf"), weights())


def test_features_are_those_of_the_published_network(folder):
    tokens = Forward(weights()).encode(IMAGES)
    network = load_mae(folder)
    for pooling, expected in (
        (Pooling.tokens, tokens),
        (Pooling.cls, tokens[:, 0]),
        (Pooling.mean, tokens[:, 1:].mean(1)),
    ):
        np.testing.assert_allclose(network.encode(IMAGES, pooling), expected, atol=2e-5)
    np.testing.assert_array_equal(network.encode(IMAGES), network.encode(IMAGES, Pooling.mean))


@pytest.mark.parametrize("norm_pix", [True, False])
def test_predictions_and_loss_are_those_of_the_published_network(tmp_path, norm_pix):
    about = CONFIG | {"norm_pix_loss": norm_pix}
    network = ma.load_mae(write(tmp_path, weights(), about))
    assert network.corruption.num_visible == 6  # int(15 * (1 - 0.6))
    key = jax.random.key(3)
    order = np.asarray(network.corruption.sample_order(key, len(IMAGES), COUNT))
    oracle = Forward(weights(), about)
    found = network.predict(IMAGES, key)
    np.testing.assert_allclose(found.prediction, oracle.predict(IMAGES, order, 6), atol=2e-5)
    np.testing.assert_array_equal(found.mask, np.argsort(order, 1) >= 6)
    assert float(network.loss(IMAGES, key)[0]) == pytest.approx(oracle.loss(IMAGES, order, 6), rel=2e-6)
    restored = network.reconstruct(IMAGES)
    assert restored.shape == IMAGES.shape and bool(jnp.isfinite(restored).all())


def test_files_of_an_encoder_alone_encode_and_refuse_to_reconstruct(tmp_path, folder):
    alone = {name.removeprefix("vit."): array for name, array in weights().items() if name.startswith("vit.")}
    network = load_mae(write(tmp_path, alone))
    np.testing.assert_array_equal(network.encode(IMAGES), load_mae(folder).encode(IMAGES))
    with pytest.raises(ma.InputError, match="holds an encoder alone: give one with a decoder"):
        network.reconstruct(IMAGES)
    with pytest.raises(ma.InputError, match="holds an encoder alone"):
        network.loss(IMAGES, jax.random.key(0))


def test_shards_half_precision_and_files_without_biases_are_read(tmp_path, folder):
    arrays = weights()
    names = sorted(arrays)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in shards.items():
        write(tmp_path / "shards", {name: arrays[name] for name in part}, name=file)
    index = {"weight_map": {name: file for file, part in shards.items() for name in part}}
    (tmp_path / "shards" / "model.safetensors.index.json").write_text(json.dumps(index))
    expected = load_mae(folder).encode(IMAGES)
    np.testing.assert_array_equal(load_mae(tmp_path / "shards").encode(IMAGES), expected)
    halves = {name: array.astype(np.float16) for name, array in arrays.items()}
    rounded = write(tmp_path / "rounded", {name: array.astype(np.float32) for name, array in halves.items()})
    half = load_mae(write(tmp_path / "half", halves))
    five = {name.replace("decoder_layers", "decoder_encoder.layer"): array for name, array in arrays.items()}
    key = jax.random.key(0)
    newer = load_mae(write(tmp_path / "five", five))  # as transformers 5 writes it
    assert float(newer.loss(IMAGES, key)[0]) == float(load_mae(folder).loss(IMAGES, key)[0])
    np.testing.assert_array_equal(half.encode(IMAGES), load_mae(rounded).encode(IMAGES))
    bare = {
        name: array for name, array in arrays.items() if not name.endswith(("query.bias", "key.bias", "value.bias"))
    }
    zeros = {name: array * (name in bare) for name, array in arrays.items()}
    np.testing.assert_array_equal(
        load_mae(write(tmp_path / "bare", bare)).encode(IMAGES),
        load_mae(write(tmp_path / "zeros", zeros)).encode(IMAGES),
    )


def facebook(arrays, about):
    """The same weights with the names of facebookresearch/mae."""
    words = (
        ("vit.encoder.layer.", "blocks."),
        ("decoder.decoder_layers.", "decoder_blocks."),
        ("vit.embeddings.cls_token", "cls_token"),
        ("vit.embeddings.position_embeddings", "pos_embed"),
        ("vit.embeddings.patch_embeddings.projection", "patch_embed.proj"),
        ("vit.layernorm", "norm"),
        ("decoder.", ""),
        (".attention.output.dense", ".attn.proj"),
        (".intermediate.dense", ".mlp.fc1"),
        (".output.dense", ".mlp.fc2"),
        ("layernorm_before", "norm1"),
        ("layernorm_after", "norm2"),
    )
    found = {}
    for name, array in arrays.items():
        if ".attention.attention." in name:
            stem, _, rest = name.partition(".attention.attention.")
            if not rest.startswith("query"):
                continue
            three = [arrays[f"{stem}.attention.attention.{part}{rest[5:]}"] for part in ("query", "key", "value")]
            name, array = f"{stem}.attn.qkv{rest[5:]}", np.concatenate(three)
        for theirs, other in words:
            name = name.replace(theirs, other)
        found[name] = array
    return found


def test_names_of_the_published_code_are_read(tmp_path):
    """The width tells the heads of the published networks; the positions are of a square image."""
    global COUNT
    about = CONFIG | {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 768, "num_hidden_layers": 1}
    about |= {"decoder_hidden_size": 512, "decoder_num_attention_heads": 16, "decoder_intermediate_size": 512}
    about |= {"image_size": 16, "layer_norm_eps": 1e-6, "mask_ratio": 0.75}
    COUNT = 16
    try:
        arrays = {name: array * 0.2 for name, array in weights(about).items()}
    finally:
        COUNT = 15
    save_file(facebook(arrays, about), tmp_path / "mae.safetensors")
    images = RNG.integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    theirs, ours = load_mae(tmp_path / "mae.safetensors"), load_mae(write(tmp_path / "hf", arrays, about))
    assert theirs.corruption == ours.corruption and theirs.objective is Loss.standard
    for pooling in Pooling:
        np.testing.assert_array_equal(theirs.encode(images, pooling), ours.encode(images, pooling))
    key = jax.random.key(0)
    assert float(theirs.loss(images, key)[0]) == float(ours.loss(images, key)[0])


def test_positions_are_interpolated_for_other_sizes(folder):
    """A table that is linear in both coordinates stays so inside, and the wanted size is that of the images."""
    network = load_mae(folder, image_size=(24, 40))
    assert network.grid == (6, 10)
    assert network.encode(np.repeat(np.repeat(IMAGES, 2, 1), 2, 2)).shape == (3, 16)
    from mae_align.models.published import _interpolated

    table = RNG.normal(size=(72, 3)).astype(np.float32)
    np.testing.assert_allclose(_interpolated(np.ones_like(table), (9, 8), (13, 20)), 1, atol=1e-6)
    # The cubic convolution of torch, for one place half way between two.
    found = _interpolated(table, (9, 8), (18, 8)).reshape(18, 8, 3)[9]
    at, weight = 9.5 / 2 - 0.5, []
    for t in abs(at - np.arange(3, 7)):
        near, far = 1.25 * t**3 - 2.25 * t**2 + 1, -0.75 * (t**3 - 5 * t**2 + 8 * t - 4)
        weight.append(near if t <= 1 else far)
    np.testing.assert_allclose(found, np.einsum("i,ijk->jk", weight, table.reshape(9, 8, 3)[3:7]), atol=1e-6)
    np.testing.assert_array_equal(_interpolated(table, (9, 8), (9, 8)), table)


def test_normalisation_is_that_of_the_folder(tmp_path):
    arrays = weights()
    folder = write(tmp_path, arrays)
    plain = load_mae(folder).encode(IMAGES)
    about = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "rescale_factor": 1 / 255}
    (folder / "preprocessor_config.json").write_text(json.dumps(about))
    network = load_mae(folder)
    assert not np.allclose(network.encode(IMAGES), plain)
    np.testing.assert_allclose(network.pixels.normalize(IMAGES), IMAGES / 127.5 - 1, atol=1e-6)
    np.testing.assert_allclose(network.pixels.restore(network.pixels.normalize(IMAGES)), IMAGES, atol=1e-3)


def changed(**changes):
    return CONFIG | changes


@pytest.mark.parametrize(
    ("change", "about", "message"),
    [
        (lambda a: a.pop("vit.layernorm.bias"), CONFIG, r"lacks vit.layernorm.bias$"),
        (lambda a: a.update({"head.weight": np.zeros(3)}), CONFIG, r"holds weights that are not known: head.weight$"),
        (
            lambda a: a.pop("decoder.decoder_layers.0.output.dense.weight"),
            CONFIG,
            r"lacks decoder.decoder_layers.0.out",
        ),
        (
            lambda a: None,
            changed(hidden_size=32, intermediate_size=64),
            r"has shape \[16, 3, 4, 4\], not \[32, 3, 4, 4\]",
        ),
        (lambda a: None, changed(num_hidden_layers=3), r"lacks vit.encoder.layer.2.layernorm_before.*and \d+ more$"),
        (lambda a: None, changed(num_hidden_layers=1), "not known: vit.encoder.layer.1"),
        (lambda a: None, changed(model_type="vit"), "is of a 'vit': give a masked autoencoder"),
        (lambda a: None, changed(hidden_act="quick"), "hidden_act 'quick' is not known"),
        (lambda a: None, changed(intermediate_size=40), "hidden layers of 40 for a width of 16"),
        (lambda a: None, {"model_type": "vit_mae"}, "lacks image_size: it is no masked autoencoder"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, change, about, message):
    arrays = weights()
    change(arrays)
    with pytest.raises(ma.InputError, match=message) as error:
        load_mae(write(tmp_path, arrays, about))
    assert "\n" not in str(error.value)


def test_files_that_are_not_read_say_what_to_do(tmp_path, folder):
    (tmp_path / "mae.pth").write_bytes(b"x")
    with pytest.raises(ma.InputError, match=r"its format can run code: convert it once, .*safetensors"):
        load_mae(tmp_path / "mae.pth")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "pytorch_model.bin").touch()
    with pytest.raises(ma.InputError, match=r"holds no model.safetensors \(pytorch_model.bin is not read"):
        load_mae(tmp_path / "bin")
    (tmp_path / "cut.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:100])
    with pytest.raises(ma.InputError, match="damaged or no safetensors file"):
        load_mae(tmp_path / "cut.safetensors")
    save_file({"x": np.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ma.InputError, match=r"lacks patch_embed.proj.weight: it is no masked autoencoder"):
        load_mae(tmp_path / "other.safetensors")
    with pytest.raises(ma.InputError, match="multiples of the patch, 4 pixels"):
        load_mae(folder, image_size=(10, 20))
    assert set(load_file(folder / "model.safetensors")) == set(shapes(CONFIG))
