from __future__ import annotations

from typing import Any

import chex
import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding

from mae_align.closed_form.basis import PatchBasis
from mae_align.closed_form.held_out import HeldOut
from mae_align.closed_form.point import Shared, Weights, solve_features, solve_one, solve_point
from mae_align.runtime.devices import compile_counter, solve_context
from mae_align.runtime.errors import InputError
from mae_align.runtime.files import PointStore
from mae_align.runtime.pool import SharedStore, check_mesh, grid_mesh, over_mesh, replicated, solve_over_mesh

R, Q, POINTS = 20, 3, 11
COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter", "collective-broadcast")


KINDS = {"curves": (solve_point, False), "features": (solve_features, False), "held out": (solve_features, True)}


def arguments(held_out=False, seed=0):
    """What points share, and the weights of some points, one of them with a vanishing beta."""
    rng = np.random.default_rng(seed)
    e, _ = np.linalg.qr(rng.normal(size=(R, R)))
    s = np.sort(rng.uniform(0.1, 4.0, R))[::-1].copy()
    gram, target = e.T @ np.diag(s) @ e, rng.normal(size=(R, Q))
    root = rng.normal(size=(R, R))
    parts = np.stack([0.4 * root @ root.T, 0.6 * root @ root.T])
    cross = rng.normal(size=(2, R, Q))
    held = HeldOut(parts.sum(0), cross.sum(0), np.float64(9.0), parts.astype(np.float32), cross, np.array([4.0, 5.0]))
    alpha, beta = np.zeros(POINTS), np.ones(POINTS)
    alpha[3:6], beta[3] = 1.0, 0.0
    shared: Any = Shared(PatchBasis(e, np.ones(R), gram, target), s, held if held_out else None)  # pyright: ignore
    at: Any = (rng.uniform(0.2, 2.0, (POINTS, R)), alpha, beta)
    return shared, Weights(*at)


def lowered_text(function, shared, mapped, mesh):
    """Text of the compiled program for points that are spread over the mesh, and its output shardings."""
    spread = NamedSharding(mesh, jax.P(mesh.axis_names))
    with solve_context():
        whole = [np.resize(a, (16, *a.shape[1:])) for a in mapped]
        placed = Weights(*(jax.make_array_from_callback(a.shape, spread, lambda index, a=a: a[index]) for a in whole))
        compiled = function.lower(replicated(shared, mesh), placed, max_k=R).compile()
    return compiled.as_text() or "", jax.tree.leaves(compiled.output_shardings)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("devices", [1, 3, 8])
def test_a_mesh_of_devices_is_one_device(kind, devices):
    function, held_out = KINDS[kind]
    shared, mapped = arguments(held_out)
    with solve_context():
        found = solve_over_mesh(function, grid_mesh(jax.devices()[:devices]), shared, mapped, R)
        points = [Weights(*(a[i] for a in mapped)) for i in range(POINTS)]
        single = [jax.tree.map(np.asarray, solve_one(function, shared, one, max_k=R)) for one in points]
    expected = jax.tree.map(lambda *rows: np.stack(rows), *single)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12), found, expected)
    chex.assert_tree_shape_prefix(found, (POINTS,))
    assert jax.tree.leaves(found)[0].dtype == np.float64


def test_axes_of_any_mesh_are_taken_together():
    shared, mapped = arguments()
    square = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    with solve_context():
        found = solve_over_mesh(solve_point, square, shared, mapped, 5)
        expected = solve_over_mesh(solve_point, grid_mesh(), shared, mapped, 5)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_the_compiled_program_has_no_collective_and_its_results_stay_spread(kind):
    function, held_out = KINDS[kind]
    shared, mapped = arguments(held_out)
    mesh = grid_mesh()
    text, outputs = lowered_text(over_mesh(function, mesh), shared, mapped, mesh)
    assert "HloModule" in text
    assert not any(name in text for name in COLLECTIVES)
    assert all(len(sharding.device_set) == 8 and not sharding.is_fully_replicated for sharding in outputs)


def test_a_plain_loop_over_the_spread_axis_gathers_it():
    # The control of the test above: it can fail.
    shared, mapped = arguments()
    mesh = grid_mesh()

    def plain(shared, points, *, max_k):
        return jax.lax.map(lambda point: solve_point(shared, point, max_k=max_k), points)

    text, _ = lowered_text(jax.jit(plain, static_argnames="max_k"), shared, mapped, mesh)
    assert any(name in text for name in COLLECTIVES)


def test_a_second_call_compiles_nothing_and_moves_no_basis():
    shared, mapped = arguments()
    mesh = grid_mesh()
    with solve_context():
        there = replicated(shared, mesh)
        assert replicated(there, mesh).basis.gram is there.basis.gram
        solve_over_mesh(solve_point, mesh, there, mapped, R)
        with compile_counter() as compiled:
            solve_over_mesh(solve_point, mesh, there, Weights(*(a[:9] for a in mapped)), R)
    assert compiled.count == 0


def test_float64_on_devices_without_it_is_refused(monkeypatch):
    monkeypatch.setattr("mae_align.runtime.devices._BACKENDS_WITHOUT_FLOAT64", ("cpu",))
    check_mesh(grid_mesh(), "float32")
    with pytest.raises(InputError, match="has no float64: ask for dtype='float32'"):
        check_mesh(grid_mesh(), "float64")


def test_a_shared_store_reads_and_writes_for_the_process_that_has_one(tmp_path):
    store = SharedStore(PointStore(tmp_path, "a"))
    assert store.load("p") is None
    store.save("p", {"t": np.eye(2), "gap": np.array(0.5)})
    found = store.load("p")
    assert found is not None
    np.testing.assert_array_equal(found["t"], np.eye(2))
    assert found["gap"] == 0.5
    absent = SharedStore(None)
    absent.save("p", {"t": np.eye(2)})
    assert absent.load("p") is None
