"""How much of the task does a little reconstruction error buy?

Paper: Theorem 1
Time: 30 seconds

Theorem 1 of Balestriero & LeCun (2024), arXiv 2402.11337: one linear encoder with a supervised head and, with weight
lambda, a reconstruction head. lambda -> infinity is PCA, lambda -> 0 is ordinary least squares (OLS; reduced-rank
regression, RRR, at k below the number of classes). In between lies the best possible trade-off of the two errors. For
chosen numbers of features k this reports, in-sample and on test images:

* the trade-off curve, and the r2 that 1% more reconstruction error than PCA's buys (the lambda that spends the 1% is
  found on the training images; the test images only measure);
* the lambda that is best on validation images, measured on the test images;
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
from typing import Annotated

import jax.numpy as jnp
import numpy as np
import xarray as xr

import mae_align as ma
from experiments.harness.cli import launch_experiment
from experiments.harness.config import Bounds, Counts, Groups, Positive, RunConfig, Task, Workers
from experiments.harness.data import Split, check_groups
from experiments.harness.run import Run
from experiments.lambda_sweep.report import lambda_figure, report_rows, shown, trade_off_figure, verdict
from mae_align.closed_form.autoencoder import denoising_loss, supervised_solution
from mae_align.closed_form.compare import principal_angles
from mae_align.closed_form.factorize import PrimalProblem, factorize
from mae_align.closed_form.features import feature_basis
from mae_align.corruption import CorruptionMoments
from mae_align.runtime.devices import solve_context


@dataclasses.dataclass(frozen=True)
class Config(RunConfig):
    """Settings of the lambda sweep."""

    TAKES = (Task.classes, Task.targets)

    ks: Counts = (4, 8, 16, 32)
    """Numbers of features; each below the rank of the images."""
    lambdas: Annotated[tuple[float, ...], Bounds(least=0, unique=True, infinite=True)] = tuple(
        float(f"{x:.3g}") for x in np.geomspace(1e-2, 1e3, 41)
    )
    """Weights of reconstruction, relative: lambda tr Sxx / tr Syy. The ends 0 and infinity are always added.

    Between two of them the trade-off curve is taken as straight, so that a coarse grid understates what a budget buys.
    """
    budget: Positive = 1.0
    """Extra reconstruction error whose worth in r2 is reported, in percent of PCA's error."""
    groups: Groups = 20
    """Groups of test images whose spread gives the standard errors."""
    pixel_noise: Annotated[float | None, Bounds(least=0)] = None
    """Variance of the measurement noise of a pixel; none: quantisation noise, 1/12 for 8-bit images."""
    workers: Workers = None
    """Threads; none for one per core."""


PRESETS = {
    "laptop": Config(),
    "paper": Config(ks=(8, 16, 32, 64, 128), lambdas=tuple(float(f"{x:.3g}") for x in np.geomspace(1e-3, 1e4, 85))),
}
_AT = {
    "budget": "where the budget of reconstruction error is spent",
    "zero": "at lambda -> 0+ (OLS, or RRR)",
    "best": "at best_lam_relative",
}
COLUMNS = {
    "k": "number of features",
    "lam": "weight of reconstruction",
    "angle_median": "median of the principal angles to PCA at the same k [degrees]",
    "angle_largest": "largest principal angle to PCA at the same k [degrees]",
    "eval_reconstruction_mse": "reconstruction error on test images, of a decoder fitted on training images "
    "[squared pixel values]",
    "r2_pca": "r2 of a linear probe on k principal components, in-sample",
    "eval_r2_pca": "r2 of a linear probe on k principal components, on test images",
    "best_lam_relative": "lambda tr Sxx / tr Syy that is best on validation images; inf is PCA",
    "shortfall": "in-sample r2 at lambda -> 0+ minus that of PCA",
    "angle_zero_to_pca": "largest angle between the spans at lambda -> 0+ and infinity [degrees]",
    "depends_on_lambda": "whether the encoder depends on lambda: whether there is a shortfall",
    **{
        f"{name}_{column}": f"{text}, {where}{unit}"
        for name, where in _AT.items()
        for column, text, unit in (
            ("excess_percent", "reconstruction error above PCA's on training images", " [%]"),
            ("eval_excess_percent", "reconstruction error above PCA's on test images", " [%]"),
            ("gain", "r2 minus that of PCA, in-sample", ""),
            ("eval_gain", "r2 minus that of PCA, on test images", ""),
            ("eval_gain_se", "standard error of eval_gain, paired over groups of test images", ""),
        )
    },
}


