from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

import mae_align as ma
from mae_align.models import ConvClassifier, MLPClassifier, ModelKind, Pixels, ResNet9, predicted_classes
from mae_align.models.supervised import space_to_depth
from mae_align.runtime.processes import train_mesh
from mae_align.train.ensemble import Training, classify
from mae_align.train.optimizer import OptimizerConfig, adamw
from mae_align.train.step import Program

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (6, 16, 16, 3), dtype=np.uint8)
PIXELS = Pixels.from_images(IMAGES)
SMALL = (4, 4, 4, 4, 5)


def conv(x: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
    return lax.conv_general_dilated(x, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def params(model: nnx.Module) -> int:
    return sum(p.size for p in jax.tree.leaves(nnx.state(model, nnx.Param)))


def test_blocks_as_channels_make_the_first_layer_one_of_six_pixels_and_stride_two():
    x = jnp.asarray(RNG.normal(size=(2, 8, 8, 3)), jnp.float32)
    kernel = jnp.asarray(RNG.normal(size=(3, 3, 12, 4)), jnp.float32)
    # Channel (2 i + j) 3 + k of a block is its pixel (i, j), channel k.
    wide = kernel.reshape(3, 3, 2, 2, 3, 4).transpose(0, 2, 1, 3, 4, 5).reshape(6, 6, 3, 4)
    expected = lax.conv_general_dilated(x, wide, (2, 2), ((2, 2), (2, 2)), dimension_numbers=("NHWC", "HWIO", "NHWC"))
    np.testing.assert_allclose(conv(space_to_depth(x), kernel), expected, atol=1e-4)
    odd = space_to_depth(x[:, :7, :5])
    assert odd.shape == (2, 4, 3, 12)
    np.testing.assert_array_equal(odd[:, 3, :, 6:], 0.0)


def test_resnet9_is_the_published_network():
    model = ResNet9(PIXELS, 10, widths=SMALL, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(1)
    for _, stat in nnx.iter_graph(model):
        if isinstance(stat, nnx.BatchStat):
            # Running statistics that are not those of the start.
            stat[...] = jnp.asarray(rng.uniform(0.5, 2.0, stat.shape), jnp.float32)
    model.eval()

    def block(layer, x: jax.Array) -> jax.Array:
        norm, y = layer.norm, conv(x, layer.conv.kernel[...])
        mean, var, scale, bias = (v[...][None, None, None] for v in (norm.mean, norm.var, norm.scale, norm.bias))
        return jnp.maximum((y - mean) / jnp.sqrt(var + 1e-5) * scale + bias, 0.0)

    @jax.jit
    def features(model: ResNet9, x: jax.Array) -> jax.Array:
        x = block(model.stem, x)
        for index, residual in enumerate((True, False, True, True)):
            x = block(model.stages[index], x)
            b, h, w, c = x.shape
            x = x.reshape(b, h // 2, 2, w // 2, 2, c).max((2, 4))
            if residual:
                first, second = model.residuals[index]  # pyright: ignore[reportGeneralTypeIssues]
                x = x + block(second, block(first, x))
        return x.max((1, 2))

    expected = features(model, jnp.asarray((IMAGES - PIXELS.mean) / PIXELS.scale))
    found = jax.jit(lambda model, x: model.features(x))(model, IMAGES)
    assert found.shape == (6, 5)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_resnet9_has_the_published_size():
    published = nnx.eval_shape(lambda: ResNet9(PIXELS, 200, rngs=nnx.Rngs(0)))
    pairs = [(3, 64), (64, 128), (128, 256), (256, 512), (512, 1028)]
    pairs += [(w, w) for w in (128, 128, 512, 512, 1028, 1028)]
    assert params(published) == sum(9 * a * b + 2 * b for a, b in pairs) + 1028 * 200 + 200


@pytest.mark.parametrize("batch_norm", [True, False])
def test_normalisation_is_there_or_a_bias_is(batch_norm):
    narrow = ConvClassifier(PIXELS, 5, widths=(4, 8), batch_norm=batch_norm, rngs=nnx.Rngs(0))
    assert params(narrow) == 9 * 12 * 4 + 9 * 4 * 8 + (2 if batch_norm else 1) * 12 + 8 * 5 + 5
    dense = MLPClassifier(PIXELS, 5, hidden=(7, 6), batch_norm=batch_norm, rngs=nnx.Rngs(0))
    assert params(dense) == 768 * 7 + 7 + 42 + 6 + (2 * 13 if batch_norm else 0) + 6 * 5 + 5
    assert (narrow.kind, dense.kind) == (ModelKind.CONVOLUTION, ModelKind.MATMUL)
    dense.train()
    _, before = dense.loss(jnp.asarray(IMAGES), jnp.arange(6) % 5, jax.random.key(0))
    # With batch statistics the scale of the images is nothing to the network; without, it is.
    _, after = dense.loss(jnp.asarray(PIXELS.mean + 3.0 * (IMAGES - PIXELS.mean)), jnp.arange(6) % 5, jax.random.key(0))
    same = np.isclose(before["cross_entropy"], after["cross_entropy"], rtol=1e-4)
    assert same == batch_norm


def test_the_loss_is_the_cross_entropy_of_the_logits():
    model = MLPClassifier(PIXELS, 3, hidden=(5,), rngs=nnx.Rngs(0))
    model.eval()
    labels = np.arange(6) % 3
    loss, metrics = model.loss(jnp.asarray(IMAGES), jnp.asarray(labels), jax.random.key(0))
    logits = np.asarray(model.logits(IMAGES), np.float64)  # pyright: ignore[reportArgumentType]
    expected = np.log(np.exp(logits).sum(1)) - logits[np.arange(6), labels]
    assert float(loss) == pytest.approx(expected.mean(), rel=1e-5)
    assert float(metrics["accuracy"]) == pytest.approx((logits.argmax(1) == labels).mean())
    np.testing.assert_array_equal(predicted_classes(model, IMAGES, 4), logits.argmax(1))
    with pytest.raises(ma.InputError, match="this model takes"):
        model.logits(jnp.zeros((1, 8, 8, 3)))


@pytest.mark.parametrize("make,program", [(ConvClassifier, Program.ONE_BY_ONE), (MLPClassifier, Program.VMAPPED_SCAN)])
def test_they_learn_from_labels_as_members_of_a_training(make, program):
    labels = np.arange(64) % 2
    images = np.random.default_rng(2).normal(size=(64, 4, 4, 1)).astype(np.float32) + 2.0 * labels[:, None, None, None]
    pixels = Pixels.from_images(images)
    width = {"widths": (8,)} if make is ConvClassifier else {"hidden": (8,)}
    training = Training(
        lambda rngs: make(pixels, 2, **width, rngs=rngs),  # pyright: ignore[reportArgumentType]
        classify,
        adamw(OptimizerConfig(total_steps=40, learning_rate=0.02)),
        batch_size=32,
        num_members=2,
        mesh=train_mesh(devices=jax.devices()[:1]),
    )
    assert training.program is program
    state, _ = training.advance(training.init([0, 1]), training.put(images, labels), 40)
    for member in range(2):
        found = predicted_classes(training.model(state, member), images)
        assert (found == labels).mean() > 0.95


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ResNet9(Pixels.from_images(IMAGES[:, :8]), 3, rngs=nnx.Rngs(0)), "16 x 16"),
        (lambda: ResNet9(PIXELS, 3, widths=(2, 3), rngs=nnx.Rngs(0)), "5 numbers"),
        (lambda: ConvClassifier(PIXELS, 3, widths=(), rngs=nnx.Rngs(0)), "widths"),
        (lambda: MLPClassifier(PIXELS, 3, hidden=(0,), rngs=nnx.Rngs(0)), "hidden"),
        (lambda: MLPClassifier(PIXELS, 1, rngs=nnx.Rngs(0)), "at least two classes"),
        (lambda: predicted_classes(MLPClassifier(PIXELS, 2, hidden=(2,), rngs=nnx.Rngs(0)), IMAGES, 0), "batch_size"),
    ],
)
def test_bad_sizes_are_refused(make, message):
    with pytest.raises(ma.InputError, match=message):
        make()
