"""Training of an ensemble of networks over a mesh: one jitted, donated step, data-parallel and side by side.

Members of one :class:`Training` share architecture, optimiser and batch size and differ in seed, learning rate and
guidance (:class:`Member`). What changes array shapes (mask ratio and patch size of a vision transformer) is another
Training. Everything random follows from the seed of a member and the step: the same seed gives the same run bit for bit
on one machine, and members of the same seed see the same batches, masks and initial parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from mae_align.data.patches import ImageShape
from mae_align.runtime.devices import is_cpu
from mae_align.runtime.errors import InputError
from mae_align.runtime.processes import place, train_mesh
from mae_align.train.batches import Batches, DeviceData, check_examples, check_fits
from mae_align.train.step import (
    Member,
    Metrics,
    Objective,
    Orders,
    Program,
    Recipe,
    TrainState,
    choose_program,
    classify,
    compile_features,
    compile_run,
    guide,
    in_eval_mode,
    permutations,
    pick,
    reconstruct,
    weights_key,
)

__all__ = [
    "Batches",
    "DeviceData",
    "Member",
    "Metrics",
    "Objective",
    "TrainState",
    "Training",
    "classify",
    "guide",
    "reconstruct",
]
_STEPS_PER_CALL = 64


class Training:
    """The programs that train E networks; built once, each compiled at its first call.

    Args:
        make_model: the network of given random numbers, as ``lambda rngs: MLPAutoencoder(pixels, rngs=rngs)``; it draws
            nothing from them later on.
        objective: :func:`reconstruct`, :func:`guide`, :func:`classify`, or any function like them.
        optimizer: of one network, as :func:`mae_align.train.optimizer.adamw`.
        batch_size: B, images of a step over all devices.
        num_members: E.
        mesh: of :func:`mae_align.runtime.processes.train_mesh`; default: all devices as the data axis. Members are
            split over "ensemble", the images of a batch over "data", on which parameters are copied.
        steps_per_call: most steps of one dispatch; default 64. The result does not depend on it.
        program: default: the faster one, :func:`mae_align.train.step.choose_program`.
        compiler_options: of XLA for the programs of steps and features, as `jax.jit` takes them.

    Raises:
        InputError: sizes that the mesh does not divide, or a model that keeps random numbers of its own.

    Example:
        >>> from mae_align.models import MLPAutoencoder, Pixels
        >>> from mae_align.train.optimizer import OptimizerConfig, adamw
        >>> images = np.random.default_rng(0).integers(0, 256, (40, 4, 4, 1), dtype=np.uint8)
        >>> pixels = Pixels.from_images(images)
        >>> training = Training(
        ...     lambda rngs: MLPAutoencoder(pixels, hidden=(), latent=3, rngs=rngs),
        ...     reconstruct,
        ...     adamw(OptimizerConfig(total_steps=30, learning_rate=0.03)),
        ...     batch_size=8,
        ...     num_members=2,
        ...     mesh=train_mesh(devices=jax.devices()[:1]),
        ... )
        >>> state = training.init([0, 1])
        >>> state, metrics = training.advance(state, training.put(images), 30)
        >>> loss = np.asarray(metrics["loss"])
        >>> loss.shape, bool((loss[-1] < loss[0]).all())
        ((30, 2), True)
        >>> training.features(state, images, 16).shape
        (2, 40, 3)
    """

    def __init__(
        self,
        make_model: Callable[[nnx.Rngs], nnx.Module],
        objective: Objective,
        optimizer: optax.GradientTransformation,
        *,
        batch_size: int,
        num_members: int,
        mesh: Mesh | None = None,
        steps_per_call: int | None = None,
        program: Program | None = None,
        compiler_options: Mapping[str, Any] | None = None,
    ) -> None:
        mesh = train_mesh() if mesh is None else mesh
        if tuple(mesh.axis_names) != ("ensemble", "data"):
            raise InputError(
                f"the mesh has axes {mesh.axis_names}: make it with mae_align.runtime.processes.train_mesh"
            )
        steps = _STEPS_PER_CALL if steps_per_call is None else steps_per_call
        for name, value in (("batch_size", batch_size), ("num_members", num_members), ("steps_per_call", steps)):
            if value < 1:
                raise InputError(f"{name}={value}: give at least 1")
        for name, value, axis in (("batch_size", batch_size, "data"), ("num_members", num_members, "ensemble")):
            if value % mesh.shape[axis]:
                raise InputError(
                    f"{name}={value} is not divisible by the {mesh.shape[axis]} devices of the mesh's {axis!r} axis: "
                    "choose a multiple of them, or a smaller mesh"
                )
        model: Any = nnx.eval_shape(lambda: make_model(nnx.Rngs(0)))
        if jax.tree.leaves(nnx.state(model, nnx.RngState)):
            raise InputError("the model keeps random numbers of its own: let it draw from the key of its loss instead")
        if program is None:
            program = choose_program(model.kind, mesh.devices.flat[0].platform)
        if program is Program.ONE_BY_ONE and mesh.shape["ensemble"] > 1:
            raise InputError(
                "convolutions on a CPU are trained one member after the other: make the mesh with ensemble=1"
            )
        self.mesh, self.program = mesh, program
        self._local_devices = [d for d in mesh.devices.flat if d.process_index == jax.process_index()]
        self.batch_size, self.num_members, self.steps_per_call = batch_size, num_members, steps
        self.image_shape: ImageShape = tuple(model.image_shape)
        graphdef, params, rest = nnx.split(model, nnx.Param, ...)
        self.recipe = Recipe(graphdef, objective, optimizer, batch_size, mesh, compiler_options or {})
        self._make_model, self._num_classes = make_model, None
        if hasattr(model, "logits"):
            image = jax.ShapeDtypeStruct((1, *self.image_shape), jnp.float32)
            logits = jax.eval_shape(lambda p, r, x: in_eval_mode(graphdef, p, r).logits(x), params, rest, image)
            self._num_classes = int(logits.shape[1])
        members = np.zeros(num_members, np.uint32), np.ones((2, num_members), np.float32)
        shapes = jax.eval_shape(self._initial, *members)
        layout = jax.tree.map(lambda x: self.recipe.sharding(*(["ensemble"] if x.ndim else [])), shapes)
        self.abstract_state: TrainState = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, layout
        )
        # It runs once, and XLA takes seconds to optimise random numbers for a CPU.
        quick = {"xla_backend_optimization_level": 0} if is_cpu(mesh.devices.flat[0]) else None
        self._init = jax.jit(self._initial, out_shardings=layout, compiler_options=quick)
        self._run = compile_run(program, self.recipe, layout, steps)
        self._blank = jax.jit(Orders.blank, static_argnums=1, out_shardings=self.recipe.sharding("ensemble"))
        self._order = jax.jit(permutations, static_argnums=2, out_shardings=self.recipe.sharding("ensemble"))
        self._joined = jax.jit(_joined, static_argnums=1, out_shardings=self.recipe.sharding())
        self._pick = jax.jit(pick, out_shardings=self.recipe.sharding())
        self._encode = compile_features(program, self.recipe)
        # Where each number of images stands in its order: a memo of what follows from state and step.
        self._orders: dict[int, Orders] = {}

    def _initial(self, seeds: jax.Array, scalars: jax.Array) -> TrainState:
        keys = jax.vmap(jax.random.key)(seeds)

        def one(key: jax.Array) -> tuple[nnx.State, nnx.State, optax.OptState]:
            _, params, rest = nnx.split(self._make_model(nnx.Rngs(weights_key(key))), nnx.Param, ...)
            return params, rest, self.recipe.optimizer.init(params)

        member = Member(scalars[0], scalars[1])
        return TrainState(jnp.zeros((), jnp.int32), *jax.vmap(one)(keys), keys, member)

    def init(
        self,
        seeds: Sequence[int],
        *,
        learning_rates: Sequence[float] | None = None,
        guidance: Sequence[float] | None = None,
    ) -> TrainState:
        """The state before the first step.

        Args:
            seeds: E of them, in 0..2^32 - 1; they may be equal.
            learning_rates: E factors on the optimiser's learning rate, default 1.
            guidance: E weights of the labels for :func:`guide`, default 0.

        Returns:
            The state, its member axis split over "ensemble".

        Raises:
            InputError: not E of each, or values out of range.
        """
        if len(seeds) != self.num_members or not all(0 <= seed < 2**32 for seed in seeds):
            raise InputError(
                f"seeds={list(seeds)}: give {self.num_members} whole numbers, one for each member, below 2^32"
            )
        scalars = np.ones((2, self.num_members), np.float32)
        scalars[1] = 0.0
        for row, name, values in ((0, "learning_rates", learning_rates), (1, "guidance", guidance)):
            if values is not None:
                array = np.asarray(values, np.float32)
                if array.shape != (self.num_members,) or not (np.isfinite(array) & (array >= 0)).all():
                    raise InputError(f"{name}={values}: give {self.num_members} numbers of at least 0, one a member")
                scalars[row] = array
        return self._init(self.recipe.on_all(np.asarray(seeds, np.uint32)), self.recipe.on_all(scalars))

    def put(self, images: np.ndarray, labels: np.ndarray | None = None) -> DeviceData:
        """A data set on every device, bytes as bytes.

        Args:
            images: [n, h, w, c] uint8 or floating, the same in every process.
            labels: [n] integer classes, or numbers [n, q]; None where the objective needs none.

        Returns:
            The data on the mesh, n h w c bytes (times 4 for floats) on every device.

        Raises:
            InputError: images of another shape than the model's, fewer than a batch, NaN, labels that do not fit, or
                more than a device's free memory.
        """
        images, labels = check_examples(images, labels, self.image_shape, self._num_classes)
        if len(images) < self.batch_size:
            raise InputError(
                f"{len(images)} images are fewer than a batch of {self.batch_size}: make batch_size smaller"
            )
        check_fits([images, labels], self._local_devices)
        return DeviceData(self.recipe.on_all(images), None if labels is None else self.recipe.on_all(labels))

    def order(self, state: TrainState, epoch: int, n: int) -> jax.Array:
        """The order in which each member goes through n images in one epoch.

        Batch b of the epoch is entries b B..(b + 1) B - 1; what does not fill a batch is left out.

        Args:
            state: only its keys matter.
            epoch: from 0.
            n: number of images.

        Returns:
            [E, n] int32 on the devices; each row a permutation that depends on its member's seed and the epoch alone.
        """
        return self._order(state.keys, self.recipe.on_all(np.int32(epoch)), n)

    def advance(self, state: TrainState, data: DeviceData, num_steps: int) -> tuple[TrainState, Metrics]:
        """Steps on batches of a data set on the devices; the old state is given away.

        The batch of step s follows from (seed, s): pass s // (n // B) over the images, in the order of that pass.

        Args:
            state: deleted by this call.
            data: of :meth:`put`.
            num_steps: at least 1.

        Returns:
            The new state, and metrics [num_steps, E] on the devices: "loss", "gradient_norm" (before clipping) and the
            objective's own, float32. Nothing is transferred and nothing waited for.

        Raises:
            InputError: no step, or a state of another ensemble.
        """
        n = len(data.images)
        self._check_state(state, num_steps)
        found = []
        for count in _parts(num_steps, self.steps_per_call):
            orders = self._orders.pop(n, None)
            if orders is None:
                orders = self._blank(state.keys, n)
            state, orders, metrics = self._run.advance(state, orders, data, count)
            assert orders is not None
            self._orders[n] = orders
            found.append(metrics)
        return state, self._whole(found, num_steps)

    def lower(self, state: TrainState, data: DeviceData) -> jax.stages.Lowered:
        """The program that :meth:`advance` dispatches, lowered; nothing runs.

        `.compile()` of it tells its cost, memory and collectives: of one step of all members, or of one of them where
        they train one by one. Operations of a loop are counted once.

        Args:
            state, data: as for :meth:`advance`; both stay.
        """
        return self._run.lower(state, self._blank(state.keys, len(data.images)), data)

    def _check_state(self, state: TrainState, num_steps: int) -> None:
        if num_steps < 1:
            raise InputError(f"{num_steps} steps: give at least 1")
        if state.num_members != self.num_members:
            raise InputError(f"this state has {state.num_members} members, this training {self.num_members}")

    def _whole(self, found: list[Metrics], num_steps: int) -> Metrics:
        if len(found) == 1 and num_steps == self.steps_per_call:
            return found[0]
        return self._joined(found, num_steps)

    def advance_batches(
        self, state: TrainState, images: np.ndarray, labels: np.ndarray | None = None
    ) -> tuple[TrainState, Metrics]:
        """One step on each batch of a stream, the same for every member; the old state is given away.

        Args:
            state: deleted by this call.
            images: [S, b, h, w, c], the rows of each batch that are this process's part (:attr:`batch_rows`; all B of
                them in a run of one process).
            labels: [S, b], [S, b, q] or None.

        Returns:
            The new state, and metrics [S, E] as from :meth:`advance`. A number of batches S that was not seen before
            compiles anew.

        Raises:
            InputError: as :meth:`put` and :meth:`advance`.
        """
        images = np.asarray(images)
        rows = self.batch_rows.stop - self.batch_rows.start
        self._check_state(state, len(images))
        if images.ndim != 5 or images.shape[1] != rows:
            raise InputError(f"batches have shape {list(images.shape)}: give [S, {rows}, h, w, c] in this process")
        if labels is not None and np.shape(labels)[:2] != images.shape[:2]:
            raise InputError(
                f"batches of shape {list(images.shape)} but labels {list(np.shape(labels))}: one per image"
            )
        flat = None if labels is None else np.asarray(labels).reshape(-1, *np.shape(labels)[2:])
        data, classes = check_examples(images.reshape(-1, *images.shape[2:]), flat, self.image_shape, self._num_classes)
        found, start = [], 0
        for count in _parts(len(images), self.steps_per_call):
            part = slice(start * rows, (start + count) * rows)
            start += count
            classes_part = None if classes is None else self._split(classes[part], count)
            batches = Batches(self._split(data[part], count), classes_part)
            state, _, metrics = self._run.advance(state, None, batches, count)
            found.append(metrics)
        return state, self._whole(found, len(images))

    @property
    def batch_rows(self) -> slice:
        """The rows of each batch of a stream that this process gives to :meth:`advance_batches`."""
        spans = self.recipe.sharding("data").addressable_devices_indices_map((self.batch_size,)).values()
        ranges = [span[0].indices(self.batch_size) for span in spans if span is not None]
        return slice(min(start for start, _, _ in ranges), max(stop for _, stop, _ in ranges))

    def _split(self, array: np.ndarray, count: int) -> jax.Array:
        """This process's rows of `count` batches on the devices, split over "data"."""
        local, first = array.reshape(count, -1, *array.shape[1:]), self.batch_rows.start

        def read(index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[1].indices(self.batch_size)
            return local[:, start - first : stop - first]

        return place((count, self.batch_size, *array.shape[1:]), self.recipe.sharding(None, "data"), read)

    def model(self, state: TrainState, member: int) -> Any:
        """A copy of the network of one member in 0..E - 1, in eval mode on the default device."""
        if not 0 <= member < self.num_members:
            raise InputError(f"member {member}: there are members 0 to {self.num_members - 1}")
        parts = self._pick((state.params, state.rest), self.recipe.on_all(np.int32(member)))
        # By way of the host: on one device whatever the mesh.
        return in_eval_mode(self.recipe.graphdef, *jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), parts))

    def features(self, state: TrainState, images: np.ndarray, batch_size: int) -> np.ndarray:
        """Features of every member, in eval mode, of images as given.

        Args:
            state: of this training.
            images: [n, h, w, c], the same in every process.
            batch_size: images at a time, rounded up to a multiple of the "data" axis.

        Returns:
            [E, n, k] float32 on the host, bit for bit the same for any n (the last batch is filled up and cut).

        Raises:
            InputError: images of another shape, or NaN.
        """
        images, _ = check_examples(images, None, self.image_shape, None)
        if batch_size < 1:
            raise InputError(f"batch_size={batch_size}: give at least 1")
        size = math.ceil(batch_size / self.mesh.shape["data"]) * self.mesh.shape["data"]
        found: list[np.ndarray] = []
        for start in range(0, len(images), size):
            part = images[start : start + size]
            rows = np.concatenate([part, np.repeat(part[:1], size - len(part), axis=0)])
            batch = place(rows.shape, self.recipe.sharding("data"), rows.__getitem__)
            found.append(self._encode(state, batch)[:, : len(part)])
        return np.concatenate(found, axis=1)


def _parts(total: int, most: int) -> Iterator[int]:
    """Sizes of the calls that make up `total` steps."""
    for start in range(0, total, most):
        yield min(most, total - start)


def _joined(found: list[Metrics], num_steps: int) -> Metrics:
    return {name: jnp.concatenate([metrics[name] for metrics in found])[:num_steps] for name in found[0]}
