"""Dense, convolutional and residual autoencoders: what they compute and what their loss is."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from model_zoo import IMAGES, PIXELS, SHAPE, build, draw, make

import mae_align as ma
from mae_align.corruption import Corruption, FixedCountPatchMasking, GaussianNoise
from mae_align.models import Autoencoder, ConvAutoencoder, MLPAutoencoder, Pixels, ResNetAutoencoder
from mae_align.models.conv import list_sides, upsample
from mae_align.models.resnet import BasicBlock, ConvNorm
from mae_align.moments.moments import Moments
from mae_align.runtime.errors import InputError

KEY = jax.random.key(3)


def linear(corruption: Corruption | None = None, latent: int = 3, pixels: Pixels = PIXELS) -> MLPAutoencoder:
    return build(
        lambda: MLPAutoencoder(
            pixels, hidden=(), latent=latent, activation=None, corruption=corruption, rngs=nnx.Rngs(0)
        )
    )


def test_without_hidden_layers_and_activation_the_network_is_affine():
    model, x = linear(), [draw(seed=s).astype(np.float32) for s in (1, 2)]
    for f in (jax.jit(model.encode), jax.jit(model.reconstruct)):
        np.testing.assert_allclose(f(0.3 * x[0] + 0.7 * x[1]), 0.3 * f(x[0]) + 0.7 * f(x[1]), rtol=1e-4, atol=1e-4)
        assert np.abs(f(np.zeros_like(x[0]))).max() > 0.1  # affine, not linear


def test_mlp_follows_the_definition():
    model = make("mlp")
    assert isinstance(model, MLPAutoencoder)
    x = ((IMAGES - np.float64(PIXELS.mean)) / np.float64(PIXELS.scale)).reshape(len(IMAGES), -1)

    def through(layers: nnx.List, x: np.ndarray) -> np.ndarray:
        for index, layer in enumerate(layers):
            if index:
                x = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
            x = x @ np.asarray(layer.kernel[...], np.float64) + np.asarray(layer.bias[...], np.float64)
        return x

    code = through(model.down, x)
    out = through(model.up, code)
    assert [layer.kernel[...].shape for layer in model.up] == [(3, 5), (5, 7), (7, 48)]
    np.testing.assert_allclose(jax.jit(model.encode)(IMAGES), code, atol=1e-4)
    stored = out.reshape(IMAGES.shape) * np.float64(PIXELS.scale) + PIXELS.mean
    np.testing.assert_allclose(jax.jit(model.reconstruct)(IMAGES), stored, atol=1e-2)
    value, metrics = jax.jit(model.loss)(IMAGES, KEY)
    np.testing.assert_allclose(value, ((out - x) ** 2).mean(), rtol=1e-4)
    assert list(metrics) == ["reconstruction"] and metrics["reconstruction"] == value


@pytest.mark.parametrize(
    "decoder_hidden, shapes", [((), [(3, 48)]), ((5, 6), [(3, 5), (5, 6), (6, 48)]), (None, [(3, 9), (9, 8), (8, 48)])]
)
def test_decoder_has_its_own_widths_and_the_encoder_keeps_its(decoder_hidden, shapes):
    model = MLPAutoencoder(PIXELS, hidden=(8, 9), decoder_hidden=decoder_hidden, latent=3, rngs=nnx.Rngs(0))
    assert [layer.kernel[...].shape for layer in model.up] == shapes
    assert [layer.kernel[...].shape for layer in model.down] == [(48, 8), (8, 9), (9, 3)]


def test_without_hidden_layers_the_decoder_is_affine_and_the_encoder_is_not():
    model = MLPAutoencoder(PIXELS, hidden=(8,), decoder_hidden=(), latent=3, rngs=nnx.Rngs(0))
    a, b = np.random.default_rng(1).normal(size=(2, 4, 3)).astype(np.float32)
    decode = jax.jit(model.decoder)
    np.testing.assert_allclose(decode(0.3 * a + 0.7 * b), 0.3 * decode(a) + 0.7 * decode(b), atol=1e-5)
    x, y = draw(seed=1).astype(np.float32), draw(seed=2).astype(np.float32)
    encode = jax.jit(model.encode)
    assert np.abs(encode(0.5 * x + 0.5 * y) - 0.5 * encode(x) - 0.5 * encode(y)).max() > 1e-2


@pytest.mark.parametrize("corruption", [None, FixedCountPatchMasking((2, 3), 2), GaussianNoise(25.0)])
def test_at_the_closed_form_solution_the_loss_is_the_closed_forms(corruption):
    """Theorem 3's minimum over tr cov(x): the same problem in other units. Masks and noise by Monte Carlo."""
    images, k = draw(40, seed=5), 4
    moments = Moments.from_arrays(images)
    solved = ma.denoising_autoencoder(moments, corruption or GaussianNoise(0.0), k, pixel_noise=0.0)
    model = linear(corruption, k, Pixels.of(moments))
    for layer, kernel in zip((*model.down, *model.up), (solved.encoder, solved.decoder), strict=True):
        layer.kernel[...] = jnp.asarray(kernel, jnp.float32)
        layer.bias[...] = jnp.zeros_like(layer.bias[...])
    np.testing.assert_allclose(jax.jit(model.reconstruct)(images), solved.reconstruct(images), rtol=1e-3, atol=1e-2)
    keys = jax.random.split(KEY, 500)
    losses = np.asarray(jax.jit(jax.vmap(lambda key: model.loss(images, key)[0]))(keys), np.float64)
    tolerance = 1e-5 if corruption is None else 5 * losses.std() / np.sqrt(len(keys)) / losses.mean()
    np.testing.assert_allclose(losses.mean(), solved.loss / np.trace(moments.sxx), rtol=tolerance)
    assert tolerance < 5e-3


