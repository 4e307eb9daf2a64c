"""How much of the task does a little reconstruction error buy?

Theorem 1 of Balestriero & LeCun (2024), arXiv 2402.11337: one linear encoder with a supervised head and, with weight
lambda, a reconstruction head. lambda -> infinity is PCA, lambda -> 0 is ordinary least squares (OLS; reduced-rank
regression, RRR, at k below the number of classes). In between lies the best possible trade-off of the two errors. For
chosen numbers of features k this reports, in-sample and on test images:

* the trade-off curve, and the r2 that 1% more reconstruction error than PCA's buys (the lambda that spends the 1% is
  found on the training images; the test images only measure);
* the lambda that is best on a validation split, measured on the test images;
* how far the encoder turns away from PCA (principal angles), and the test of the theorem's remark: the encoder does not
  depend on lambda at k exactly when the first k principal components explain as much of the labels as any k linear
  features can (from k = number of classes - 1 on: as all pixels).

    python -m experiments.lambda_sweep                                    # bundled digits: half a minute on 2 cores
    python -m experiments.lambda_sweep --preset paper --data idx:DIR      # Fashion-MNIST: 3 minutes on 2 cores

Differences between curves on test images carry paired standard errors from groups of test images. Expected on the
digits: at k = 16, 1% more reconstruction error buys r2 0.568 -> 0.597 in-sample and 0.562 -> 0.586 on test images
(paired difference +0.0236 +- 0.0025); OLS reaches 0.655 and 0.631 for 29%. Expected on Fashion-MNIST (60,000 x 784): at
k = 32, 1% buys 0.527 -> 0.579 in-sample and 0.519 -> 0.567 on test images (+0.0477 +- 0.0011), and 1.8% (--budget 1.8)
buys 0.593 and 0.579. Interrupted, the same command goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import xarray as xr
from tqdm import tqdm

import mae_align as ma
from experiments.harness.cli import launch
from experiments.harness.data import load_together
from experiments.harness.folder import RunFolder, atomic_path, netcdf3_ready
from experiments.lambda_sweep.report import lambda_figure, report_rows, summarise, table_text, trade_off_figure
from mae_align.closed_form.autoencoder import denoising_loss, supervised_solution
from mae_align.closed_form.compare import principal_angles
from mae_align.closed_form.factorize import PrimalProblem, factorize
from mae_align.closed_form.features import feature_basis
from mae_align.corruption import CorruptionMoments
from mae_align.data import validation_split
from mae_align.runtime.devices import solve_context, worker_count
from mae_align.runtime.files import PointStore, fingerprint


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of the lambda sweep."""

    data: str = "digits"
    """Data set: digits, idx:DIR, npz:FILE, folder:DIR, tfds:NAME or prepared:DIR."""
    image_size: int | None = None
    """Resize images to squares of this side, in pixels; none keeps them."""
    ks: tuple[int, ...] = (4, 8, 16, 32)
    """Numbers of features; each below the rank of the images."""
    lambdas: tuple[float, ...] = tuple(float(f"{x:.3g}") for x in np.geomspace(1e-2, 1e3, 41))
    """Weights of reconstruction, relative: lambda tr Sxx / tr Syy. The ends 0 and infinity are always added.

    Between two of them the trade-off curve is taken as straight, so that a coarse grid understates what a budget buys.
    """
    budget: float = 1.0
    """Extra reconstruction error whose worth in r2 is reported, in percent of PCA's error."""
    validation_fraction: float = 0.2
    """Share of the training images on which the best lambda is chosen."""
    groups: int = 20
    """Groups of test images whose spread gives the standard errors."""
    pixel_noise: float | None = None
    """Variance of the measurement noise of a pixel; none: quantisation noise, 1/12 for 8-bit images."""
    seed: int = 0
    """Of the splits."""
    workers: int | None = None
    """Threads; none for one per core."""
    out: str | None = None
    """Run folder; none for runs/lambda_sweep-DATA-HASH."""


PRESETS = {
    "laptop": Config(),
    "paper": Config(ks=(8, 16, 32, 64, 128), lambdas=tuple(float(f"{x:.3g}") for x in np.geomspace(1e-3, 1e4, 85))),
}


def main(config: Config) -> None:
    """Run the sweep of a configuration.

    Raises:
        InputError: bad settings or data, before any long work.
    """
    _check_settings(config)
    data = load_together(config.data, image_size=config.image_size, seed=config.seed)
    _check_ks(config, math.prod(data.image_shape), "number of pixel values")
    split = validation_split(data, config.validation_fraction, config.seed)
    q = data.num_classes
    fitted = ma.Moments.from_arrays(split.train_images, split.train_labels, num_classes=q)
    chosen_on = ma.Moments.from_arrays(split.test_images, split.test_labels, num_classes=q)
    test = ma.Moments.from_arrays(data.test_images, data.test_labels, num_classes=q, groups=config.groups)
    train = fitted.merge(chosen_on)
    problem = factorize(train, pixel_noise=config.pixel_noise)
    choice = factorize(fitted, pixel_noise=config.pixel_noise)
    _check_ks(config, min(problem.rank, choice.rank), "rank of these images")
    if (test.counts == 0).any():
        raise ma.InputError(f"--groups {config.groups}: {test.count} test images leave a group empty, give fewer")
    folder = RunFolder.open("lambda_sweep", config.data, config, config.out, ignore=("out", "workers"))
    validation = _sweep(config, fitted, chosen_on, choice, folder, "choice")
    result = _sweep(config, train, test, problem, folder, "test")
    spans = _spans(config, train, test, problem, result.lam.values, folder)
    result = result.assign({name: (("lam_relative", "k"), values) for name, values in spans.items()})
    result.attrs["r2_full_rank"] = float((problem.t0**2).sum() / np.trace(problem.syy))
    folder.save_dataset("trade_off", result.drop_vars("eval_influence"))
    # By group: any two cells can be compared later with the standard error of their difference.
    with atomic_path(folder.path / "influence.nc") as file:
        netcdf3_ready(result[["eval_influence"]]).to_netcdf(file, engine="scipy")
    rows = report_rows(result, validation, config.budget)
    folder.save_table("summary", rows)
    figures = [
        folder.save_figure("trade_off", trade_off_figure(result, config.budget)),
        folder.save_figure("against_lambda", lambda_figure(result)),
    ]
    head = (
        f"Lambda sweep on {data.name}: {train.count} training and {test.count} test images, rank {problem.rank}, "
        f"pixel noise {problem.pixel_noise:.3g}"
    )
    text = "\n".join(summarise(rows, config.budget, result.attrs["r2_full_rank"]))
    folder.summary(f"{head}\n\n{table_text(rows, config.budget)}\n\nFigures: {figures[0]}  {figures[1]}\n\n{text}")


