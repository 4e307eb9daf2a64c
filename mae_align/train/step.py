"""What a training step takes and gives: the state of an ensemble, its random numbers, and objectives."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mae_align.models import ModelKind
from mae_align.runtime.devices import is_cpu
from mae_align.runtime.processes import place
from mae_align.train.batches import Source

Metrics = dict[str, jax.Array]
# Streams of random numbers of a member, folded into its key before anything else: they never meet.
_WEIGHTS, _STEPS, _ORDERS = 0, 1, 2


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Member:
    """What the networks of an ensemble may differ in beside their seed.

    Attributes:
        learning_rate: [E] float32, factor on the optimiser's learning rate.
        guidance: [E] float32, weight of the labels. Inside a step both are the scalars of one member.
    """

    learning_rate: jax.Array
    guidance: jax.Array


# (model, images [b, h, w, c] float32 in stored units, labels, key of the step, the member's scalars) -> the loss, a
# float32 scalar, and metrics by name. Labels are [b] int32, [b, q] float32 or None.
Objective = Callable[[Any, jax.Array, Any, jax.Array, Member], tuple[jax.Array, Metrics]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class TrainState:
    """Everything that a run goes on from, for E networks; a pytree.

    Attributes:
        step: int32 scalar, steps made by every member.
        params: trained parameters; every array has a leading axis E.
        rest: the other variables (batch statistics, constants), leading axis E.
        opt_state: state of the optimiser, leading axis E.
        keys: [E] typed PRNG keys, constant over the run.
        member: see :class:`Member`.
    """

    step: jax.Array
    params: nnx.State
    rest: nnx.State
    opt_state: optax.OptState
    keys: jax.Array
    member: Member

    @property
    def num_members(self) -> int:
        """E."""
        return self.keys.shape[0]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Orders:
    """The order of the images that each member is going through: a memo, remade where another one is asked for.

    Attributes:
        rows: [E, n] int32.
        epoch: [E] int32, -1 where there is none yet.
        keys: [E, ...] uint32, key data of whom it is.
    """

    rows: jax.Array
    epoch: jax.Array
    keys: jax.Array

    @classmethod
    def blank(cls, keys: jax.Array, n: int) -> Orders:
        """No permutation yet, of n images for each of the keys [E]."""
        members = keys.shape[0]
        data = jnp.zeros_like(jax.random.key_data(keys))
        return cls(jnp.zeros((members, n), jnp.int32), jnp.full(members, -1, jnp.int32), data)

    def at(self, keys: jax.Array, epoch: jax.Array) -> Orders:
        """The permutations of the members with keys [E] in this epoch; costs a sort only where they are not at hand."""
        data = jax.random.key_data(keys)
        known = (self.epoch == epoch).all() & (self.keys == data).all()
        rows = jax.lax.cond(known, lambda: self.rows, lambda: permutations(keys, epoch, self.rows.shape[1]))
        return Orders(rows, jnp.full_like(self.epoch, 0) + epoch, data)


def weights_key(key: jax.Array) -> jax.Array:
    """The key of a member's initial parameters."""
    return jax.random.fold_in(key, _WEIGHTS)


def step_key(key: jax.Array, step: jax.Array) -> jax.Array:
    """The key of everything random in one step of a member: masks and noise."""
    return jax.random.fold_in(jax.random.fold_in(key, _STEPS), step)


def permutations(keys: jax.Array, epoch: jax.Array, n: int) -> jax.Array:
    """[E, n] int32: the order in which the member of each key [E] goes through n images in one epoch."""

    def one(key: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.fold_in(key, _ORDERS), epoch)
        return jax.random.permutation(key, jnp.arange(n, dtype=jnp.int32))

    return jax.vmap(one)(keys)


def reconstruct(
    model: Any, images: jax.Array, labels: Any, key: jax.Array, member: Member
) -> tuple[jax.Array, Metrics]:
    """The autoencoder's own loss ``model.loss(images, key)``; labels are not used. See :data:`Objective`."""
    del labels, member
    return model.loss(images, key)


def guide(model: Any, images: jax.Array, labels: Any, key: jax.Array, member: Member) -> tuple[jax.Array, Metrics]:
    """Reconstruction and the cross-entropy of the labels, weighted by the member's guidance. See :data:`Objective`."""
    return model.loss(images, labels, key, member.guidance)


def classify(model: Any, images: jax.Array, labels: Any, key: jax.Array, member: Member) -> tuple[jax.Array, Metrics]:
    """The classifier's own loss ``model.loss(images, labels, key)``. See :data:`Objective`."""
    del member
    return model.loss(images, labels, key)


T = TypeVar("T")


class Program(enum.Enum):
    """How the steps of an ensemble are laid out in compiled programs."""

    VMAPPED_SCAN = enum.auto()
    ONE_BY_ONE = enum.auto()