class Shift(GaussianNoise):
    """Adds one and the fill: says what the sampler was given."""

    def sample(self, key: jax.Array, images: jax.Array, fill: jax.Array) -> jax.Array:
        assert images.dtype == jnp.float32
        return images + 1.0 + fill[None]


def test_the_corrupted_image_goes_in_and_the_clean_one_is_the_target():
    """In stored pixels, with the mean image as the fill."""
    model = linear(Shift(1.0))
    clean = linear()
    shifted = np.float32(IMAGES) + 1 + PIXELS.mean
    gap = PIXELS.normalize(clean.reconstruct(shifted)) - PIXELS.normalize(IMAGES)
    np.testing.assert_allclose(model.loss(IMAGES, KEY)[0], np.square(gap).mean(), rtol=1e-4)
    np.testing.assert_array_equal(model.encode(IMAGES), clean.encode(IMAGES))
    loss, metrics, features = model.loss_and_features(IMAGES, KEY)
    np.testing.assert_array_equal(features, model.encode(IMAGES))
    assert loss == model.loss(IMAGES, KEY)[0] == metrics["reconstruction"]


@pytest.mark.parametrize("name", ["conv", "resnet"])
def test_loss_is_the_mean_squared_error_of_the_reconstruction(name):
    model = make(name)
    model.eval()
    loss, _, features = jax.jit(model.loss_and_features)(IMAGES, KEY)
    found, code = jax.jit(lambda x: (model.reconstruct(x), model.encode(x)))(IMAGES)
    expected = np.square((np.asarray(found, np.float64) - IMAGES) / np.float64(PIXELS.scale)).mean()
    np.testing.assert_allclose(loss, expected, rtol=1e-4)
    np.testing.assert_allclose(features, code, atol=1e-5)


def test_batch_norm_learns_its_statistics_in_train_mode_only():
    layer = ConvNorm(1, 2, 3, 2, rngs=nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(0).normal(2.0, 3.0, size=(8, 5, 5, 1)), jnp.float32)
    y = np.asarray(layer.conv(x), np.float64)
    mean, var = y.mean((0, 1, 2)), y.var((0, 1, 2))
    np.testing.assert_allclose(layer(x), (y - mean) / np.sqrt(var + 1e-5), atol=1e-4)
    np.testing.assert_allclose(layer.norm.mean[...], 0.1 * mean, rtol=1e-4)
    np.testing.assert_allclose(layer.norm.var[...], 0.9 + 0.1 * var, rtol=1e-4)
    layer.eval()
    running = [np.asarray(layer.norm.mean[...]), np.asarray(layer.norm.var[...])]
    np.testing.assert_allclose(layer(x), (y - running[0]) / np.sqrt(running[1] + 1e-5), atol=1e-4)
    np.testing.assert_array_equal(layer.norm.mean[...], running[0])


@pytest.mark.parametrize("corruption", [None, Shift(1.0)])
def test_a_training_step_of_the_residual_network_updates_its_statistics_once(corruption):
    """Through merge(copy=True) inside a gradient, and not again by the features, of a pass of their own or not."""
    model = nnx.clone(make("resnet"))
    assert isinstance(model, ResNetAutoencoder)
    model.corruption = corruption
    model.train()
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def step(params: nnx.State, both: bool) -> tuple[jax.Array, nnx.State]:
        net = nnx.merge(graph, params, rest, copy=True)
        loss = net.loss_and_features(IMAGES, KEY)[0] if both else net.loss(IMAGES, KEY)[0]
        return loss, nnx.state(net, nnx.BatchStat)

    (_, once), grads = jax.jit(jax.value_and_grad(lambda p: step(p, False), has_aux=True))(params)
    _, again = jax.jit(lambda p: step(p, True))(params)
    before = nnx.state(model, nnx.BatchStat)
    for old, new, other in zip(*map(jax.tree.leaves, (before, once, again)), strict=True):
        assert np.abs(old - new).max() > 0
        np.testing.assert_allclose(new, other, atol=1e-5)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def test_features_in_eval_mode_do_not_depend_on_the_batch():
    model = make("resnet")
    model.eval()
    encode = jax.jit(model.encode)
    np.testing.assert_allclose(encode(IMAGES[:2]), encode(IMAGES)[:2], atol=1e-5)