def relative_grid(lambdas: tuple[float, ...]) -> list[float]:
    """The relative weights in ascending order with both ends, 0 (the limit 0+) and infinity.

    Example:
        >>> relative_grid((1.0, 0.1))
        [0.0, 0.1, 1.0, inf]
    """
    return sorted({0.0, *lambdas, math.inf})


def _sweep(
    config: Config, moments: ma.Moments, held_out: ma.Moments, problem: PrimalProblem, folder: RunFolder, name: str
) -> xr.Dataset:
    """Curves over lam_relative (the requested weights) and the chosen k."""
    relative = relative_grid(config.lambdas)
    unit = float(np.trace(problem.syy) / problem.s.sum())
    swept = ma.lambda_sweep(
        moments,
        [x * unit for x in relative],
        eval_moments=held_out,
        max_k=max(config.ks),
        pixel_noise=config.pixel_noise,
        run=ma.RunOptions(workers=config.workers, progress=True, store=folder.points / name),
    )
    named = swept.assign_coords(lam_relative=("lam", relative, swept.lam_relative.attrs))
    return named.swap_dims(lam="lam_relative").sel(k=list(config.ks))


def _spans(
    config: Config,
    train: ma.Moments,
    test: ma.Moments,
    problem: PrimalProblem,
    lambdas: np.ndarray,
    folder: RunFolder,
) -> dict[str, np.ndarray]:
    """What needs the encoders themselves, [lambdas, ks] each.

    Returns:
        angle_median, angle_largest: principal angles to PCA at the same k, degrees. eval_reconstruction_mse: of a
        decoder fitted on training images, squared pixel units, measurement noise included as in reconstruction_mse.
    """
    settings = {"ks": config.ks, "pixel_noise": problem.pixel_noise}
    store = PointStore(folder.points / "spans", fingerprint([*train.state, *test.state], settings))
    held = test.about(problem.mean_x, problem.mean_y).sxx + problem.pixel_noise * np.eye(train.num_pixels)

    most = max(config.ks)
    pca = feature_basis(problem, supervised_solution(problem, math.inf, most).encoder)
    found = []
    for lam in tqdm(lambdas.tolist(), desc="encoders", unit="lambda"):
        key = f"lam{lam!r}"
        arrays = store.load(key)
        if arrays is None:
            arrays = _at_lambda(supervised_solution(problem, lam, most), problem, pca, held, config.ks)
            store.save(key, arrays)
        found.append(arrays)
    return {name: np.stack([arrays[name] for arrays in found]) for name in found[0]}


def _at_lambda(
    closed: ma.LinearAutoencoder, problem: PrimalProblem, pca: np.ndarray, held: np.ndarray, ks: tuple[int, ...]
) -> dict[str, np.ndarray]:
    """One lambda of :func:`_spans`; the spans of all k are nested, so that one solution serves them all."""
    basis = feature_basis(problem, closed.encoder)
    angles = [np.degrees(principal_angles(pca[:, :k], basis[:, :k])) for k in ks]
    clean = CorruptionMoments(held, held, 1.0)
    errors = []
    with solve_context():
        for k in ks:
            v, z = jnp.asarray(closed.encoder[:, :k]), jnp.asarray(closed.decoder[:k])
            errors.append(float(denoising_loss(v, z, jnp.asarray(held), clean)))
    return {
        "angle_median": np.array([np.median(a) for a in angles]),
        "angle_largest": np.array([a[-1] for a in angles]),
        "eval_reconstruction_mse": np.array(errors),
    }


def _check_settings(config: Config) -> None:
    """Refuse numbers out of range before the data is read."""
    for lam in config.lambdas:
        if not lam >= 0:
            raise ma.InputError(f"--lambdas {lam:g}: give relative weights of at least 0")
    if not (math.isfinite(config.budget) and config.budget > 0):
        raise ma.InputError(f"--budget {config.budget:g}: give a percentage over 0")
    if config.groups < 2:
        raise ma.InputError(f"--groups {config.groups}: standard errors need at least 2")
    worker_count(config.workers)
    if len(set(config.ks)) < len(config.ks):
        raise ma.InputError(f"--ks {' '.join(map(str, config.ks))} repeats a value: give each once")


def _check_ks(config: Config, limit: int, what: str) -> None:
    """Refuse a k at which PCA leaves no error to trade."""
    for k in config.ks:
        if not 1 <= k < limit:
            raise ma.InputError(f"--ks {k}: give numbers of at least 1 below {limit}, the {what}")


if __name__ == "__main__":
    launch(main, Config, PRESETS)
