"""The PyTorch yardstick computes what the JAX models compute: losses, gradients and steps from the same parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from mae_align.corruption import FixedCountPatchMasking
from mae_align.models import Loss, MaskedAutoencoder, MLPAutoencoder, Pixels, gelu_exact
from mae_align.train.optimizer import OptimizerConfig, adamw

torch = pytest.importorskip("torch")
torch_models = pytest.importorskip("benchmarks.torch_models")

IMAGES = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
PIXELS = Pixels.from_images(IMAGES)


def _copy(model: nnx.Module, target: Any) -> None:
    """Parameters of a JAX model into the PyTorch one, found by the same names; noise makes zeros and ones tell."""
    rng = np.random.default_rng(1)
    state = nnx.state(model, nnx.Param)
    noisy = jax.tree.map(lambda leaf: leaf + 0.1 * rng.normal(size=leaf.shape).astype(np.float32), state)
    nnx.update(model, noisy)
    wanted = dict(target.named_parameters())
    for path, value in nnx.to_flat_state(noisy):
        name = _torch_name(path)
        array = np.array(value[...])
        wanted.pop(name).data.copy_(torch.from_numpy(array.T if path[-1] == "kernel" else array))
    assert not wanted


def _torch_name(path: tuple[Any, ...]) -> str:
    renamed = {"kernel": "weight", "scale": "weight", "attention": None}
    parts = [renamed.get(part, part) for part in path]
    return ".".join(str(part) for part in parts if part is not None)


def _masked(exact: bool, norm_pix: bool) -> tuple[MaskedAutoencoder, Any]:
    size: dict[str, Any] = dict(width=12, depth=2, heads=3, decoder_width=8, decoder_depth=1, decoder_heads=2)
    model = MaskedAutoencoder(
        PIXELS,
        corruption=FixedCountPatchMasking(2, num_visible=4),
        objective=Loss.standard if norm_pix else Loss.hidden,
        activation=gelu_exact if exact else jax.nn.gelu,
        rngs=nnx.Rngs(0),
        **size,
    )
    target = torch_models.MaskedAutoencoder(
        torch_models.Normalize(PIXELS.mean, float(PIXELS.scale)),
        torch_models.MaskedSizes((8, 8, 3), 2, model.corruption.num_visible, **size),
        norm_pix=norm_pix,
        approximate="none" if exact else "tanh",
        positions=np.asarray(model.positions[...]),
        decoder_positions=np.asarray(model.decoder_positions[...]),
    )
    _copy(model, target)
    return model, target


def _loss_of(model: Any, key: jax.Array) -> tuple[Any, Callable[[Any], jax.Array]]:
    graph, parameters, rest = nnx.split(model, nnx.Param, ...)
    return parameters, lambda p: nnx.merge(graph, p, rest).loss(jnp.asarray(IMAGES), key)[0]


def _assert_same_gradients(model: nnx.Module, target: Any, key: jax.Array) -> None:
    parameters, loss = _loss_of(model, key)
    gradients = jax.jit(jax.grad(loss))(parameters)
    found = dict(target.named_parameters())
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradients))
    for path, value in nnx.to_flat_state(gradients):
        ours = np.asarray(value[...])
        theirs = found[_torch_name(path)].grad.numpy()
        np.testing.assert_allclose(theirs.T if path[-1] == "kernel" else theirs, ours, atol=2e-5 * largest)


@pytest.mark.parametrize(("exact", "norm_pix"), [(False, True), (True, False)])
def test_masked_autoencoder(exact: bool, norm_pix: bool) -> None:
    model, target = _masked(exact, norm_pix)
    key = jax.random.key(3)
    noise = np.array(jax.random.uniform(key, (len(IMAGES), 16)))
    loss = target(torch.from_numpy(IMAGES), torch.from_numpy(noise))
    loss.backward()
    np.testing.assert_allclose(loss.item(), float(model.loss(jnp.asarray(IMAGES), key)[0]), rtol=1e-5)
    other = target(torch.from_numpy(IMAGES), torch.from_numpy(noise[::-1].copy())).item()
    assert abs(other / loss.item() - 1) > 1e-4  # the masks matter
    _assert_same_gradients(model, target, key)


def test_mlp_and_its_steps() -> None:
    """Loss, gradients, and three steps of AdamW with a clip that bites."""
    model = MLPAutoencoder(PIXELS, hidden=(9, 7), latent=4, rngs=nnx.Rngs(0))
    normalize = torch_models.Normalize(PIXELS.mean, float(PIXELS.scale))
    target = torch_models.MLP(normalize, (9, 7), 4, "tanh")
    _copy(model, target)
    key = jax.random.key(0)
    loss = target(torch.from_numpy(IMAGES))
    loss.backward()
    np.testing.assert_allclose(loss.item(), float(model.loss(jnp.asarray(IMAGES), key)[0]), rtol=1e-5)
    _assert_same_gradients(model, target, key)

    config = OptimizerConfig(total_steps=10**9, learning_rate=1e-2, clip_norm=0.05)
    settings = {name: value for name, value in vars(config).items() if not name.endswith("_steps")}
    torch_models.TorchRun(target, IMAGES, len(IMAGES), half=False, **settings)(3)
    optimizer = adamw(config)
    parameters, loss_of = _loss_of(model, key)
    state = optimizer.init(parameters)

    @jax.jit
    def step(parameters: Any, state: Any) -> tuple[Any, Any]:
        updates, state = optimizer.update(jax.grad(loss_of)(parameters), state, parameters)
        return optax.apply_updates(parameters, updates), state

    for _ in range(3):
        parameters, state = step(parameters, state)
    found = dict(target.named_parameters())
    for path, value in nnx.to_flat_state(parameters):
        theirs = found[_torch_name(path)].detach().numpy()
        np.testing.assert_allclose(theirs.T if path[-1] == "kernel" else theirs, value[...], atol=1e-5)
