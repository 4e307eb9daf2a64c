"""When does an autoencoder learn what, and does the eigenvalue of a direction decide it or its frequency?

Paper: Fig. 1, bottom
Time: 4 minutes

"The bottom subspace is learned exponentially slower than the top" (Balestriero & LeCun, 2024): linear, MLP and
convolutional autoencoders are trained, and at log-spaced steps it is noted how much of each eigen-direction of the
training covariance is missing (1 untouched, 0 learned), per group of directions with a tenth of the variance each, per
band of spatial frequency, at low and high response frequencies, and how well a linear probe reads the code. Half-times
against eigenvalues are fitted by a power law and by exponential laws; directions that are not learned in time are
censored. For gradient descent on the linear network the gradient flow from the same start is the reference, where it
takes less than about an hour: not in the paper preset.

Is it only the frequency principle? Two frequencies are told apart: *spatial* frequency of image content
(:mod:`mae_align.data.frequency`) and *response* frequency of the map (:mod:`experiments.learning_dynamics.response`).
And since eigenvalue and spatial frequency go together in natural images, they are set apart by intervention: the first
directions as they are (top), with one eigenvalue for all (whitened), in reverse order (reversed) and dealt out at
random (permuted), pixels rotated at random (rotated) and moved about (shuffled). Rank correlations of half-times, one
given the other, say which of the two decides.

    python -m experiments.learning_dynamics                                         # digits
    python -m experiments.learning_dynamics --preset fashion_mnist --data idx:DIR
    python -m experiments.learning_dynamics --preset cifar10 --data npz:FILE        # at 16 x 16 pixels
    python -m experiments.learning_dynamics --preset paper --data npz:FILE          # accelerators: 50 epochs

Expected: half-time ~ eigenvalue^-a, with a = 1 in closed form for gradient descent on a linear network from an aligned
start, and near it otherwise; an exponential in the rank is the same law where eigenvalues fall exponentially with the
rank. The autoencoders have neither batch normalisation nor a sigmoid, which published ones have.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Annotated

import numpy as np
import pandas as pd

import mae_align as ma
from experiments.harness.cli import launch_experiment
from experiments.harness.config import Bounds, Count, RunConfig, Seeds
from experiments.harness.data import Split
from experiments.harness.run import Run
from experiments.harness.train import milestones
from experiments.learning_dynamics import figures
from experiments.learning_dynamics.analysis import Cell, Row, analyse, as_dataset, cell_row, half_time_rows, order_rows
from experiments.learning_dynamics.learners import (
    Descent,
    Learner,
    Schedule,
    Sizes,
    make_training,
    num_steps,
    rate_factor,
)
from experiments.learning_dynamics.linear_flow import flow_cost, flow_half_times
from experiments.learning_dynamics.scene import Arrays, Scene, look, make_scene
from experiments.learning_dynamics.spectrum import Images, Spectrum, image_map
from mae_align.train.ensemble import Training, TrainState

# Multiply-adds of the largest gradient flow that is integrated: an hour on two cores.
_LARGEST_FLOW = 1e14


@dataclasses.dataclass(frozen=True)
class Config(RunConfig):
    """Settings of the experiment."""

    learners: Annotated[tuple[Learner, ...], Bounds(unique=True)] = (
        Learner.linear_descent,
        Learner.linear_adamw,
        Learner.mlp_momentum,
        Learner.mlp_adamw,
        Learner.conv_adamw,
    )
    """Networks and rules on the original images. Linear networks start small and balanced."""
    intervened: Annotated[tuple[Learner, ...], Bounds(unique=True)] = (Learner.mlp_adamw, Learner.conv_adamw)
    """Networks and rules on changed images."""
    interventions: Annotated[tuple[Images, ...], Bounds(unique=True)] = tuple(Images)[1:]
    """What is made of the images; those on the spectrum keep as many directions as the code has numbers."""
    seeds: Seeds = (0, 1, 2)
    """Seeds of the networks; trained together."""
    latent: Annotated[int, Bounds(least=4)] = 64
    """Size of the code, and number of directions that are followed."""
    network: Sizes = dataclasses.field(default_factory=Sizes)
    """The networks."""
    training: Descent = dataclasses.field(default_factory=Descent)
    """Their training."""
    evaluations: Annotated[int, Bounds(least=4)] = 24
    """Steps to look at after the start, spaced evenly on a logarithmic axis."""
    looked_at: Annotated[int, Bounds(least=40)] = 800
    """Most training images, and most test images, to look at; probes are fitted on the former, tested on the latter."""
    bands: Count = 6
    """Bands of spatial frequency."""
    response_points: Annotated[int, Bounds(least=3)] = 400
    """Images between which the map is filtered."""
    response_widths: Annotated[tuple[float, ...], Bounds(above=0, unique=True)] = (0.25, 0.35, 0.5)
    """Widths of the response filter, in root median squared distances of two images."""
    resamples: Annotated[int, Bounds(least=20)] = 500
    """Bootstrap samples of seeds and directions."""


_REAL = Config(max_train=10_000)
PRESETS = {
    "laptop": Config(
        latent=24, network=Sizes(mlp_widths=(64,)), training=Descent(steps=1500, descent_steps=2000, conv_steps=1000)
    ),
    "fashion_mnist": _REAL,
    "cifar10": dataclasses.replace(_REAL, image_size=16),
    "paper": Config(
        seeds=(0, 1, 2, 3, 4),
        latent=512,
        network=Sizes(mlp_widths=(2432, 1792, 1152), conv_widths=(32, 152, 272, 392, 512)),
        training=Descent(
            batch_size=256, steps=9750, descent_steps=50_000, conv_steps=9750, schedule=Schedule.one_cycle
        ),
        evaluations=60,
        looked_at=5000,
        response_points=2000,
    ),
}
COLUMNS = {
    "images": "what was made of the images",
    "learner": "network and rule of descent",
    "cell": "what was made of the images; network and rule of descent",
    "seed": "of the network",
    "record": "number of the look",
    "step": "steps of training",
    "direction": "rank of an eigen-direction by its eigenvalue",
    "group": "tenth of the variance, from the first directions on",
    "band": "radial band of spatial frequency, low to high",
    "width": "of the response filter [root median squared distances of two images]",
    "train_loss": "mean squared error of looked-at training images [variance of a pixel]",
    "test_loss": "mean squared error of test images [variance of a pixel]",
    "test_accuracy": "test accuracy of a ridge probe on the code [share]",
    "residual": "missing share of a direction's energy, training images",
    "test_residual": "missing share of a direction's energy, test images",
    "group_residual": "missing share of the energy of a group of directions, training images",
    "band_error": "missing share of the energy of a band of spatial frequency, test images",
    "response_low_error": "squared relative error of the low response frequencies of the map, test images",
    "response_high_error": "squared relative error of the high response frequencies of the map, test images",
    "half_time": "step at which half is learned; where censored, the last step",
    "censored": "whether not half learned; in orders.csv the number of such networks",
    "test_half_time": "half_time by test images [steps]",
    "test_censored": "whether not half learned by test images",
    "flow_half_time": "half_time of the gradient flow from the same start [steps]",
    "exponent": "a of half-time ~ eigenvalue^-a, censored regression",
    "exponent_*": "end of the 95% bootstrap interval of the exponent over seeds and directions",
    "r2_*": "1 - residual variance over that without slope, of a law for log half-time",
    "aic_gain": "AIC of the better exponential law minus that of the power law",
    "aic_gain_*": "end of the 95% bootstrap interval of aic_gain",
    "aic_*": "AIC of a law for log half-time",
    "sigma_*": "standard deviation of log half-time about a law",
    "slope_*": "slope of log half-time under a law",
    "resamples": "bootstrap samples in which all laws could be fitted",
    "flow_exponent": "exponent of the gradient flow from the same start",
    "flow_ratio_median": "median half-time over that of the gradient flow",
    "flow_ratio_spread": "largest factor between flow_ratio_median and the ratio of a direction",
    "eigenvalue": "variance along a direction [variance of a pixel]",
    "frequency": "mean spatial frequency of a direction [cycles per pixel]",
    "rho_between": "rank correlation of eigenvalue and frequency over directions",
    "rho_eigenvalue": "rank correlation of half-time and eigenvalue",
    "rho_frequency": "rank correlation of half-time and frequency",
    "rho_eigenvalue_given": "rank correlation of half-time and eigenvalue, the frequency held fixed",
    "rho_frequency_given": "rank correlation of half-time and frequency, the eigenvalue held fixed",
    "rho_*": "end of the 95% bootstrap interval of a rank correlation over directions",
    "directions": "directions that are followed",
    "num_censored": "directions that are not half learned, mean over seeds",
    "latest_over_earliest": "latest over earliest half-time, geometric means over seeds",
    "beyond_residual": "mean residual after training of the directions beyond the code's number",
    "beyond_half_learned": "share of the directions beyond the code's number that are half learned",
    "accuracy_before": "test accuracy of a ridge probe on the code before training [share]",
    "accuracy_after": "test accuracy of a ridge probe on the code after training [share]",
    "what": "group of directions, band of spatial frequency or part of the response frequencies",
    "low_share": "share of the images' energy in their low response frequencies",
    "seeds": "networks",
}


def main(config: Config, run: Run[Split]) -> None:
    """Train, look, fit and compare."""
    data, latent = run.data, config.latent
    spectrum = Spectrum.of(ma.Moments.from_arrays(data.train_images))
    if latent > spectrum.rank:
        raise ma.InputError(f"--latent {latent}: these images vary in {spectrum.rank} directions, give at most that")
    if config.training.batch_size > len(data.train_labels):
        raise ma.InputError(
            f"--training.batch-size {config.training.batch_size}: there are {len(data.train_labels)} training images, "
            "give a smaller batch"
        )
    todo = {f"{i.value}-{x.value}": (i, x) for i, x in cells(config)}
    # Refuses sizes that do not fit before anything is trained.
    trainings = {
        x: make_training(x, config.network, latent, config.training, data.image_shape, len(config.seeds))
        for _, x in todo.values()
    }

    @functools.lru_cache(maxsize=1)
    def scene(images: Images) -> Scene:
        return make_scene(
            data,
            image_map(images, spectrum, latent, config.seed),
            seen=config.looked_at,
            response_points=config.response_points,
            widths=config.response_widths,
            seed=config.seed,
        )

    def measure(key: str, cell: tuple[Images, Learner]) -> Cell:
        images, learner = cell
        found = run.arrays(key, lambda: follow(run, key, config, learner, trainings[learner], scene(images)))
        return analyse(images, learner, found, resamples=config.resamples, seed=config.seed)

    report(config, run, list(run.each(todo, measure).values()))


def cells(config: Config) -> list[tuple[Images, Learner]]:
    """What is trained: all learners on the original images, some on changed ones.

    A rotation leaves a convolution nothing to slide over: that pair is left out.
    """
    found = [(Images.original, learner) for learner in config.learners]
    found += itertools.product([i for i in config.interventions if i is not Images.original], config.intervened)
    return [(i, x) for i, x in dict.fromkeys(found) if not (i is Images.rotated and x.is_convolution)]


def follow(run: Run[Split], key: str, config: Config, learner: Learner, training: Training, scene: Scene) -> Arrays:
    """Train the networks of a cell and look at them at log-spaced steps.

    Args:
        run: where they are trained.
        key: of the cell.
        config: of the experiment.
        learner: of the networks.
        training: its programs.
        scene: what they learn.

    Returns:
        What :func:`look` notes, [E, T, ...]; steps [T]; eigenvalue, frequency [m] of the followed directions;
        data_energy [r] of what was looked at; low_share [w]. For a linear network under descent also flow_half_time
        [E, m] of the gradient flow from its own start, where this takes fewer than 1e14 multiply-adds (an hour).
    """
    steps = milestones(num_steps(learner, config.training), config.evaluations)
    rate, members = rate_factor(learner, config.training, scene.spectrum), len(config.seeds)
    followed = min(config.latent, scene.spectrum.rank)

    def start() -> TrainState:
        return training.init(config.seeds, learning_rates=[rate] * members)

    found = {
        "steps": np.array(steps),
        "eigenvalue": scene.spectrum.values[:followed],
        "frequency": scene.mean_frequency[:followed],
        "data_energy": scene.seen_energy,
        "low_share": scene.filter.low_share(scene.points),
    }
    if learner is Learner.linear_descent:
        of, rank = config.training, scene.spectrum.rank
        if flow_cost(of.descent_rate, of.descent_steps, config.latent, rank, members) < _LARGEST_FLOW:
            flow = run.arrays(
                f"{key}-flow",
                lambda: {"time": flow_half_times(training, start(), scene.spectrum, np.array(steps), rate)},
            )
            found["flow_half_time"] = flow["time"][:, :followed]
    looks = run.train_at(
        key,
        training,
        start,
        lambda: training.put(scene.images),
        steps,
        lambda state, step: look(training, state, step, scene, followed, config.bands),
    )
    return found | {name: np.ascontiguousarray(np.moveaxis(array, 0, 1)) for name, array in looks.items()}


def report(config: Config, run: Run[Split], found: Sequence[Cell]) -> None:
    """Write tables and figures, and say what came out."""
    run.dataset("dynamics", as_dataset(found, config.seeds, config.response_widths))
    run.table("half_times", [row for cell in found for row in half_time_rows(cell, config.seeds)])
    run.table("orders", [row for cell in found for row in order_rows(cell, config.response_widths)])
    run.table("cells", [cell_row(cell) for cell in found], show=shown(found))
    plain = [cell for cell in found if cell.images is Images.original]
    apart = {cell.learner for cell in found if cell.images is not Images.original}
    ranked = [cell for cell in found if cell.ranks is not None]
    title = run.data.description
    if plain:
        run.figure("residuals", figures.residual_figure(plain, title))
        run.figure("spectra", figures.spectrum_figure(plain, len(plain[0].arrays["eigenvalue"]), title))
        run.figure("half_times", figures.half_time_figure(plain, title))
        run.figure("groups", figures.groups_figure(plain, title))
        run.figure("frequency", figures.frequency_figure(plain, config.response_widths, title))
    if apart:
        run.figure("interventions", figures.intervention_figure([c for c in found if c.learner in apart], title))
    if ranked:
        run.figure("set_apart", figures.set_apart_figure(ranked, title))
    run.verdict(*sentences(found))


def shown(found: Sequence[Cell]) -> pd.DataFrame:
    """The laws and correlations of all cells for the summary."""
    rows = []
    for cell in found:
        row: Row = {"images": cell.images.value, "learner": cell.learner.value}
        if cell.laws is not None:
            laws = cell.laws
            row |= {"a": f"{laws.exponent:.2f} ({laws.low:.2f}, {laws.high:.2f})"}
            row |= {f"R2 {law.name}": f"{fits.r2[0]:.3f}" for law, fits in laws.fits.items()}
            row |= {"AIC gain": f"{laws.aic_gain:+.0f} ({laws.gain_low:+.0f}, {laws.gain_high:+.0f})"}
        row["not half learned"] = f"{cell.seen.censored.sum(1).mean():.3g} of {len(cell.arrays['eigenvalue'])}"
        if cell.ranks is not None:
            for name in ("eigenvalue_given", "frequency_given"):
                value, low, high = getattr(cell.ranks, name)
                text = f"{value:+.2f} ({low:+.2f}, {high:+.2f})"
                row[name.replace("_given", ", other fixed")] = text if np.isfinite(value) else None
        rows.append(row)
    return pd.DataFrame(rows)


def sentences(found: Sequence[Cell]) -> Iterator[str]:
    """What came out: the law, what decides, and what lies beyond the code."""
    plain = [cell for cell in found if cell.images is Images.original]
    laws = [cell.laws for cell in plain if cell.laws is not None]
    if laws:
        exponents, better = [law.exponent for law in laws], sum(law.gain_low > 0 for law in laws)
        yield (
            f"On the original images half-time ~ eigenvalue^-a with a from {min(exponents):.2f} to "
            f"{max(exponents):.2f}, detectably better than both exponential laws for {better} of {len(laws)} learners."
        )
    apart = [cell.ranks for cell in found if cell.images is not Images.original and cell.ranks is not None]
    if apart:
        by_value = [r.eigenvalue_given for r in apart if np.isfinite(r.eigenvalue_given[0])]
        by_frequency = [r.frequency_given for r in apart if np.isfinite(r.frequency_given[0])]
        yield (
            f"On changed images half-times detectably follow the eigenvalue, the frequency held fixed, in "
            f"{_sure(by_value)} of {len(by_value)} cells, and the frequency, the eigenvalue held fixed, in "
            f"{_sure(by_frequency)} of {len(by_frequency)}."
        )
    rows = [row for row in map(cell_row, plain) if "beyond_residual" in row]
    if rows:
        yield (
            f"Beyond the code's {rows[0]['directions']} directions at most "
            f"{100 * max(row['beyond_half_learned'] for row in rows):.0f}% are half learned; residuals there end at "
            f"{min(row['beyond_residual'] for row in rows):.2f} to {max(row['beyond_residual'] for row in rows):.2f}."
        )


def _sure(correlations: Sequence[tuple[float, float, float]]) -> int:
    """How many intervals leave out 0."""
    return sum(low > 0 or high < 0 for _, low, high in correlations)


if __name__ == "__main__":
    launch_experiment(main, Config, PRESETS, COLUMNS)
