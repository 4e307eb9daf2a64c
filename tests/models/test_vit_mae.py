"""The masked autoencoder against an independent float64 implementation."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from flax import nnx
from model_zoo import IMAGES, PATCH, PIXELS, SHAPE, VIT, build, draw, vit

from mae_align.corruption import FixedCountPatchMasking, GaussianNoise, PatchMasking, RandomRatioMasking
from mae_align.data.patches import patch_labels
from mae_align.models import (
    VIT_BASE,
    VIT_LARGE,
    VIT_NANO,
    VIT_SMALL,
    VIT_TINY,
    Loss,
    MaskedAutoencoder,
    Pixels,
    gelu_exact,
)
from mae_align.models.vit_mae import sincos_positions
from mae_align.runtime.errors import InputError

KEY = jax.random.key(3)
ACTIVATIONS = [jax.nn.gelu, jax.nn.gelu, gelu_exact]


class Oracle:
    """He et al.'s forward pass, one image at a time, patches kept in their own order."""

    def __init__(self, model: MaskedAutoencoder, heads: int, decoder_heads: int, act):
        state = nnx.to_pure_dict(nnx.state(model, nnx.Param))
        self.p = jax.tree.map(lambda a: np.asarray(a, np.float64), state)
        self.heads, self.decoder_heads, self.act = heads, decoder_heads, act
        self.mean, self.scale = np.asarray(PIXELS.mean, np.float64), float(PIXELS.scale)

    def dense(self, p, x):
        return x @ p["kernel"] + p["bias"]

    def norm(self, p, x):
        return (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]

    def block(self, p, x, heads):
        width = x.shape[1]
        size = width // heads
        qkv = self.dense(p["attention"]["qkv"], self.norm(p["norm1"], x))
        joined = np.zeros_like(x)
        for head in range(heads):
            columns = np.arange(head * size, (head + 1) * size)
            q, k, v = (qkv[:, part * width + columns] for part in range(3))
            joined[:, columns] = scipy.special.softmax(q @ k.T / np.sqrt(size), axis=1) @ v
        x = x + self.dense(p["attention"]["out"], joined)
        return x + self.dense(p["down"], self.act(self.dense(p["up"], self.norm(p["norm2"], x))))

    def patches(self, image):
        z = (image.astype(np.float64) - self.mean) / self.scale
        ph, pw = PATCH
        rows = range(0, SHAPE[0], ph)
        return np.array([z[r : r + ph, c : c + pw].reshape(-1) for r in rows for c in range(0, SHAPE[1], pw)])

    def positions(self, width):
        """Published loop: half of the width for the column, half for the row; sines, then cosines."""
        ph, pw = PATCH
        out = []
        for row in range(SHAPE[0] // ph):
            for column in range(SHAPE[1] // pw):
                angles = [[i / 10000 ** (j / (width / 4)) for j in range(width // 4)] for i in (column, row)]
                out.append(np.concatenate([f(a) for a in angles for f in (np.sin, np.cos)]))
        return np.array(out)

    def encode(self, image, visible):
        tokens = (self.dense(self.p["embed"], self.patches(image)) + self.positions(VIT["width"]))[visible]
        x = np.concatenate([self.p["class_token"][None], tokens])
        for index in sorted(self.p["blocks"]):
            x = self.block(self.p["blocks"][index], x, self.heads)
        return self.norm(self.p["norm"], x)

    def predict(self, image, visible):
        """[N, patch_dim]."""
        x = self.dense(self.p["decoder_embed"], self.encode(image, visible))
        full = np.tile(self.p["mask_token"], (len(visible), 1))
        full[visible] = x[1:]
        x = np.concatenate([x[:1], full + self.positions(VIT["decoder_width"])])
        for index in sorted(self.p["decoder_blocks"]):
            x = self.block(self.p["decoder_blocks"][index], x, self.decoder_heads)
        return self.dense(self.p["head"], self.norm(self.p["decoder_norm"], x))[1:]

    def target(self, image, norm_pix):
        patches = self.patches(image)
        if not norm_pix:
            return patches
        return (patches - patches.mean(1, keepdims=True)) / np.sqrt(patches.var(1, ddof=1, keepdims=True) + 1e-6)

    def loss(self, mask, objective):
        errors = np.array(
            [
                ((self.predict(image, ~m) - self.target(image, objective is Loss.standard)) ** 2).mean(1)
                for image, m in zip(IMAGES, mask, strict=True)
            ]
        )
        return errors.mean() if objective is Loss.matched else errors[mask].mean()


def tanh_gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def erf_gelu(x):
    return x * scipy.special.ndtr(x)


@functools.cache
def make(objective, activation=jax.nn.gelu) -> MaskedAutoencoder:
    return build(lambda: vit(nnx.Rngs(0), objective=objective, activation=activation))


@pytest.fixture(scope="module")
def model() -> MaskedAutoencoder:
    return make(Loss.standard)


@pytest.fixture(scope="module")
def oracle(model) -> Oracle:
    return Oracle(model, VIT["heads"], VIT["decoder_heads"], tanh_gelu)


@pytest.fixture(scope="module")
def mask(model) -> np.ndarray:
    return ~np.asarray(model.corruption.sample_kept(KEY, len(IMAGES), model.num_patches))


def test_predictions_follow_the_published_forward_pass(model, oracle, mask):
    found = jax.jit(model.predict)(IMAGES, KEY)
    np.testing.assert_array_equal(found.mask, mask)
    expected = np.array([oracle.predict(image, ~m) for image, m in zip(IMAGES, mask, strict=True)])
    np.testing.assert_allclose(found.prediction, expected, atol=1e-4)
    hidden = np.array([patch_labels(SHAPE, PATCH).reshape(SHAPE)] * len(IMAGES))
    hidden = np.take_along_axis(mask, hidden.reshape(len(IMAGES), -1), axis=1).reshape(IMAGES.shape)
    np.testing.assert_allclose(found.masked_images, np.where(hidden, PIXELS.mean, IMAGES), atol=1e-3)


@pytest.mark.parametrize("objective,activation", list(zip(Loss, ACTIVATIONS, strict=True)))
def test_losses_follow_the_published_ones(mask, objective, activation):
    model = make(objective, activation)
    value, metrics = jax.jit(model.loss)(IMAGES, KEY)
    oracle = Oracle(model, VIT["heads"], VIT["decoder_heads"], tanh_gelu if activation is jax.nn.gelu else erf_gelu)
    np.testing.assert_allclose(value, oracle.loss(mask, objective), rtol=1e-4)
    assert metrics["reconstruction"] == value and value.dtype == jnp.float32


def test_features_are_the_mean_over_all_patches_without_the_class_token(model, oracle):
    everything = np.ones(model.num_patches, bool)
    expected = [oracle.encode(image, everything)[1:].mean(0) for image in IMAGES]
    found = jax.jit(model.encode)(IMAGES)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert found.shape == (len(IMAGES), model.latent) and found.dtype == jnp.float32


@pytest.mark.parametrize("objective", [Loss.standard, Loss.hidden])
def test_reconstruction_is_in_stored_pixels(oracle, objective):
    """With norm_pix each patch's own mean and deviation are put back."""
    found = jax.jit(make(objective).reconstruct)(IMAGES)
    model = make(objective)
    for image, result in zip(IMAGES, found, strict=True):
        patches = oracle.predict(image, np.ones(model.num_patches, bool))
        own = oracle.patches(image)
        if objective is Loss.standard:
            patches = patches * np.sqrt(own.var(1, ddof=1, keepdims=True) + 1e-6) + own.mean(1, keepdims=True)
        result = oracle.patches(np.asarray(result))
        np.testing.assert_allclose(result, patches, atol=1e-3)


@pytest.mark.parametrize("objective", Loss)
def test_targets_are_what_the_loss_compares_with(oracle, objective):
    expected = [oracle.target(image, objective is Loss.standard) for image in IMAGES]
    np.testing.assert_allclose(make(objective).targets(IMAGES), expected, atol=1e-3)


def test_a_flat_patch_has_finite_loss_and_gradient():
    flat = Pixels(np.round(np.asarray(PIXELS.mean)), PIXELS.scale)
    images = np.concatenate([flat.mean[None], IMAGES[1:]])
    model = build(lambda: vit(nnx.Rngs(0), pixels=flat, corruption=FixedCountPatchMasking(PATCH, 1)))
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    value, grads = jax.jit(
        jax.value_and_grad(lambda params: nnx.merge(graph, params, rest).loss(jnp.asarray(images), KEY)[0])
    )(params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((value, grads)))


def test_hidden_pixels_never_reach_the_encoder(model):
    """Only targets change with them: predictions do not."""
    predict, other = jax.jit(model.predict), draw(seed=9)
    first = predict(IMAGES, KEY)
    label = patch_labels(SHAPE, PATCH).reshape(SHAPE)
    swapped = np.where(np.asarray(first.mask)[:, label], other, IMAGES)
    second = predict(swapped, KEY)
    np.testing.assert_array_equal(first.prediction, second.prediction)
    visible_changed = predict(np.where(np.asarray(first.mask)[:, label], IMAGES, other), KEY)
    assert np.abs(first.prediction - visible_changed.prediction).max() > 1e-3


def test_masks_are_fixed_in_number_and_agree_with_the_closed_form():
    """Frequencies of one and of two patches kept, by the loss's own draw, against the mask's probabilities."""
    images, mask = draw(64, shape=(4, 6, 1)), FixedCountPatchMasking(2, num_visible=2)
    model = vit(nnx.Rngs(0), pixels=Pixels.from_images(images), corruption=mask, depth=0, decoder_depth=0)
    assert model.num_patches == 6
    draws = jax.jit(jax.vmap(lambda key: model.predict(images, key).mask))(jax.random.split(KEY, 100))
    kept = ~np.asarray(draws).reshape(-1, 6)
    assert np.all(kept.sum(1) == 2)
    n, one, pair = len(kept), mask.keep_probability((4, 6, 1)), mask.pair_share((4, 6, 1)) / 3
    np.testing.assert_allclose(kept.mean(0), one, atol=5 * np.sqrt(one / n))
    both = (kept[:, :, None] & kept[:, None, :]).mean(0)[~np.eye(6, dtype=bool)]
    np.testing.assert_allclose(both, pair, atol=5 * np.sqrt(pair / n))


def test_the_network_sees_what_the_corruption_leaves():
    """One object, both worlds: with one key the sampler of the corruption and the network mask the same pixels."""
    model = vit(nnx.Rngs(0), depth=0, decoder_depth=0)
    corrupted = model.corruption.sample(KEY, jnp.asarray(IMAGES, jnp.float32), jnp.asarray(PIXELS.mean))
    np.testing.assert_allclose(jax.jit(model.predict)(IMAGES, KEY).masked_images, corrupted, atol=1e-3)


def test_patches_are_numbered_as_everywhere_else(model):
    """The labels of patches.py, sent through patchify, are constant in a patch and count up."""
    label = patch_labels(SHAPE, PATCH).reshape(1, *SHAPE)
    np.testing.assert_array_equal(model.patchify(label)[0], np.tile(np.arange(4)[:, None], (1, model.patch_dim)))
    np.testing.assert_array_equal(model.unpatchify(model.patchify(IMAGES)), IMAGES)
    np.testing.assert_array_equal(model.patchify(IMAGES)[0, 1], IMAGES[0, :2, 3:].reshape(-1))


def test_nothing_hidden_is_the_plain_autoencoder():
    model = build(lambda: vit(nnx.Rngs(0), corruption=FixedCountPatchMasking(PATCH, 4), objective=Loss.matched))
    found = jax.jit(model.predict)(IMAGES, KEY)
    assert not np.asarray(found.mask).any()
    np.testing.assert_allclose(found.masked_images, IMAGES, atol=1e-3)
    whole = model.patchify(PIXELS.normalize(jax.jit(model.reconstruct)(IMAGES)))
    np.testing.assert_allclose(found.prediction, whole, atol=1e-4)


def test_positions_are_saved_and_not_trained(model):
    trained = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    assert not {"positions", "decoder_positions", "pixel_mean", "pixel_scale"} & set(trained)
    np.testing.assert_array_equal(model.positions[...], sincos_positions((2, 2), 8))


def test_first_parameters_are_as_published():
    """Xavier uniform kernels, of all of q, k and v together; tokens N(0, 0.02^2); no biases."""
    model = vit(nnx.Rngs(0), width=128, decoder_width=256, decoder_heads=4, decoder_depth=0)
    kernel = np.asarray(model.blocks[0].attention.qkv.kernel[...])
    np.testing.assert_allclose(np.abs(kernel).max(), np.sqrt(6 / (128 + 3 * 128)), rtol=1e-3)
    for token in (model.class_token, model.mask_token):
        np.testing.assert_allclose(np.asarray(token[...]).std(), 0.02, rtol=0.25)


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"corruption": FixedCountPatchMasking((3, 3), 1)}, "patch 3x3 does not divide the image 4x6"),
        ({"corruption": FixedCountPatchMasking(PATCH, 5)}, "num_visible=5 but the image has 4"),
        ({"corruption": FixedCountPatchMasking(PATCH, 4)}, "none is hidden"),
        ({"corruption": PatchMasking(PATCH, 0.5)}, r"give FixedCountPatchMasking\(patch_size, num_visible\)"),
        ({"corruption": RandomRatioMasking(PATCH, 0.0, 1.0)}, "exact number of patches"),
        ({"corruption": GaussianNoise(1.0)}, "exact number of patches"),
        ({"corruption": None}, "exact number of patches"),
        ({"corruption": FixedCountPatchMasking(PATCH, 2, fill=0.0)}, "without a fill"),
        ({"heads": 3}, "3 heads do not divide the width 8"),
        ({"decoder_heads": 5}, "5 heads do not divide the width 12"),
        ({"width": 6}, "multiple of 4"),
        ({"decoder_width": 0}, "multiple of 4"),
        ({"width": 0}, "latent=0"),
        ({"depth": -1}, "depth=-1"),
        ({"mlp_ratio": 0}, "mlp_ratio=0"),
    ],
)
def test_bad_sizes_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        vit(nnx.Rngs(0), **changes)


def test_a_patch_of_one_value_cannot_be_normalised():
    pixels = Pixels.from_images(draw(shape=(2, 2, 1)))
    with pytest.raises(InputError, match="no variance"):
        vit(nnx.Rngs(0), pixels=pixels, corruption=FixedCountPatchMasking(1, 2))
    given = {"corruption": FixedCountPatchMasking(1, 2), "objective": Loss.hidden}
    nnx.eval_shape(lambda: vit(nnx.Rngs(0), pixels=pixels, **given))


@pytest.mark.parametrize("size", [VIT_NANO, VIT_TINY, VIT_SMALL, VIT_BASE, VIT_LARGE])
def test_named_sizes_build_models(size):
    """Shapes only: nothing is allocated."""
    pixels = Pixels(np.zeros((32, 32, 3), np.float32), np.ones((), np.float32))
    mask = FixedCountPatchMasking(4, num_visible=16)
    model = nnx.eval_shape(lambda: MaskedAutoencoder(pixels, corruption=mask, **vars(size), rngs=nnx.Rngs(0)))
    assert (model.latent, len(model.blocks), len(model.decoder_blocks)) == (size.width, size.depth, size.decoder_depth)


def test_base_has_the_published_number_of_parameters():
    """ViT-B/16 encoder of He et al.: 85.8 million with fixed positions and the class token."""
    pixels = Pixels(np.zeros((224, 224, 3), np.float32), np.ones((), np.float32))
    mask = FixedCountPatchMasking(16, num_visible=49)
    model = nnx.eval_shape(lambda: MaskedAutoencoder(pixels, corruption=mask, **vars(VIT_BASE), rngs=nnx.Rngs(0)))
    parts = (nnx.state(part, nnx.Param) for part in (model.embed, model.blocks, model.norm))
    count = sum(leaf.size for part in parts for leaf in jax.tree.leaves(part)) + 768
    block = 4 * 768 * 768 + 4 * 768 + 2 * 4 * 768 * 768 + 5 * 768 + 4 * 768
    assert count == 768 * 768 + 768 + 12 * block + 2 * 768 + 768 == 85_647_360
