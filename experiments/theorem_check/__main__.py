"""Do the closed forms hold? Theorems 1 and 3 against gradient descent on real images.

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
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

import mae_align as ma
from experiments.harness.cli import launch
from experiments.harness.data import load_together
from experiments.harness.folder import RunFolder
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
from experiments.theorem_check.report import (
    Arrays,
    Case,
    Part,
    as_dataset,
    excess_figure,
    summarise,
    table_text,
    verdict,
)
from mae_align.closed_form.factorize import PrimalProblem, factorize
from mae_align.closed_form.features import clean_images
from mae_align.corruption import Corruption
from mae_align.data.patches import patch_grid
from mae_align.runtime.devices import solve_context
from mae_align.runtime.files import PointStore, fingerprint

# Batches over which the sampled loss of the closed form is averaged.
_LOSS_BATCHES = 400


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of the theorem check."""

    data: str = "digits"
    """Data set: digits, idx:DIR, npz:FILE, folder:DIR, tfds:NAME or prepared:DIR."""
    image_size: int | None = None
    """Resize images to squares of this side, in pixels; none keeps them."""
    ks: tuple[int, ...] = (3, 16)
    """Numbers of features of the autoencoders."""
    lambdas: tuple[float, ...] = (0.0, 0.1, 1.0, 10.0)
    """Weights of reconstruction in Theorem 1, relative: lambda tr Sxx / tr Syy. Finite, at least 0."""
    patch_size: int = 3
    """Side of the masked patches in pixels; it need not divide the side of the images."""
    mask_ratio: float = 0.75
    """Share of masked patches, between 0 and 1, ends excluded."""
    sigma: float = 1.0
    """Standard deviation of the Gaussian noise in root mean square deviations of a pixel from its mean; over 0."""
    seeds: int = 3
    """Random starts of every exact case."""
    steps: int = 3000
    """Steps of Adam on the exact loss."""
    learning_rate: float = 0.03
    """First learning rate on the exact loss (in whitened coordinates, without units)."""
    sampled_seeds: int = 2
    """Random starts of every sampled case, each with corruptions of its own."""
    sampled_steps: int = 2000
    """Steps of Adam on sampled corruptions."""
    sampled_learning_rate: float = 0.01
    """First learning rate on sampled corruptions."""
    batch_size: int = 512
    """Images per step on sampled corruptions."""
    exact_tolerance: float = 1e-6
    """Largest relative excess over the closed-form minimum that passes, exact loss."""
    sampled_tolerance: float = 1e-3
    """The same after training on sampled corruptions."""
    seed: int = 0
    """Of the starts, the corruptions and the noise level of each pixel."""
    out: str | None = None
    """Run folder; none for runs/theorem_check-DATA-HASH."""


PRESETS = {
    "laptop": Config(),
    "paper": Config(ks=(3, 16, 64), patch_size=4, steps=5000, sampled_steps=10000, batch_size=2048, seeds=5),
}


class Setup(NamedTuple):
    """What all cases share."""

    config: Config
    data: ma.ImageDataset
    moments: ma.Moments
    problem: PrimalProblem

    @property
    def exact_plan(self) -> Plan:
        """The descent on exact losses."""
        c = self.config
        return Plan(c.seeds, c.steps, c.learning_rate, c.seed)

    @property
    def sampled_plan(self) -> Plan:
        """The descent on sampled corruptions."""
        c = self.config
        return Plan(c.sampled_seeds, c.sampled_steps, c.sampled_learning_rate, c.seed)


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
    config, plan = setup.config, setup.sampled_plan
    pixels = Pixels.of(setup.data.train_images, setup.problem)
    closed = ma.denoising_autoencoder(setup.moments, corruption, k)
    objective = _denoising_objective(setup, corruption)
    shares = minimise_sampled(objective, corruption, pixels, k, config.batch_size, plan)
    mean, se = sampled_loss(Network.of(closed), corruption, pixels, config.batch_size, _LOSS_BATCHES, plan)
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
    exact, sampled = config.exact_tolerance, config.sampled_tolerance
    found = [
        Case(Part.supervised, f"lambda = {x:g}", k, exact, functools.partial(check_supervised, setup, x, k))
        for x in config.lambdas
        for k in config.ks
    ]
    for part, limit, check in ((Part.denoising, exact, check_denoising), (Part.sampled, sampled, check_sampled)):
        for name, noise in corrupted.items():
            found += [Case(part, name, k, limit, functools.partial(check, setup, noise, k)) for k in config.ks]
    return found


def main(config: Config) -> None:
    """Run all checks of a configuration.

    Raises:
        InputError: bad settings or data, before any long work.
        SystemExit: status 1 if a check fails.
    """
    _check_settings(config)
    data = load_together(config.data, image_size=config.image_size, seed=config.seed)
    patch_grid(data.image_shape, config.patch_size)
    moments = ma.Moments.from_arrays(data.train_images, data.train_labels, num_classes=data.num_classes)
    setup = Setup(config, data, moments, factorize(moments))
    for k in config.ks:
        if not 1 <= k <= setup.problem.rank:
            raise ma.InputError(f"--ks {k}: give numbers from 1 to {setup.problem.rank}, the rank of these images")
    todo = cases(setup)
    folder = RunFolder.open("theorem_check", config.data, config, config.out)
    store = PointStore(folder.points, fingerprint(moments.state, {}))
    solved = []
    for i, case in enumerate(tqdm(todo, desc="theorem check", unit="case")):
        found = store.load(f"case{i}")
        if found is None:
            found = case.solve()
            store.save(f"case{i}", found)
        solved.append((case, found))
    rows = [verdict(case, found) for case, found in solved]
    folder.save_dataset("exact", as_dataset(solved, (Part.supervised, Part.denoising)))
    folder.save_dataset("sampled", as_dataset(solved, (Part.sampled,)))
    folder.save_table("checks", rows)
    figure = folder.save_figure("excess", excess_figure(solved))
    h, w, c = data.image_shape
    folder.summary(
        f"Theorem check on {data.name}: {len(data.train_images)} images of {h}x{w}x{c}, rank {setup.problem.rank}\n\n"
        f"{table_text(rows)}\n\nFigure: {figure}\n\n{summarise(rows)}"
    )
    if not all(row["passed"] for row in rows):
        raise SystemExit(1)


def _check_settings(config: Config) -> None:
    """Refuse numbers out of range."""
    for lam in config.lambdas:
        if not (math.isfinite(lam) and lam >= 0):
            raise ma.InputError(f"--lambdas {lam:g}: give finite weights of at least 0")
    if not 0 < config.mask_ratio < 1:
        raise ma.InputError(f"--mask-ratio {config.mask_ratio:g}: give a share between 0 and 1, ends excluded")
    if config.seed < 0:
        raise ma.InputError(f"--seed {config.seed}: give a whole number of at least 0")
    names = ("ks", "lambdas")
    for name in names:
        values = getattr(config, name)
        if len(set(values)) < len(values):
            raise ma.InputError(f"--{name} {' '.join(map(str, values))} repeats a value: give each once")
    positive = ("seeds", "steps", "learning_rate", "sampled_seeds", "sampled_steps", "sampled_learning_rate")
    for name in (*positive, "batch_size", "sigma", "exact_tolerance", "sampled_tolerance"):
        value = getattr(config, name)
        if not (math.isfinite(value) and value > 0):
            raise ma.InputError(f"--{name.replace('_', '-')} {value}: give a number over 0")


if __name__ == "__main__":
    launch(main, Config, PRESETS)
