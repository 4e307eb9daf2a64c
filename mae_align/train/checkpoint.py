"""Checkpoints of training on disk: everything that is Orbax, and nothing else is.

A folder holds one run::

    identity.json     what the run is; a folder of another run is refused
    1200/             the state after 1,200 steps, written beside its place and moved there when complete
    damaged-1300/     one with cut off or missing files, or other content than was saved: put aside

Saves are asynchronous: only the copy to the host waits for the device. Several processes save and restore together, to
and from one folder that all of them see, and any number of processes and devices can restore what another number saved.
"""

from __future__ import annotations

import atexit
import enum
import glob
import itertools
import json
import logging
import math
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import preservation_policy

from mae_align.runtime.errors import InputError
from mae_align.runtime.files import claim
from mae_align.runtime.processes import refused_together

Result = TypeVar("Result")
# Calls of reached_preemption: JAX wants every process to count them alike, without gaps, all its life.
_preemption_checks = itertools.count(1)


class Better(enum.Enum):
    """Which end of a metric is the good one."""

    LOWER = -1.0
    HIGHER = 1.0


@dataclass(frozen=True)
class BestBy:
    """The metric by which the best checkpoint is chosen.

    Attributes:
        metric: its name.
        better: which end of it is good.

    Example:
        >>> BestBy("loss").score({"loss": 2.0}) < BestBy("loss").score({"loss": 1.0})
        True
    """

    metric: str
    better: Better = Better.LOWER

    def score(self, metrics: Mapping[str, float] | None) -> float:
        """Larger is better; a checkpoint without the metric, or with NaN, is worse than any other."""
        value = (metrics or {}).get(self.metric, math.nan)
        return -math.inf if math.isnan(value) else self.better.value * value


class Restored(NamedTuple):
    """What a checkpoint holds.

    Attributes:
        step: steps done.
        state: the pytree.
        position: the JSON values saved beside it.
    """

    step: int
    state: Any
    position: dict[str, Any]


def _without_patterns(folder: Path) -> Path:
    """A path to a folder that no glob takes for a pattern: Orbax would not find what it wrote to ``run[1]/``."""
    if glob.escape(str(folder)) == str(folder):
        return folder
    beside = Path(tempfile.mkdtemp(prefix="mae_align-"))
    atexit.register(shutil.rmtree, beside, ignore_errors=True)
    link = beside / "checkpoints"
    link.symlink_to(folder, target_is_directory=True)
    return link


