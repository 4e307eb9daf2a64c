"""Do nonlinear encoders learn the principal subspace? Theorem 2 against trained networks.

Paper: Theorem 2
Time: 1.5 minutes

Theorem 2 of Balestriero & LeCun (2024), arXiv 2402.11337: a high-capacity encoder with a *linear* decoder is equivalent
to the linear autoencoder, always; with a nonlinear decoder, early in training. With unlimited capacity the codes of n
images are a free k x n matrix. For reconstruction alone (lambda = infinity) the best one is PCA's whatever the encoder,
and PCA's loss bounds that of every network with a linear decoder on its training images. At a finite lambda

    min over H, W, Z  E|W h - y|^2 / tr Syy + lambda E|Z h - x|^2 / tr Sxx

the best free code is PCA of (x, y) side by side, scaled alike, which is *not* Theorem 1's: a linear encoder must find y
in x. Both problems are solved here, and the networks are compared with each.

Encoders of one hidden layer of growing width are trained with a linear decoder (and a linear head where lambda is
finite) to convergence, and with a nonlinear decoder of the same width. At log-spaced steps: share of each principal
component's variance that the codes explain linearly (R^2), principal angles between the codes and the components in
the space of the images, and the loss of the best linear decoder. The largest angle says little: the last components
have nearly equal variance and mix with the next ones, so the median and R^2 per component are reported.

    python -m experiments.theorem2_check                                          # bundled digits
    python -m experiments.theorem2_check --preset fashion_mnist --data idx:DIR
    python -m experiments.theorem2_check --preset cifar10 --data npz:FILE
    python -m experiments.theorem2_check --preset paper --data npz:FILE           # accelerators
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import Annotated

import numpy as np
import pandas as pd

import mae_align as ma
from experiments.harness.cli import launch_experiment
from experiments.harness.config import Bounds, Counts, RunConfig, Seeds, Training
from experiments.harness.data import Split
from experiments.harness.run import Rows, Run
from experiments.harness.train import milestones
from experiments.theorem2_check.figures import component_figure, convergence_figure
from experiments.theorem2_check.networks import Case, Decoder, References, make_training, measure, start
from experiments.theorem2_check.tables import LEARNED, MOSTLY, course_table, end_table

# AdamW without weight decay: the loss with a linear decoder is to converge.
_TRAINING = Training(
    epochs=500,
    batch_size=128,
    learning_rate=2e-3,
    warmup_epochs=12.5,
    weight_decay=0.0,
    beta2=0.999,
    clip_norm=math.inf,
)


@dataclasses.dataclass(frozen=True)
class Config(RunConfig):
    """Settings of the experiment."""

    latent: Annotated[int, Bounds(least=2)] = 8
    """Size of the code, the number of components."""
    widths: Counts = (16, 64, 256)
    """Widths of the encoder's one hidden layer, networks for each; at least the code's size, which bounds its rank.

    Where --network.mlp-widths of other experiments are the layers of one network, each number here is another network.
    """
    lambdas: Annotated[tuple[float, ...], Bounds(above=0, unique=True, infinite=True)] = (math.inf, 1.0)
    """Relative weights of reconstruction with a linear decoder: lambda tr Sxx / tr Syy; infinity for it alone."""
    seeds: Seeds = (0, 1, 2)
    """Seeds of the networks; trained together."""
    training: Training = _TRAINING
    """Training of the networks; long enough that the loss with a linear decoder converges."""
    evaluations: Annotated[int, Bounds(least=2)] = 15
    """Steps after the start at which codes are measured, about: spaced evenly in the logarithm, the end among them."""
    early: Annotated[float, Bounds(above=0, below=1)] = 0.03
    """Share of the steps that counts as early."""

    def check(self) -> None:
        """Refuse a comparison without reconstruction alone, and layers narrower than the code."""
        super().check()
        if math.inf not in self.lambdas:
            raise ma.InputError("--lambdas: give inf, reconstruction alone, and finite weights beside it")
        if min(self.widths) < self.latent:
            raise ma.InputError(
                f"--widths {min(self.widths)}: a layer narrower than the code bounds its rank, give at least --latent "
                f"{self.latent}"
            )


# 6,000 steps of 256 of 10,000 images, 100 of them warm-up.
_REAL = Config(
    max_train=10_000,
    latent=16,
    widths=(32, 128, 512),
    training=dataclasses.replace(_TRAINING, epochs=154, batch_size=256, warmup_epochs=2.56),
)
PRESETS = {
    "laptop": Config(),
    "fashion_mnist": _REAL,
    "cifar10": dataclasses.replace(_REAL, image_size=16),
    # 200,000 steps of 1,024 of 40,000 images.
    "paper": Config(
        latent=512,
        widths=(1024, 4096, 16384),
        training=dataclasses.replace(_TRAINING, epochs=5_128, batch_size=1024, learning_rate=5e-4, warmup_epochs=2.56),
        evaluations=23,
    ),
}
COLUMNS = {
    "width": "of the hidden layer",
    "decoder": "linear, or nonlinear with a hidden layer of the same width",
    "lam": "relative weight of reconstruction beside labels",
    "seed": "of the network",
    "step": "steps of training",
    "rank": "of the codes on the training images; the least over seeds in end.csv",
    "codes_loss": "loss of the best linear decoder and head of the codes, training images [total variance]",
    "free_loss": "loss of the best free codes, training images [total variance]",
    "linear_loss": "loss of Theorem 1's linear encoder, training images [total variance]",
    "network_error": "squared error of the network's own decoder, training images [total variance]",
    "angle_median": "median principal angle of the codes and the first principal components [degrees]",
    "angle_largest": "largest principal angle of the codes and the first principal components [degrees]",
    "free_angle_median": "median principal angle of the codes and the best free codes [degrees]",
    "linear_angle_median": "median principal angle of the codes and Theorem 1's codes [degrees]",
    "r2_*": "share of the variance of a principal component that the codes explain linearly",
    "seeds": "networks",
    "excess": "codes_loss over free_loss, mean over seeds [%]",
    "excess_low": "least excess of a seed [%]",
    "excess_high": "largest excess of a seed [%]",
    "over_linear": "codes_loss over linear_loss, mean over seeds [%]",
    "linear_over_free": "linear_loss over free_loss [%]",
    "network_excess": "network_error over PCA's loss, reconstruction alone [%]",
    "learned": f"leading components with R2 of at least {LEARNED:g}, mean over seeds",
    "mostly": f"leading components with R2 of at least {MOSTLY:g}, mean over seeds",
    "least_r2": "least R2 of a component, mean over seeds",
    "moment": "start, early, nearest to PCA by the median angle, or end",
    "mean_r2": "R2, mean over components and seeds",
    "difference": "largest difference in R2 of a component from the network with the other decoder",
}


def main(config: Config, run: Run[Split]) -> None:
    """Train, measure, compare."""
    data = run.data
    steps = milestones(config.training.steps(len(data.train_labels)), config.evaluations)
    references = References.of(data.train_images, data.train_labels, data.classes, config.latent)
    cases = {case.key: case for case in plan(config)}
    # Refuses sizes that do not fit before anything is trained.
    trainings = {key: make_training(references, config.training, case) for key, case in cases.items()}
    at = {lam: references.at(lam) for lam in config.lambdas}

    def follow(case: Case) -> Rows:
        training = trainings[case.key]
        found = run.train_at(
            case.key,
            training,
            lambda: start(training, references, case),
            lambda: training.put(data.train_images, data.train_labels),
            steps,
            lambda state, _: measure(training, state, references, case, at),
        )
        rows: Rows = []
        for (t, step), (e, (lam, seed)) in itertools.product(enumerate(steps), enumerate(case.members)):
            row = {"width": case.width, "decoder": case.decoder.value, "lam": lam, "seed": seed, "step": step}
            row |= {"free_loss": at[lam].free_loss, "linear_loss": at[lam].linear_loss}
            row |= {name: array[t, e] for name, array in found.items() if name != "r2"}
            rows.append(row | {f"r2_{i + 1}": share for i, share in enumerate(found["r2"][t, e])})
        return rows

    frame = run.sweep(cases, follow, unit="ensemble")
    ends, course = end_table(frame), course_table(frame, config.early)
    run.table("networks", frame)
    run.table("end", ends, show=shown(ends))
    run.table("early", course, show=course.round(2))
    run.figure("components", component_figure(frame, config.early))
    run.figure("convergence", convergence_figure(frame))
    run.verdict(*sentences(ends, course, config.latent))


def plan(config: Config) -> Iterator[Case]:
    """The ensembles: each width with a linear decoder at every lambda, and with a nonlinear one for reconstruction."""
    for width in config.widths:
        yield Case(width, Decoder.linear, tuple(itertools.product(config.lambdas, config.seeds)))
        yield Case(width, Decoder.nonlinear, tuple((math.inf, seed) for seed in config.seeds))


def shown(ends: pd.DataFrame) -> pd.DataFrame:
    """The ends for the summary."""
    table = ends[["decoder", "lam", "width"]].copy()
    parts = zip(ends.excess, ends.excess_low, ends.excess_high, strict=True)
    table["over best free codes [%]"] = [f"{mean:+.2f} ({low:+.2f}, {high:+.2f})" for mean, low, high in parts]
    table["over Theorem 1 [%]"] = ends.over_linear.map("{:+.2f}".format)
    table["angle to PCA"] = ends.angle_median.round(1)
    table["to free codes"] = ends.free_angle_median.round(1)
    table["to Theorem 1's"] = ends.linear_angle_median.round(1)
    return table.assign(**{f"R2 >= {LEARNED:g}": ends.learned, f"R2 >= {MOSTLY:g}": ends.mostly})


def sentences(ends: pd.DataFrame, course: pd.DataFrame, k: int) -> Iterator[str]:
    """What came out: linear decoder, finite lambda, nonlinear decoder early and late."""
    linear = ends.loc[(ends.decoder == Decoder.linear.value) & np.isinf(ends.lam)]
    if len(linear):
        yield (
            f"Linear decoder, reconstruction alone: the loss ends at most {linear.excess.max():.2f}% over PCA's, its "
            f"lower bound, with median angles up to {linear.angle_median.max():.1f} degrees."
        )
    finite = ends.loc[~np.isinf(ends.lam)]
    if len(finite):
        widest = finite.loc[finite.width.idxmax()]
        yield (
            f"Linear decoder, lambda {widest.lam:g}: at width {widest.width} the loss ends {widest.excess:.2f}% over "
            f"that of free codes and {abs(widest.over_linear):.2f}% {'below' if widest.over_linear < 0 else 'above'} "
            "the minimum of Theorem 1."
        )
    nonlinear = course.loc[course.decoder == Decoder.nonlinear.value]
    if len(nonlinear):
        width = nonlinear.width.max()
        of = nonlinear.loc[nonlinear.width == width].set_index("moment")
        early, end = of.loc["early"], of.loc["end"]
        yield (
            f"Nonlinear decoder, width {width}: {early.mostly} of {k} leading components are explained to {MOSTLY:g} "
            f"early (step {early.step}) and {end.mostly} at the end."
        )


if __name__ == "__main__":
    launch_experiment(main, Config, PRESETS, COLUMNS)
