"""Do the closed forms hold? Theorems 1 and 3 against gradient descent on real images.

Paper: Theorems 1 and 3
Time: 1 minute

Theorem 1 (supervision + reconstruction) and Theorem 3 (denoising) of Balestriero & LeCun (2024), arXiv 2402.11337,
state the minimum of a non-convex loss. Here Optax looks for it, for every corruption of the package:

* exact: the expected loss, a function of the second moments, minimised in float64 from several random starts. Every
  start must end within 1e-6 of the closed-form minimum (relative excess), and none may fall below it.
* sampled: stochastic gradient descent on images that the corruption's own sampler corrupts afresh at every step. The
  exact expected loss of what was learned must lie within 1e-3 of the minimum. The closed-form autoencoder is applied to
  sampled corruptions as well: its mean loss must agree with the stated minimum within 4 standard errors.

Both use Adam with a cosine decay of the learning rate to 0, in coordinates in which the encoder's input has unit
covariance (V = L^-T a with the Cholesky factor E[x' x'^T] = L L^T; a linear change of variables, so that the loss has
the same minima and the descent needs thousands of steps instead of millions). Where the moments hold a pixel noise
floor (1/12 for 8-bit images) sampled images receive uniform noise of that variance.

    python -m experiments.theorem_check                                  # bundled digits: a minute on 2 CPU cores
    python -m experiments.theorem_check --preset paper --data idx:DIR    # Fashion-MNIST (d = 784): for an accelerator

Expected on the digits: all 28 cases pass; the exact ones end within 1e-14 of the minimum, the sampled ones within 4e-4
(k = 3: 1e-4), and no loss is below a minimum by more than 1e-14. On Fashion-MNIST an exact case at k = 16 also ends
within 1e-14 (one minute on 2 CPU cores). The exit status is 1 if a check fails. Interrupted, the same command goes on
where it stopped.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Annotated, NamedTuple

import numpy as np

import mae_align as ma
from experiments.harness.cli import launch_experiment
from experiments.harness.config import Bounds, Count, Counts, Positive, RunConfig, Task
from experiments.harness.data import Split
from experiments.harness.run import Run
from experiments.theorem_check.descent import (
    Network,
    Objective,
    Pixels,
    Plan,
    Share,
    denoising_share,
    minimise_exact,
    minimise_sampled,
    sampled_loss,
    supervised_share,
)
from experiments.theorem_check.report import Arrays, Case, Part, as_dataset, excess_figure, row_of, shown, verdict
from mae_align.closed_form.factorize import PrimalProblem, factorize
from mae_align.closed_form.features import clean_images
from mae_align.corruption import Corruption
from mae_align.data.patches import patch_grid
from mae_align.runtime.devices import solve_context

# Batches over which the sampled loss of the closed form is averaged.
_LOSS_BATCHES = 400


@dataclasses.dataclass(frozen=True)
class Descent:
    """Adam from several random starts, and what passes."""

    starts: Count = 3
    """Random starts of every case."""
    steps: Count = 3000
    """Steps of Adam."""
    learning_rate: Positive = 0.03
    """First learning rate (in whitened coordinates, without units); it decays to 0 along a cosine."""
    tolerance: Positive = 1e-6
    """Largest relative excess over the closed-form minimum that passes."""


@dataclasses.dataclass(frozen=True)
class SampledDescent(Descent):
    """Adam on sampled corruptions, each start with corruptions of its own."""

    batch_size: Count = 512
    """Images per step."""


@dataclasses.dataclass(frozen=True)
class Config(RunConfig):
    """Settings of the theorem check; the seed is also that of the starts, the corruptions and each pixel's noise."""

    TAKES = (Task.classes, Task.targets)

    ks: Counts = (3, 16)
    """Numbers of features of the autoencoders."""
    lambdas: Annotated[tuple[float, ...], Bounds(least=0, unique=True)] = (0.0, 0.1, 1.0, 10.0)
    """Weights of reconstruction in Theorem 1, relative: lambda tr Sxx / tr Syy. Finite, at least 0."""
    patch_size: Count = 3
    """Side of the masked patches in pixels; it need not divide the side of the images."""
    mask_ratio: Annotated[float, Bounds(above=0, below=1)] = 0.75
    """Share of masked patches, between 0 and 1, ends excluded."""
    sigma: Positive = 1.0
    """Standard deviation of the Gaussian noise in root mean square deviations of a pixel from its mean; over 0."""
    exact: Descent = Descent()
    sampled: SampledDescent = SampledDescent(starts=2, steps=2000, learning_rate=0.01, tolerance=1e-3)


