"""A training as small as can be, with the interface of `Training`: a linear model, AdamW and noise.

What the training loop needs is real here: donated state, an ensemble, a mesh, random keys and an optimiser.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

SHAPE = (4, 4, 1)
_programs: dict[Any, Any] = {}


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["step", "params", "opt_state", "keys"], meta_fields=[]
)
@dataclass
class ToyState:
    step: jax.Array
    params: Any
    opt_state: Any
    keys: jax.Array


class ToyData(NamedTuple):
    images: jax.Array
    labels: jax.Array


def images_and_labels(n: int = 640) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (n, *SHAPE), dtype=np.uint8), rng.integers(0, 3, n)


class ToyTraining:
    """Each member predicts the label from noisy pixels by weights w and an intercept b."""

    def __init__(self, *, batch_size: int = 8, members: int = 2, mesh: Mesh | None = None, rate: float = 0.05) -> None:
        self.batch_size, self.num_members, self.steps_per_call = batch_size, members, 4
        self.mesh = mesh or Mesh(np.array(jax.devices()), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        self.whole, self.rows = NamedSharding(self.mesh, P()), NamedSharding(self.mesh, P(None, "data"))
        self.optimizer = optax.adamw(rate, eps=1e-6)
        self.dispatches: list[int] = []
        # Compiled once for all trainings that are alike.
        key = (batch_size, members, self.mesh, rate)
        if key not in _programs:
            _programs[key] = (
                jax.jit(self._many, static_argnums=3, donate_argnums=0),
                jax.jit(self._scan, donate_argnums=0),
                jax.jit(self._make, static_argnums=0, out_shardings=self.whole),
            )
        self._resident, self._streamed, self._initial = _programs[key]

    @property
    def batch_rows(self) -> slice:
        part = self.batch_size // jax.process_count()
        return slice(jax.process_index() * part, (jax.process_index() + 1) * part)

    def init(self, seeds: range) -> ToyState:
        return self._initial(seeds)

    def _make(self, seeds: range) -> ToyState:
        keys = jax.vmap(jax.random.key)(jnp.array(list(seeds), jnp.uint32))
        params = {"w": jax.vmap(lambda k: jax.random.normal(k, (16,)) / 4)(keys), "b": jnp.zeros(len(seeds))}
        return ToyState(jnp.int32(0), params, self.optimizer.init(params), keys)

    def put(self, images: np.ndarray, labels: np.ndarray) -> ToyData:
        return jax.device_put(ToyData(jnp.asarray(images), jnp.asarray(labels, jnp.int32)), self.whole)

    def advance(self, state: ToyState, data: ToyData, num_steps: int) -> tuple[ToyState, dict[str, jax.Array]]:
        self.dispatches.append(num_steps)
        return self._resident(state, *data, num_steps)

    def advance_batches(
        self, state: ToyState, images: np.ndarray, labels: np.ndarray
    ) -> tuple[ToyState, dict[str, jax.Array]]:
        self.dispatches.append(len(images))
        put = functools.partial(jax.make_array_from_process_local_data, self.rows)
        return self._streamed(state, put(images), put(labels))

    def _many(self, state: ToyState, images: jax.Array, labels: jax.Array, num_steps: int) -> Any:
        def batch(s: jax.Array) -> tuple[jax.Array, jax.Array]:
            rows = 7 * (s * self.batch_size + jnp.arange(self.batch_size)) % len(labels)
            return images[rows], labels[rows]

        x, y = jax.vmap(batch)(state.step + jnp.arange(num_steps))
        sharded = NamedSharding(self.mesh, P(None, "data"))
        return self._scan(state, jax.lax.with_sharding_constraint(x, sharded), y)

    def _scan(self, state: ToyState, images: jax.Array, labels: jax.Array) -> Any:
        return jax.lax.scan(self._step, state, (images, labels))

    def _step(self, state: ToyState, batch: tuple[jax.Array, jax.Array]) -> tuple[ToyState, dict[str, jax.Array]]:
        x, y = batch[0].reshape(len(batch[0]), -1).astype(jnp.float32) / 255, batch[1].astype(jnp.float32)

        def loss(params: Any, key: jax.Array) -> jax.Array:
            noisy = x + 0.1 * jax.random.normal(jax.random.fold_in(key, state.step), x.shape)
            return jnp.mean((noisy @ params["w"] + params["b"] - y) ** 2)

        losses, gradient = jax.vmap(jax.value_and_grad(loss))(state.params, state.keys)
        updates, opt_state = self.optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return ToyState(state.step + 1, params, opt_state, state.keys), {"loss": losses, "twice": 2 * losses}