def choose_program(kind: ModelKind, platform: str) -> Program:
    """The program for a kind of model on a backend: the faster one for ensembles.

    Args:
        kind: what a step of the model is made of.
        platform: of the devices, as `jax.Device.platform`.

    Returns:
        ONE_BY_ONE for convolutions on a CPU, VMAPPED_SCAN otherwise; the module says why.

    Example:
        >>> choose_program(ModelKind.MATMUL, "cpu").name, choose_program(ModelKind.CONVOLUTION, "cpu").name
        ('VMAPPED_SCAN', 'ONE_BY_ONE')
    """
    return Program.ONE_BY_ONE if (kind, platform) == (ModelKind.CONVOLUTION, "cpu") else Program.VMAPPED_SCAN


# What a step changes of one member: parameters, other variables, optimiser state; and what it does not.
Moving = tuple[nnx.State, nnx.State, optax.OptState]
_Fixed = tuple[jax.Array, Member]
Made = tuple[TrainState, Orders | None, Metrics]


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """What makes steps.

    Attributes:
        advance: (state, orders, source, num_steps) -> (state, orders, metrics [steps_per_call, E]); state and orders
            are donated, rows of the metrics from the number of steps on are 0, `orders` is None for a stream.
        lower: (state, orders, source) -> the program that is dispatched, lowered: its cost, memory and collectives.
    """

    advance: Callable[[TrainState, Orders | None, Source, int], Made]
    lower: Callable[[TrainState, Orders | None, Source], jax.stages.Lowered]


@dataclasses.dataclass(frozen=True, eq=False)
class Recipe:
    """What a training step is made of.

    Attributes:
        graphdef: of the model.
        objective: see :data:`mae_align.train.step.Objective`.
        optimizer: of one member.
        batch_size: B.
        mesh: with axes "ensemble" and "data".
        compiler_options: of XLA, as `jax.jit` takes them.
    """

    graphdef: Any
    objective: Objective
    optimizer: optax.GradientTransformation
    batch_size: int
    mesh: Mesh
    compiler_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def sharding(self, *axes: str | None) -> NamedSharding:
        """A sharding over the mesh, named axis by axis."""
        return NamedSharding(self.mesh, PartitionSpec(*axes))

    def on_all(self, value: np.ndarray | np.generic) -> jax.Array:
        """A host array on every device of the mesh; an explicit transfer, without a collective."""
        value = np.asarray(value)
        return place(value.shape, self.sharding(), lambda part: value[part])

    def jit(self, function: Callable[..., Any], out_shardings: Any, donate_argnums: tuple[int, ...] = ()) -> Any:
        """`jax.jit` with the options of this recipe."""
        options = dict(self.compiler_options)
        return jax.jit(function, out_shardings=out_shardings, donate_argnums=donate_argnums, compiler_options=options)

    def settled(self, out: T) -> T:
        """What was computed; waits for it on several devices of a CPU.

        There programs with collectives share one pool of threads, and with a hundred of them queued they can wait for
        each other for ever. Nothing is lost: every core is busy anyway.
        """
        if is_cpu(self.mesh.devices.flat[0]) and self.mesh.devices.size > 1:
            jax.block_until_ready(out)
        return out

    def step(
        self,
        moving: Moving,
        key: jax.Array,
        member: Member,
        rows: jax.Array | None,
        source: Source,
        step: jax.Array,
        index: jax.Array,
    ) -> tuple[Moving, Metrics]:
        """One step of one member: what moved; loss, norm of the gradient before clipping, the objective's metrics."""
        params, rest, opt_state = moving
        batch = source.batch(rows, step, index, self.batch_size)
        images, labels = jax.lax.with_sharding_constraint(batch, self.sharding("data"))
        images = images.astype(jnp.float32)

        def loss_of(params: nnx.State) -> tuple[jax.Array, tuple[Metrics, nnx.State]]:
            # A copy: batch statistics are written into the model, not into what is being differentiated.
            model = nnx.merge(self.graphdef, params, rest, copy=True)
            model.train()
            loss, metrics = self.objective(model, images, labels, step_key(key, step), member)
            _, _, rest_after = nnx.split(model, nnx.Param, ...)
            return loss, (metrics, rest_after)

        (loss, (metrics, rest)), gradient = jax.value_and_grad(loss_of, has_aux=True)(params)
        updates, opt_state = self.optimizer.update(gradient, opt_state, params)
        params = jax.tree.map(lambda p, update: p + member.learning_rate * update, params, updates)
        found = {"loss": loss, "gradient_norm": optax.tree.norm(gradient), **metrics}
        found = {name: jnp.asarray(value, jnp.float32) for name, value in found.items()}
        return (params, rest, opt_state), found

    def all_members(
        self, state: TrainState, rows: jax.Array | None, source: Source, index: jax.Array
    ) -> tuple[TrainState, Metrics]:
        """One step of every member, metrics [E]."""

        def one(moving: Moving, key: jax.Array, member: Member, rows: jax.Array | None) -> tuple[Moving, Metrics]:
            return self.step(moving, key, member, rows, source, state.step, index)

        step = jax.vmap(one, spmd_axis_name="ensemble")
        moving, found = step((state.params, state.rest, state.opt_state), state.keys, state.member, rows)
        return _moved(state, moving, state.step + 1), found

    def blank_metrics(self, state: TrainState, orders: Orders | None, source: Source, steps: int) -> Metrics:
        """Zeros [steps, E] for each metric."""
        rows = None if orders is None else orders.rows
        _, found = jax.eval_shape(self.all_members, state, rows, source, jnp.zeros((), jnp.int32))
        return {name: jnp.zeros((steps, state.num_members), jnp.float32) for name in found}

    def epoch(self, step: jax.Array, orders: Orders) -> jax.Array:
        """The pass over the images that a step belongs to; what does not fill a batch is left out."""
        return step // (orders.rows.shape[1] // self.batch_size)