PRESETS = {
    "laptop": Config(),
    "paper": Config(
        ks=(3, 16, 64),
        patch_size=4,
        exact=Descent(starts=5, steps=5000),
        sampled=SampledDescent(starts=2, steps=10000, learning_rate=0.01, tolerance=1e-3, batch_size=2048),
    ),
}
COLUMNS = {
    "part": "what is held against the closed form",
    "setting": "lambda tr Sxx / tr Syy, or the corruption",
    "k": "number of features",
    "case": "number of the case",
    "start": "number of the random start",
    "starts": "random starts",
    "step": "steps of Adam",
    "minimum": "closed-form minimum of the loss [squared pixel values; of Theorem 1 squared labels]",
    "excess": "expected loss over the closed-form minimum, relative; in checks.csv of the worst start at the end",
    "lowest": "lowest excess of any start at any step",
    "closed_form_error": "loss of the closed-form network itself over the stated minimum, relative",
    "tolerance": "largest excess that passes",
    "standard_errors": "mean loss of the closed form on sampled corruptions minus the minimum [standard errors]",
    "passed": "whether excess, lowest, closed_form_error and standard_errors are within their limits",
}


class Setup(NamedTuple):
    """What all cases share.

    Attributes:
        config: the settings. images: [n, h, w, c], what is fitted. moments: of them. problem: of the moments.
    """

    config: Config
    images: np.ndarray
    moments: ma.Moments
    problem: PrimalProblem

    @property
    def exact_plan(self) -> Plan:
        """The descent on exact losses."""
        return _plan(self.config.exact, self.config.seed)

    @property
    def sampled_plan(self) -> Plan:
        """The descent on sampled corruptions."""
        return _plan(self.config.sampled, self.config.seed)


def _plan(descent: Descent, seed: int) -> Plan:
    return Plan(descent.starts, descent.steps, descent.learning_rate, seed)


def check_supervised(setup: Setup, relative: float, k: int) -> Arrays:
    """Theorem 1 against Adam on the exact expected loss.

    Args:
        setup: the problem. relative: lambda tr Sxx / tr Syy. k: number of features.

    Returns:
        step [r]; excess [starts, r] relative to the minimum; minimum; total, the loss at V = 0; attained, the loss of
        the closed-form network itself.
    """
    problem = setup.problem
    lam = relative * float(np.trace(problem.syy)) / float(np.trace(problem.sxx))
    closed = ma.supervised_autoencoder(setup.moments, lam, k)
    objective = Objective.supervised(problem, setup.moments.sxy, lam)
    plan = setup.exact_plan
    shares = minimise_exact(objective, supervised_share, k, len(problem.syy), plan)
    return _outcome(plan, shares, objective, supervised_share, closed)


def check_denoising(setup: Setup, corruption: Corruption, k: int) -> Arrays:
    """Theorem 3 against Adam on the exact expected loss.

    Args:
        setup: the problem. corruption: of the input. k: number of features.

    Returns:
        As :func:`check_supervised`.
    """
    closed = ma.denoising_autoencoder(setup.moments, corruption, k)
    objective, plan = _denoising_objective(setup, corruption), setup.exact_plan
    return _outcome(plan, minimise_exact(objective, denoising_share, k, 0, plan), objective, denoising_share, closed)


def check_sampled(setup: Setup, corruption: Corruption, k: int) -> Arrays:
    """Theorem 3 against Adam on images that the corruption's own sampler corrupts.

    Args:
        setup: the problem. corruption: moments and sampler. k: number of features.

    Returns:
        As :func:`check_supervised`, the excess being that of the exact expected loss; and sampled_loss,
        sampled_loss_se: mean loss of the closed-form autoencoder on fresh draws, and its standard error.
    """
    batch_size, plan = setup.config.sampled.batch_size, setup.sampled_plan
    pixels = Pixels.of(setup.images, setup.problem)
    closed = ma.denoising_autoencoder(setup.moments, corruption, k)
    objective = _denoising_objective(setup, corruption)
    shares = minimise_sampled(objective, corruption, pixels, k, batch_size, plan)
    mean, se = sampled_loss(Network.of(closed), corruption, pixels, batch_size, _LOSS_BATCHES, plan)
    found = _outcome(plan, shares, objective, denoising_share, closed)
    return found | {"sampled_loss": np.array(mean), "sampled_loss_se": np.array(se)}