def test_basic_block_keeps_the_identity_where_shapes_allow():
    assert BasicBlock(2, 2, 1, rngs=nnx.Rngs(0)).shortcut is None
    for inputs, stride in ((1, 1), (2, 2)):
        assert BasicBlock(inputs, 2, stride, rngs=nnx.Rngs(0)).shortcut is not None


@pytest.mark.parametrize("blocks,convolutions", [((2, 2, 2, 2), 18), ((3, 4, 6, 3), 34)])
def test_residual_networks_have_the_published_depth_and_size(blocks, convolutions):
    """ResNet-18 and -34: 11.17 and 21.28 million parameters without the classifier, for small images."""
    pixels = Pixels(np.zeros((32, 32, 3), np.float32), np.ones((), np.float32))
    model = nnx.eval_shape(lambda: ResNetAutoencoder(pixels, blocks=blocks, latent=10, rngs=nnx.Rngs(0)))
    encoder = [leaf.shape for part in (model.stem, model.down) for leaf in jax.tree.leaves(nnx.state(part, nnx.Param))]
    assert sum(shape[:2] == (3, 3) for shape in encoder) + 1 == convolutions
    # Published counts with a 7x7 stem and a 1000-class layer: 11,689,512 and 21,797,672.
    published = {18: 11_689_512, 34: 21_797_672}[convolutions]
    assert sum(np.prod(shape) for shape in encoder) == published - 513_000 - (49 - 9) * 3 * 64
    assert model.code_shape == (4, 4, 512)


@pytest.mark.parametrize("shape,stem_stride", [((7, 5, 1), 1), ((9, 12, 3), 4)])
def test_sides_that_halving_does_not_divide_come_back(shape, stem_stride):
    pixels = Pixels(np.zeros(shape, np.float32), np.ones((), np.float32))
    images = jax.ShapeDtypeStruct((2, *shape), jnp.uint8)

    def shapes(make: type[Autoencoder], **sizes: object) -> tuple[tuple[int, ...], ...]:
        def run(images: jax.Array) -> tuple[jax.Array, jax.Array]:
            model = make(pixels, latent=3, rngs=nnx.Rngs(0), **sizes)  # pyright: ignore[reportCallIssue]
            return model.encode(images), model.reconstruct(images)

        return tuple(out.shape for out in jax.eval_shape(run, images))

    assert shapes(ConvAutoencoder, widths=(4, 4, 4)) == ((2, 3), (2, *shape))
    assert shapes(ResNetAutoencoder, blocks=(1, 1, 1), width=2, stem_stride=stem_stride) == ((2, 3), (2, *shape))


def test_upsampling_repeats_and_cuts():
    x = jnp.arange(12.0).reshape(1, 2, 3, 2)
    np.testing.assert_array_equal(upsample(x, (3, 5)), np.repeat(np.repeat(x, 2, 1), 2, 2)[:, :3, :5])
    assert list_sides((9, 5), (4, 1, 2)) == ((9, 5), (3, 2), (3, 2), (2, 1))


@pytest.mark.parametrize(
    "construct,message",
    [
        (lambda: MLPAutoencoder(PIXELS, latent=0, rngs=nnx.Rngs(0)), "latent=0"),
        (lambda: MLPAutoencoder(PIXELS, hidden=(8, 0), rngs=nnx.Rngs(0)), "hidden widths"),
        (lambda: MLPAutoencoder(PIXELS, decoder_hidden=(4, 0), rngs=nnx.Rngs(0)), "hidden widths"),
        (lambda: MLPAutoencoder(PIXELS, corruption=GaussianNoise(np.ones((2, 2, 1))), rngs=nnx.Rngs(0)), "shape"),
        (lambda: ConvAutoencoder(PIXELS, latent=-1, rngs=nnx.Rngs(0)), "latent=-1"),
        (lambda: ConvAutoencoder(PIXELS, widths=(), rngs=nnx.Rngs(0)), "widths"),
        (lambda: ResNetAutoencoder(PIXELS, blocks=(1, 0), rngs=nnx.Rngs(0)), "blocks"),
        (lambda: ResNetAutoencoder(PIXELS, stem_stride=0, rngs=nnx.Rngs(0)), "stem_stride"),
        (lambda: ResNetAutoencoder(PIXELS, corruption=FixedCountPatchMasking(2, 99), rngs=nnx.Rngs(0)), "num_visible"),
    ],
)
def test_bad_sizes_are_refused(construct, message):
    with pytest.raises(InputError, match=message):
        construct()


@pytest.mark.parametrize("name", ["mlp", "conv", "resnet", "vit"])
def test_images_of_another_shape_are_refused_when_traced(name):
    model, images = make(name), jax.ShapeDtypeStruct((2, SHAPE[1], SHAPE[0], SHAPE[2]), jnp.uint8)
    for method in (model.encode, model.reconstruct, lambda x: model.loss(x, KEY)):
        with pytest.raises(InputError, match=r"this model takes \[b, 4, 6, 2\]"):
            jax.eval_shape(method, images)