def compile_run(program: Program, recipe: Recipe, state_shardings: Any, steps_per_call: int) -> Run:
    """What makes up to `steps_per_call` steps at a time, of a :class:`TrainState` with these shardings."""
    orders = recipe.sharding("ensemble")
    layout = (state_shardings, orders, recipe.sharding())
    if program is Program.ONE_BY_ONE:
        return _one_by_one(recipe, layout, steps_per_call)
    return _vmapped_scan(recipe, layout, steps_per_call)


def _vmapped_scan(recipe: Recipe, layout: tuple[Any, Any, Any], steps_per_call: int) -> Run:
    def train_steps(state: TrainState, orders: Orders | None, source: Source, num_steps: jax.Array) -> Made:
        def body(index: jax.Array, carry: Made) -> Made:
            state, orders, metrics = carry
            rows = None
            if orders is not None:
                orders = orders.at(state.keys, recipe.epoch(state.step, orders))
                rows = orders.rows
            state, found = recipe.all_members(state, rows, source, index)
            return state, orders, {name: metrics[name].at[index].set(found[name]) for name in metrics}

        blank = recipe.blank_metrics(state, orders, source, steps_per_call)
        return jax.lax.fori_loop(0, num_steps, body, (state, orders, blank))

    compiled = recipe.jit(train_steps, layout, donate_argnums=(0, 1))

    def run(state: TrainState, orders: Orders | None, source: Source, num_steps: int) -> Made:
        return recipe.settled(compiled(state, orders, source, recipe.on_all(np.int32(num_steps))))

    def lower(state: TrainState, orders: Orders | None, source: Source) -> jax.stages.Lowered:
        return compiled.lower(state, orders, source, recipe.on_all(np.int32(1)))

    return Run(run, lower)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class _Own:
    """One member within a call: what moves, its order of the images [1, n], metrics [steps], where it stands."""

    moving: Moving
    orders: Orders | None
    metrics: Metrics
    step: jax.Array
    index: jax.Array