def _denoising_objective(setup: Setup, corruption: Corruption) -> Objective:
    moments = corruption.moments(clean_images(setup.problem))
    return Objective.denoising(setup.problem, setup.moments.sxy, moments)


def _outcome(
    plan: Plan, shares: np.ndarray, objective: Objective, share: Share, closed: ma.LinearAutoencoder
) -> Arrays:
    with solve_context():
        attained = float(share(Network.of(closed), objective)) * objective.total
    return {
        "step": np.array(plan.records),
        "excess": shares * objective.total / closed.loss - 1.0,
        "minimum": np.array(closed.loss),
        "total": np.array(objective.total),
        "attained": np.array(attained),
    }


def corruptions(setup: Setup) -> dict[str, Corruption]:
    """Every corruption of the package, by a name for tables."""
    config, shape = setup.config, setup.problem.image_shape
    size, ratio = config.patch_size, config.mask_ratio
    count = ma.FixedCountPatchMasking.from_ratio(size, ratio, shape)
    drawn = ma.RandomRatioMasking.from_ratio(size, ratio, shape)
    sigma = config.sigma * math.sqrt(float(np.trace(setup.problem.sxx)) / len(setup.problem.sxx))
    # From a quarter of sigma to four times it: noise that moves the encoder away from PCA.
    per_pixel = sigma * 4.0 ** np.random.default_rng(config.seed).uniform(-1.0, 1.0, shape)
    return {
        f"each patch dropped with p = {ratio:g}": ma.PatchMasking(size, ratio),
        f"{count.num_visible} of {math.prod(patch_grid(shape, size))} patches kept": count,
        f"p drawn from {drawn.low:g} to {drawn.high:g} per image": drawn,
        "Gaussian noise": ma.GaussianNoise(sigma),
        "Gaussian noise, sigma per pixel": ma.GaussianNoise(per_pixel),
    }


def cases(setup: Setup) -> list[Case]:
    """Everything that is checked, in the order of the table."""
    config, corrupted = setup.config, corruptions(setup)
    exact, sampled = config.exact.tolerance, config.sampled.tolerance
    found = [
        Case(Part.supervised, f"lambda = {x:g}", k, exact, functools.partial(check_supervised, setup, x, k))
        for x in config.lambdas
        for k in config.ks
    ]
    for part, limit, check in ((Part.denoising, exact, check_denoising), (Part.sampled, sampled, check_sampled)):
        for name, noise in corrupted.items():
            found += [Case(part, name, k, limit, functools.partial(check, setup, noise, k)) for k in config.ks]
    return found


def main(config: Config, run: Run[Split]) -> None:
    """Run all checks of a configuration.

    Raises:
        InputError: settings that do not fit the data, before any long work.
        SystemExit: status 1 if a check fails.
    """
    patch_grid(run.data.image_shape, config.patch_size)
    images, labels = run.data.refit()
    moments = ma.Moments.from_arrays(images, labels, num_classes=run.data.num_classes)
    setup = Setup(config, images, moments, factorize(moments))
    if max(config.ks) > setup.problem.rank:
        raise ma.InputError(
            f"--ks {max(config.ks)}: give numbers from 1 to {setup.problem.rank}, the rank of these images"
        )
    todo = {f"case{i}": case for i, case in enumerate(cases(setup))}
    found = run.each(todo, lambda key, case: run.arrays(key, case.solve), unit="case")
    solved = [(case, found[key]) for key, case in todo.items()]
    rows = [row_of(case, arrays) for case, arrays in solved]
    run.dataset("exact", as_dataset(solved, (Part.supervised, Part.denoising)))
    run.dataset("sampled", as_dataset(solved, (Part.sampled,)))
    run.table("checks", rows, show=shown(rows))
    run.figure("excess", excess_figure(solved))
    run.notes.append(f"Fitted on {len(images)} images of rank {setup.problem.rank}.")
    run.verdict(*verdict(rows))
    if not all(row["passed"] for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    launch_experiment(main, Config, PRESETS, COLUMNS)