class Checkpoints:
    """The checkpoints of one run; made by :meth:`open`, closed by leaving its context.

    Attributes:
        folder: where they lie.
        every: steps from one regular checkpoint to the next; kept for the training loop.
        keep_best: the metric by which the best one is kept, if any.
    """

    def __init__(self, folder: Path, every: int, keep_latest: int, keep_best: BestBy | None) -> None:
        self.folder, self.every, self.keep_best = folder, every, keep_best
        kept: list[Any] = [preservation_policy.LatestN(keep_latest)]
        if keep_best is not None:
            kept.append(preservation_policy.BestN(get_metric_fn=keep_best.score, n=1))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=preservation_policy.AnyPreservationPolicy(kept),
            best_fn=None if keep_best is None else keep_best.score,
            cleanup_tmp_directories=True,
        )
        self._manager = _Manager(_without_patterns(folder), options=options)

    @classmethod
    def open(
        cls,
        folder: str | Path,
        *,
        identity: str,
        every: int,
        keep_latest: int = 2,
        keep_best: BestBy | None = None,
    ) -> Checkpoints:
        """Open the folder of a run, made if missing; all processes together.

        What a killed run has written or removed by half is removed. Other checkpoints with cut off or missing files
        are put aside as ``damaged-STEP``, with a warning.

        Args:
            folder: seen by all processes.
            identity: what the run computes: its data, model and settings, see :func:`mae_align.runtime.files.identity`.
            every: steps from one regular checkpoint to the next, >= 1.
            keep_latest: how many of the newest are kept, >= 1.
            keep_best: keep also the best one by this metric.

        Raises:
            InputError: a folder of another run or that cannot be used, or with damaged checkpoints only; a damaged
                identity.json; numbers below 1.

        Example:
            >>> import tempfile
            >>> with Checkpoints.open(tempfile.mkdtemp(), identity="a", every=10) as checkpoints:
            ...     checkpoints.save(10, {"x": jnp.arange(3)}, {"batch": 7}, {})
            ...     checkpoints.restore({"x": jnp.zeros(3, jnp.int32)})
            Restored(step=10, state={'x': Array([0, 1, 2], dtype=int32)}, position={'batch': 7})
        """
        if every < 1 or keep_latest < 1:
            raise InputError(f"every={every}, keep_latest={keep_latest}: give at least 1 each")
        # Orbax wants an absolute path.
        folder = Path(folder).expanduser().absolute()
        with refused_together():
            if jax.process_index() == 0:
                if not (folder / "identity.json").exists() and _steps(folder):
                    raise InputError(f"{folder} has checkpoints but no identity.json: choose another or delete it")
                claim(folder, identity, "checkpoints")
                put_aside_damaged(folder)
        _quiet_orbax()
        return cls(folder, every, keep_latest, keep_best)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def save(self, step: int, state: object, position: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """Save a state in the background; all processes together. A step that is saved already is left as it is.

        The arrays may be donated or deleted as soon as this returns.

        Args:
            step: steps done.
            state: a pytree of JAX arrays of at most 32 bits per number, and of typed random keys.
            position: JSON values: whatever else is needed to go on.
            metrics: what the best checkpoint is chosen by, at this step.

        Raises:
            InputError: a leaf that cannot be saved exactly.
            OSError, ValueError: of an earlier save that failed in the background.
        """
        if step in self._manager.all_steps():
            return
        self.wait()  # Orbax would, too
        leaves = _plain(state)
        about = {
            "step": step,
            "position": dict(position),
            "layout": _layout(leaves),
            "checksum": int(_checksum(leaves)),
        }
        self._manager.save(
            step,
            args=ocp.args.Composite(state=ocp.args.StandardSave(leaves), about=ocp.args.JsonSave(about)),
            metrics={name: float(value) for name, value in metrics.items()},
            force=True,
        )

    def latest_step(self) -> int | None:
        """The newest finished or running checkpoint; None where there is none."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """All checkpoints, the oldest first."""
        return sorted(self._manager.all_steps())

    def best_step(self) -> int | None:
        """The best checkpoint by ``keep_best``; None where none has that metric."""
        best = self.keep_best
        if best is None:
            return None
        self.wait()  # metrics are read from the files
        scores = {step: best.score(self._manager.metrics(step)) for step in self.steps()}
        found = max(scores, key=lambda step: (scores[step], step), default=None)
        return None if found is None or scores[found] == -math.inf else found

    def restore(self, like: object, step: int | None = None) -> Restored:
        """Read a checkpoint back; all processes together.

        Args:
            like: arrays or ``jax.ShapeDtypeStruct`` with the structure, shapes, types and shardings wanted. Its devices
                may be other than those that saved.
            step: which; None for the newest that is as it was saved. Newer ones that are not are put aside with a
                warning, as in :meth:`open`.

        Returns:
            Its step, state and position. The state is compared with the checksum that was saved.

        Raises:
            InputError: no checkpoint (or not this one), none that can be read, or one of another model.
        """
        self.wait()
        candidates = self.steps()[::-1] if step is None else [step] if step in self.steps() else []
        if not candidates:
            raise InputError(f"{self.folder} has no checkpoint{'' if step is None else f' of step {step}'}")
        wanted = {name: _abstract(leaf) for name, leaf in _named(like).items()}
        for i, candidate in enumerate(candidates):
            found = self._read(candidate, wanted)
            if found is None:
                continue
            for damaged in candidates[:i]:
                if jax.process_index() == 0:
                    put_aside(self.folder, damaged, candidate)
            if i > 0:
                _all_agree(True)
                self._manager.reload()
            return Restored(candidate, _as_in(like, found[0]), found[1])
        raise InputError(none_left(self.folder, candidates))

    def reached_preemption(self) -> bool:
        """Whether all processes are to save and end now, because one of them got SIGTERM.

        Every process calls it equally often, once per dispatch: JAX makes them agree on one call. False without
        ``jax.distributed``, where a signal handler knows at once.
        """
        if not jax.distributed.is_initialized():
            return False
        return multihost_utils.reached_preemption_sync_point(next(_preemption_checks))

    def wait(self) -> None:
        """Until what is being saved is on disk; raises the error of a save that failed."""
        self._manager.wait_until_finished()
        if jax.process_index() == 0:
            for step in self.steps():
                write_sizes(self.folder / str(step))

    def close(self) -> None:
        """Wait for what is being saved, and end the background threads."""
        self.wait()
        self._manager.close()

    def _read(self, step: int, wanted: dict[str, jax.ShapeDtypeStruct]) -> tuple[dict[str, jax.Array], Any] | None:
        """Arrays and position, or None where some process finds them damaged."""
        arguments = ocp.args.Composite(about=ocp.args.JsonRestore())
        about: Any = _unless_damaged(lambda: self._manager.restore(step, args=arguments)["about"])
        known = isinstance(about, dict) and about.get("step") == step and {"layout", "checksum"} <= about.keys()
        if not _all_agree(known):
            return None
        if about["layout"] != _layout(wanted):
            raise InputError(f"checkpoint {step} in {self.folder} is of another model: {_difference(about, wanted)}")
        arguments = ocp.args.Composite(state=ocp.args.StandardRestore(wanted))
        leaves = _unless_damaged(lambda: self._manager.restore(step, args=arguments)["state"])
        if not _all_agree(leaves is not None) or leaves is None or int(_checksum(leaves)) != about["checksum"]:
            return None
        return leaves, about["position"]


class _Manager(ocp.CheckpointManager):
    """Orbax's manager without its own question about preemption, which would upset the count of ours."""

    def reached_preemption(self, step: int) -> bool:
        """Never: :meth:`Checkpoints.reached_preemption` asks."""
        del step
        return False


def _quiet_orbax() -> None:
    """Keep lines for each save at the level INFO of absl off standard error, where the progress line is."""
    logging.getLogger("absl").setLevel(max(logging.WARNING, logging.getLogger("absl").level))


def _unless_damaged(read: Callable[[], Result]) -> Result | None:
    """What a function reads, or None where files are not what they should be, for which there are many errors."""
    try:
        return read()
    except (RuntimeError, MemoryError):
        # Of JAX, such as memory that runs out: no fault of the files.
        raise
    except Exception:
        return None


def _all_agree(mine: bool) -> bool:
    """Whether it is so in every process; one collective where there are several."""
    if jax.process_count() == 1:
        return mine
    return bool(np.asarray(multihost_utils.process_allgather(np.array(mine))).all())


def _named(tree: object) -> dict[str, Any]:
    """Leaves by their path in the tree: independent of the classes that make it."""
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _is_key(leaf: jax.Array | jax.ShapeDtypeStruct) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _key_kind(leaf: jax.Array | jax.ShapeDtypeStruct) -> str:
    """Name of the generator of typed keys; JAX tells it of arrays and of traced values alone."""
    kinds: list[Any] = []
    jax.eval_shape(lambda keys: kinds.append(jax.random.key_impl(keys)), leaf)
    return kinds[0]


def _plain(state: object) -> dict[str, jax.Array]:
    """Leaves by name, typed keys as their numbers."""
    leaves = {}
    for name, leaf in _named(state).items():
        if not isinstance(leaf, jax.Array):
            raise InputError(f"{name} of the state is a {type(leaf).__name__}: give JAX arrays")
        leaves[name] = jax.random.key_data(leaf) if _is_key(leaf) else leaf
        if leaves[name].dtype.itemsize > 4 or leaves[name].dtype.kind == "c":
            raise InputError(f"{name} of the state is {leaf.dtype}, which is not saved exactly: give float32 or int32")
    return leaves


def _abstract(leaf: jax.Array | jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """Shape, type and place of a leaf as it is saved."""
    shape, dtype = leaf.shape, leaf.dtype
    if _is_key(leaf):
        data = jax.eval_shape(jax.random.key_data, leaf)
        shape, dtype = data.shape, data.dtype
    return jax.ShapeDtypeStruct(shape, dtype, sharding=leaf.sharding)


def _as_in(like: object, leaves: dict[str, jax.Array]) -> Any:
    """The tree that was asked for, with keys typed again."""

    def leaf(path: Any, wanted: Any) -> jax.Array:
        found = leaves[jax.tree_util.keystr(path)]
        if not _is_key(wanted):
            return found
        return jax.device_put(jax.random.wrap_key_data(found, impl=_key_kind(wanted)), wanted.sharding)

    return jax.tree_util.tree_map_with_path(leaf, like)


def _layout(leaves: Mapping[str, jax.Array | jax.ShapeDtypeStruct]) -> dict[str, str]:
    return {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in leaves.items()}


def _difference(about: Mapping[str, Any], wanted: Mapping[str, jax.ShapeDtypeStruct]) -> str:
    """The first leaf that differs, in words."""
    there, here = about["layout"], _layout(wanted)
    name = next(name for name in [*here, *there] if here.get(name) != there.get(name))
    return f"{name} is {there.get(name, 'missing')} there and {here.get(name, 'missing')} here"


@jax.jit
def _checksum(leaves: dict[str, jax.Array]) -> jax.Array:
    """A uint32 over all bits and where they are; the same for any sharding.

    sum_l c_l sum_i b_i w_i mod 2^32, with odd weights, so that no change of a single number is missed. Orbax reads a
    missing chunk as zeros.
    """
    total = jnp.uint32(0)
    for number, name in enumerate(sorted(leaves)):
        x = leaves[name]
        if x.dtype == jnp.bool_:
            x = x.astype(jnp.uint8)
        bits = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}").astype(jnp.uint32)
        weights = jnp.zeros(x.shape, jnp.uint32)
        for axis in range(x.ndim):
            weights = weights * jnp.uint32(0x9E3779B1) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        odd = weights * jnp.uint32(2) + jnp.uint32(1)
        total += jnp.sum(bits * odd, dtype=jnp.uint32) * jnp.uint32(2 * number + 1)
    return total


# Sizes of the files of a checkpoint, written into it when it is complete.
_SIZES = "sizes.json"


def _steps(folder: Path) -> list[int]:
    """Steps of the checkpoints in a folder, if there is one."""
    return sorted(int(entry.name) for entry in folder.glob("*") if entry.name.isdecimal())


def put_aside_damaged(folder: Path) -> None:
    """Put checkpoints aside whose files are cut off or missing; an InputError if no other is left."""
    steps = _steps(folder)
    found = {step: _condition(folder / str(step), newest=step == steps[-1]) for step in steps}
    whole = [step for step, condition in found.items() if condition is _Condition.WHOLE]
    if found and not whole:
        raise InputError(none_left(folder, list(found)))
    for step, condition in found.items():
        if condition is _Condition.PARTIAL and step < max(whole):
            # A run was killed while it removed the old one.
            shutil.rmtree(folder / str(step))
        elif condition is not _Condition.WHOLE:
            put_aside(folder, step, max(whole))


class _Condition(enum.Enum):
    """Of the files of a checkpoint: all as they were; some missing and the others as they were; some changed."""

    WHOLE = enum.auto()
    PARTIAL = enum.auto()
    CHANGED = enum.auto()


def _condition(checkpoint: Path, newest: bool) -> _Condition:
    """By size; and the files that Orbax reads at once are JSON."""
    try:
        for file in (checkpoint / "about" / "metadata", checkpoint / "metrics" / "metrics"):
            if file.exists():
                json.loads(file.read_text(encoding="utf-8"))
        sizes = checkpoint / _SIZES
        if not sizes.exists():
            # A run that is killed just after a save has not written them; before the next save it has.
            return _Condition.WHOLE if newest else _Condition.PARTIAL
        before, now = json.loads(sizes.read_text(encoding="utf-8")), _sizes(checkpoint)
    except (ValueError, OSError):
        return _Condition.CHANGED
    if before == now:
        return _Condition.WHOLE
    return _Condition.PARTIAL if now.items() <= before.items() else _Condition.CHANGED


def _sizes(checkpoint: Path) -> dict[str, int]:
    files = (path for path in checkpoint.rglob("*") if path.is_file() and not path.name.startswith(_SIZES))
    return {path.relative_to(checkpoint).as_posix(): path.stat().st_size for path in files}


def write_sizes(checkpoint: Path) -> None:
    """Note the sizes of a complete checkpoint's files in it, once."""
    target = checkpoint / _SIZES
    if target.exists() or not checkpoint.is_dir():
        return
    unfinished = checkpoint / f"{_SIZES}.tmp"
    unfinished.write_text(json.dumps(_sizes(checkpoint)), encoding="utf-8")
    os.replace(unfinished, target)


def put_aside(folder: Path, step: int, used: int) -> None:
    """Move a damaged checkpoint out of the way of the one that will have its step, and say so."""
    place = _free(folder / f"damaged-{step}")
    os.replace(folder / str(step), place)
    message = (
        f"checkpoint {step} in {folder} is damaged and now called {place.name}: step {used} is the newest whole one"
    )
    warnings.warn(message, stacklevel=4)


def none_left(folder: Path, damaged: Sequence[int]) -> str:
    """What to say where no checkpoint can be used."""
    listed = ", ".join(map(str, sorted(damaged)))
    return f"{folder}: every checkpoint ({listed}) is damaged: delete the folder to start anew"


def _free(path: Path) -> Path:
    """The path itself, or with a number behind where that is taken."""
    return next(p for i in itertools.count() if not (p := Path(f"{path}-{i}") if i else path).exists())