def main(config: Config, run: Run[Split]) -> None:
    """Sweep lambda, and say what a budget of reconstruction error buys.

    Raises:
        InputError: settings that do not fit the data, before any long work.
    """
    data = run.data
    _check_ks(config, math.prod(data.image_shape), "number of pixel values")
    check_groups(config.groups, len(data.test_labels))
    q = data.num_classes
    fitted, test = data.moments(groups=config.groups)
    chosen_on = ma.Moments.from_arrays(data.validation_images, data.validation_labels, num_classes=q)
    train = fitted if data.limited else fitted.merge(chosen_on)
    problem = factorize(train, pixel_noise=config.pixel_noise)
    choice = factorize(fitted, pixel_noise=config.pixel_noise)
    _check_ks(config, min(problem.rank, choice.rank), "rank of these images")
    validation = _sweep(config, fitted, chosen_on, choice, run, "choice")
    result = _sweep(config, train, test, problem, run, "test")
    spans = _spans(config, train, test, problem, result.lam.values, run)
    result = result.assign({name: (("lam_relative", "k"), values) for name, values in spans.items()})
    result.attrs["r2_full_rank"] = float((problem.t0**2).sum() / np.trace(problem.syy))
    run.dataset("trade_off", result.drop_vars("eval_influence"))
    # By group: any two cells can be compared later with the standard error of their difference.
    run.netcdf("influence", result[["eval_influence"]])
    rows = report_rows(result, validation, config.budget)
    run.table("summary", rows, show=shown(rows, config.budget))
    run.figure("trade_off", trade_off_figure(result, config.budget))
    run.figure("against_lambda", lambda_figure(result))
    run.notes.append(
        f"Rank {problem.rank}, pixel noise {problem.pixel_noise:.3g}; all pixels explain r2 "
        f"{result.attrs['r2_full_rank']:.4f} in-sample."
    )
    run.verdict(*verdict(rows, config.budget))


def relative_grid(lambdas: tuple[float, ...]) -> list[float]:
    """The relative weights in ascending order with both ends, 0 (the limit 0+) and infinity.

    Example:
        >>> relative_grid((1.0, 0.1))
        [0.0, 0.1, 1.0, inf]
    """
    return sorted({0.0, *lambdas, math.inf})


def _sweep(
    config: Config, moments: ma.Moments, held_out: ma.Moments, problem: PrimalProblem, run: Run[Split], name: str
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
        run=ma.RunOptions(workers=config.workers, progress=True, store=run.folder.points / name),
    )
    named = swept.assign_coords(lam_relative=("lam", relative, swept.lam_relative.attrs))
    return named.swap_dims(lam="lam_relative").sel(k=list(config.ks))


def _spans(
    config: Config,
    train: ma.Moments,
    test: ma.Moments,
    problem: PrimalProblem,
    lambdas: np.ndarray,
    run: Run[Split],
) -> dict[str, np.ndarray]:
    """What needs the encoders themselves, [lambdas, ks] each.

    Returns:
        angle_median, angle_largest: principal angles to PCA at the same k, degrees. eval_reconstruction_mse: of a
        decoder fitted on training images, squared pixel units, measurement noise included as in reconstruction_mse.
    """
    held = test.about(problem.mean_x, problem.mean_y).sxx + problem.pixel_noise * np.eye(train.num_pixels)
    most = max(config.ks)
    pca = feature_basis(problem, supervised_solution(problem, math.inf, most).encoder)
    found = run.each(
        {f"lam{lam!r}": lam for lam in lambdas.tolist()},
        lambda key, lam: run.arrays(
            key, lambda: _at_lambda(supervised_solution(problem, lam, most), problem, pca, held, config.ks)
        ),
        unit="lambda",
    )
    names = next(iter(found.values()))
    return {name: np.stack([arrays[name] for arrays in found.values()]) for name in names}


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


def _check_ks(config: Config, limit: int, what: str) -> None:
    """Refuse a k at which PCA leaves no error to trade."""
    for k in config.ks:
        if k >= limit:
            raise ma.InputError(f"--ks {k}: give numbers below {limit}, the {what}")


if __name__ == "__main__":
    launch_experiment(main, Config, PRESETS, COLUMNS)