def _one_by_one(recipe: Recipe, layout: tuple[Any, Any, Any], steps_per_call: int) -> Run:
    # Members are taken out of their stacks for a call and put back after it: two copies of the state a call, and room
    # for a second one. A step on the stacks is less to write, but XLA copies whole stacks in it.
    def split(state: TrainState, orders: Orders | None, source: Source) -> tuple[list[_Own], list[_Fixed]]:
        metrics = recipe.blank_metrics(state, orders, source, steps_per_call)
        zero = jnp.zeros((), jnp.int32)
        stack = (state.params, state.rest, state.opt_state)
        owns, fixed = [], []
        for i in range(state.num_members):
            order = jax.tree.map(lambda x, i=i: x[i : i + 1], orders)
            columns = {name: column[:, i] for name, column in metrics.items()}
            owns.append(_Own(jax.tree.map(lambda x, i=i: x[i], stack), order, columns, state.step, zero))
            fixed.append(jax.tree.map(lambda x, i=i: x[i], (state.keys, state.member)))
        return owns, fixed

    def train_step(own: _Own, fixed: _Fixed, source: Source) -> _Own:
        key, member = fixed
        orders = own.orders
        if orders is not None:
            orders = orders.at(key[None], recipe.epoch(own.step, orders))
        rows = None if orders is None else orders.rows[0]
        moving, found = recipe.step(own.moving, key, member, rows, source, own.step, own.index)
        metrics = {name: own.metrics[name].at[own.index].set(found[name]) for name in own.metrics}
        return _Own(moving, orders, metrics, own.step + 1, own.index + 1)

    def join(owns: list[_Own], keys: jax.Array, member: Member) -> Made:
        params, rest, opt_state = jax.tree.map(lambda *x: jnp.stack(x), *(own.moving for own in owns))
        orders = jax.tree.map(lambda *x: jnp.concatenate(x), *(own.orders for own in owns))
        metrics = {name: jnp.stack([own.metrics[name] for own in owns], axis=1) for name in owns[0].metrics}
        return TrainState(owns[0].step, params, rest, opt_state, keys, member), orders, metrics

    take = jax.jit(split, out_shardings=recipe.sharding())
    compiled = recipe.jit(train_step, recipe.sharding(), donate_argnums=(0,))
    whole = jax.jit(join, out_shardings=layout, donate_argnums=(1, 2))

    def run(state: TrainState, orders: Orders | None, source: Source, num_steps: int) -> Made:
        owns, fixed = take(state, orders, source)
        # Given away, though no result of `take` has the shape that XLA could reuse.
        for leaf in jax.tree.leaves((state.step, state.params, state.rest, state.opt_state, orders)):
            leaf.delete()
        for i, of_member in enumerate(fixed):
            for _ in range(num_steps):
                owns[i] = recipe.settled(compiled(owns[i], of_member, source))
        return whole(owns, state.keys, state.member)

    def lower(state: TrainState, orders: Orders | None, source: Source) -> jax.stages.Lowered:
        owns, fixed = take.eval_shape(state, orders, source)
        return compiled.lower(owns[0], fixed[0], source)

    return Run(run, lower)


def compile_features(program: Program, recipe: Recipe) -> Callable[[TrainState, jax.Array], np.ndarray]:
    """A function (state, images [b, h, w, c] split over "data") -> features [E, b, k] float32 on the host."""

    def encode(params: nnx.State, rest: nnx.State, images: jax.Array) -> jax.Array:
        model = in_eval_mode(recipe.graphdef, params, rest)
        return model.features(images.astype(jnp.float32)).astype(jnp.float32)

    return _of_every_member(program, recipe, encode)


def compile_statistics(program: Program, recipe: Recipe) -> Callable[[TrainState, jax.Array], nnx.State]:
    """The function that takes the batch statistics of a batch as given with every member.

    Args:
        program, recipe: as for :func:`compile_features`.

    Returns:
        A function (state, images [b, h, w, c] split over "data") -> what the pass to the features leaves in a model
        whose running statistics forget all batches but the last, [E, ...] each, on the host.
    """

    def statistics(params: nnx.State, rest: nnx.State, images: jax.Array) -> nnx.State:
        model = nnx.merge(recipe.graphdef, params, rest, copy=True)
        model.train()
        model.set_attributes(nnx.BatchNorm, momentum=0.0)
        model.features(images.astype(jnp.float32))
        return nnx.state(model, nnx.BatchStat)

    return _of_every_member(program, recipe, statistics)


def _of_every_member(
    program: Program, recipe: Recipe, function: Callable[[nnx.State, nnx.State, jax.Array], Any]
) -> Callable[[TrainState, jax.Array], Any]:
    """A function of parameters, other variables and images, of all members: its results [E, ...] on the host."""

    def of_all(state: TrainState, images: jax.Array) -> Any:
        return jax.vmap(function, (0, 0, None), spmd_axis_name="ensemble")(state.params, state.rest, images)

    def of_one(state: TrainState, images: jax.Array, member: jax.Array) -> Any:
        params, rest = pick((state.params, state.rest), member)
        return function(params, rest, images)

    if program is Program.VMAPPED_SCAN:
        every = recipe.jit(of_all, recipe.sharding())
        return lambda state, images: jax.tree.map(np.asarray, every(state, images))
    one = recipe.jit(of_one, recipe.sharding())

    def one_by_one(state: TrainState, images: jax.Array) -> Any:
        turns = (recipe.on_all(np.int32(member)) for member in range(state.num_members))
        return jax.tree.map(lambda *x: np.stack(x), *(jax.tree.map(np.asarray, one(state, images, t)) for t in turns))

    return one_by_one


def in_eval_mode(graphdef: Any, params: nnx.State, rest: nnx.State) -> Any:
    """The network of one member's variables, a copy, in eval mode."""
    model = nnx.merge(graphdef, params, rest, copy=True)
    model.eval()
    return model


def pick(tree: Any, member: jax.Array) -> Any:
    """One member of every array of a tree."""
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, member, keepdims=False), tree)


def _moved(state: TrainState, moving: Moving, step: jax.Array) -> TrainState:
    params, rest, opt_state = moving
    return dataclasses.replace(state, step=step, params=params, rest=rest, opt_state=opt_state)
