"""Saving, choosing and restoring checkpoints; damaged, half-written and foreign ones."""

from __future__ import annotations

import dataclasses
import functools
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import mae_align
from mae_align.runtime.errors import InputError
from mae_align.train.checkpoint import BestBy, Better, Checkpoints, _checksum


@functools.partial(jax.tree_util.register_dataclass, data_fields=["weights", "flags", "keys", "step"], meta_fields=[])
@dataclass
class State:
    weights: Any
    flags: jax.Array
    keys: jax.Array
    step: jax.Array


def state(seed: int, devices: int = 8) -> State:
    mesh = Mesh(np.array(jax.devices()[:devices]), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    whole, split = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    rng = np.random.default_rng(seed)
    return State(
        {
            "a": jax.device_put(rng.normal(size=(16, 3)).astype(np.float32), split),
            "b": jax.device_put(jnp.asarray(rng.normal(size=5), jnp.bfloat16), whole),
        },
        jax.device_put(rng.integers(0, 2, 8).astype(bool), split),
        jax.device_put(jax.random.split(jax.random.key(seed), 4), whole),
        jax.device_put(jnp.int32(seed), whole),
    )


def opened(folder: Path, identity: str = "me", **options: Any) -> Checkpoints:
    return Checkpoints.open(folder, identity=identity, every=1, **options)


def save(folder: Path, steps: list[int], metrics: list[dict[str, float]] | None = None, **options: Any) -> None:
    with opened(folder, **options) as checkpoints:
        for i, step in enumerate(steps):
            checkpoints.save(step, state(step), {"at": [step, "x"]}, metrics[i] if metrics else {})


def assert_same(found: Any, expected: Any) -> None:
    """Bit for bit, types and places included."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype and a.sharding.is_equivalent_to(b.sharding, a.ndim)
        a, b = (jax.random.key_data(v) if jnp.issubdtype(v.dtype, jax.dtypes.prng_key) else v for v in (a, b))
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_a_state_comes_back_bit_for_bit_with_its_step_and_position(tmp_path):
    save(tmp_path, [3, 8])
    with opened(tmp_path) as checkpoints:
        step, found, position = checkpoints.restore(state(0))
        assert (step, position) == (8, {"at": [8, "x"]})
        assert_same(found, state(8))
        assert checkpoints.restore(state(0), step=3).step == 3


def test_another_number_of_devices_and_a_state_that_is_only_described(tmp_path):
    save(tmp_path, [5])
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state(0, devices=2))
    with opened(tmp_path) as checkpoints:
        assert_same(checkpoints.restore(like).state, state(5, devices=2))


def test_the_state_may_be_donated_while_it_is_being_written(tmp_path):
    """A million numbers take longer to write than the next steps take to overwrite them."""
    more = jax.jit(lambda x: x + 1, donate_argnums=0)
    with opened(tmp_path) as checkpoints:
        x = {"x": jnp.zeros((1000, 1000))}
        checkpoints.save(1, x, {}, {})
        for _ in range(20):
            x = jax.tree.map(more, x)
        jax.block_until_ready(x)
        assert float(jnp.abs(checkpoints.restore({"x": jnp.ones((1000, 1000))}).state["x"]).max()) == 0.0
        # What was restored can be donated in turn.
        restored = checkpoints.restore({"x": jnp.ones((1000, 1000))}).state
        assert float(more(restored["x"]).sum()) == 1e6


@pytest.mark.parametrize(
    ("better", "best"), [(Better.LOWER, 20), (Better.HIGHER, 30)], ids=["lowest is best", "highest is best"]
)
def test_the_latest_and_the_best_are_both_kept(tmp_path, better, best):
    steps, losses = [10, 20, 30, 40, 50, 60], [3.0, 1.0, 5.0, 2.0, 4.0, 2.5]
    options = {"keep_latest": 2, "keep_best": BestBy("loss", better)}
    save(tmp_path, steps, [{"loss": v, "other": -v} for v in losses], **options)
    with opened(tmp_path, **options) as checkpoints:
        assert checkpoints.steps() == [best, 50, 60]
        assert (checkpoints.best_step(), checkpoints.latest_step()) == (best, 60)
        # It goes on knowing the best of the earlier run; one without the metric, or with NaN, is never the best.
        checkpoints.save(70, state(70), {}, {})
        checkpoints.save(80, state(80), {}, {"loss": float("nan")})
        assert checkpoints.steps() == [best, 70, 80] and checkpoints.best_step() == best
        record = {Better.LOWER: 0.5, Better.HIGHER: 9.0}[better]
        checkpoints.save(90, state(90), {}, {"loss": record})
        assert checkpoints.steps() == [80, 90] and checkpoints.best_step() == 90
    assert {p.name for p in tmp_path.iterdir()} == {"80", "90", "identity.json"}


def test_without_a_metric_the_latest_are_kept(tmp_path):
    save(tmp_path, [1, 2, 3, 4], keep_latest=3)
    with opened(tmp_path) as checkpoints:
        assert checkpoints.steps() == [2, 3, 4] and checkpoints.best_step() is None


def test_a_step_that_is_saved_is_left_as_it_is(tmp_path):
    save(tmp_path, [4])
    with opened(tmp_path) as checkpoints:
        checkpoints.save(4, state(5), {"at": "other"}, {})
        assert checkpoints.restore(state(0)).position == {"at": [4, "x"]}


def test_a_half_written_checkpoint_is_skipped_and_removed(tmp_path):
    save(tmp_path, [4, 6])
    (tmp_path / "6").rename(tmp_path / "6.orbax-checkpoint-tmp")
    with opened(tmp_path) as checkpoints:
        assert checkpoints.steps() == [4] and checkpoints.restore(state(0)).step == 4
        checkpoints.save(6, state(6), {}, {})
        assert checkpoints.restore(state(0)).step == 6
    assert {p.name for p in tmp_path.iterdir()} == {"4", "6", "identity.json"}


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    save(folder, [4, 6], [{"loss": 1.0}, {"loss": 0.5}], keep_best=BestBy("loss"))
    return folder


def test_a_file_of_any_kind_cut_off_or_lost_costs_the_newest_checkpoint_alone(tmp_path, two_steps):
    files = sorted(p.relative_to(two_steps) for p in (two_steps / "6").rglob("*") if p.is_file())
    assert len(files) > 8
    for i, name in enumerate(files):
        folder = tmp_path / str(i)
        shutil.copytree(two_steps, folder)
        file = folder / name
        if i % 2 or file.stat().st_size == 0:
            file.unlink()
        else:
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        if file.name == "sizes.json" and not file.exists():
            continue
        with pytest.warns(UserWarning, match=r"checkpoint 6 in .* damaged.*: step 4 is") as warned:
            checkpoints = opened(folder, keep_best=BestBy("loss"))
        with checkpoints:
            found = checkpoints.restore(state(0))
            assert found.step == 4 and len(warned) == 1
            assert_same(found.state, state(4))
            # The step is free again.
            checkpoints.save(6, state(7), {}, {"loss": 0.25})
            assert_same(checkpoints.restore(state(0)).state, state(7))
        assert {p.name for p in folder.iterdir()} == {"4", "6", "damaged-6", "identity.json"}


@pytest.mark.parametrize("lost", ["state", "sizes.json", "sizes.json and about"])
def test_an_old_checkpoint_that_was_being_removed_is_removed(tmp_path, two_steps, lost):
    """No warning: nothing that anyone wanted is lost."""
    shutil.copytree(two_steps, tmp_path, dirs_exist_ok=True)
    for name in lost.split(" and "):
        path = tmp_path / "4" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    with opened(tmp_path, keep_best=BestBy("loss")) as checkpoints:
        assert checkpoints.steps() == [6] and checkpoints.restore(state(0)).step == 6
    assert {p.name for p in tmp_path.iterdir()} == {"6", "identity.json"}


def test_other_content_of_the_right_sizes_is_found_by_its_checksum(tmp_path, two_steps):
    """As when a disk gives back zeros or old blocks: here the arrays of another step."""
    shutil.copytree(two_steps, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "6" / "state")
    shutil.copytree(tmp_path / "4" / "state", tmp_path / "6" / "state")
    (tmp_path / "6" / "sizes.json").unlink()
    with opened(tmp_path) as checkpoints:
        with pytest.warns(UserWarning, match="checkpoint 6 in .* is damaged"):
            assert checkpoints.restore(state(0)).step == 4
        assert checkpoints.steps() == [4] and (tmp_path / "damaged-6").is_dir()


@pytest.mark.parametrize("change", ["one bit", "two places exchanged"])
def test_the_checksum_sees_every_change_of_a_number_and_no_change_of_place(change):
    x = {"a": jnp.arange(24, dtype=jnp.float32).reshape(4, 6), "b": jnp.ones(3, jnp.bfloat16)}
    split = jax.device_put(x["a"].T, NamedSharding(Mesh(np.array(jax.devices()[:2]), ("d",)), P("d"))).T
    assert int(_checksum(x)) == int(_checksum(x | {"a": split}))
    for i in range(1, 24):
        flat = np.arange(24, dtype=np.float32)
        if change == "one bit":
            flat.view(np.uint32)[i] ^= np.uint32(1 << i)
        else:
            flat[[i - 1, i]] = flat[[i, i - 1]]
        assert int(_checksum(x)) != int(_checksum(x | {"a": jnp.asarray(flat.reshape(4, 6))}))


def test_if_every_checkpoint_is_damaged_nothing_starts_anew_unasked(tmp_path, two_steps):
    shutil.copytree(two_steps, tmp_path, dirs_exist_ok=True)
    for step in ("4", "6"):
        (tmp_path / step / "about" / "metadata").write_text("{")
    with pytest.raises(InputError, match=r"every checkpoint \(4, 6\) is damaged: delete the folder"):
        opened(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"4", "6", "identity.json"}


def test_a_folder_of_another_run_is_refused(tmp_path):
    save(tmp_path / "run", [1])
    with pytest.raises(InputError, match="another computation"):
        opened(tmp_path / "run", identity="you")
    (tmp_path / "run" / "identity.json").write_text('{"ident')
    with pytest.raises(InputError, match=r"identity.json is damaged: delete"):
        opened(tmp_path / "run")
    (tmp_path / "run" / "identity.json").unlink()
    with pytest.raises(InputError, match=r"no identity\.json"):
        opened(tmp_path / "run")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot use the folder .*/file "):
        opened(tmp_path / "file")


def test_a_checkpoint_of_another_model_is_refused_and_stays(tmp_path):
    save(tmp_path, [2])
    with opened(tmp_path) as checkpoints:
        wider = state(0)
        wider.weights["a"] = jnp.zeros((16, 4))
        with pytest.raises(InputError, match=r"another model: \.weights\['a'\] is float32\[16, 3\] there and"):
            checkpoints.restore(wider)
        with pytest.raises(InputError, match=r"\.flags is bool\[8\] there and missing here"):
            checkpoints.restore(dataclasses.replace(state(0), flags=None))
        assert checkpoints.steps() == [2]


def test_what_cannot_be_saved_exactly_is_refused(tmp_path):
    with opened(tmp_path) as checkpoints:
        with jax.enable_x64(True), pytest.raises(InputError, match=r"\['x'\] of the state is float64.*give float32"):
            checkpoints.save(1, {"x": jnp.ones(2, jnp.float64)}, {}, {})
        with pytest.raises(InputError, match=r"\['x'\] of the state is a ndarray: give JAX arrays"):
            checkpoints.save(1, {"x": np.ones(2)}, {}, {})
        with pytest.raises(InputError, match=r"no checkpoint$"):
            checkpoints.restore(state(0))
        with pytest.raises(InputError, match=r"no checkpoint of step 3"):
            checkpoints.restore(state(0), step=3)
    for every, keep_latest in ((0, 1), (1, 0)):
        with pytest.raises(InputError, match="give at least 1 each"):
            Checkpoints.open(tmp_path, identity="me", every=every, keep_latest=keep_latest)


def test_the_best_needs_a_metric_that_is_a_number():
    lowest, highest = BestBy("a"), BestBy("a", Better.HIGHER)
    assert lowest.score({"a": 1.0}) > lowest.score({"a": 2.0}) > lowest.score({"b": 1.0}) == lowest.score(None)
    assert highest.score({"a": 2.0}) > highest.score({"a": 1.0}) > highest.score({"a": float("nan")})


def test_no_other_module_knows_orbax():
    package = Path(mae_align.__file__).parent
    users = {
        p.name for p in package.rglob("*.py") if re.search(r"^\s*(import|from) orbax", p.read_text(), re.MULTILINE)
    }
    assert users == {"checkpoint.py"}
