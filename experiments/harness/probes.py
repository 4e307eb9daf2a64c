"""Probes on the trained networks and on everything they are to be read beside, and networks trained with labels."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from tqdm import tqdm

from experiments.harness.folder import Parts
from experiments.harness.measures import Measured
from experiments.harness.report import (
    FINE_TUNED,
    FROM_SCRATCH,
    NETWORK,
    RAW,
    SUPERVISED,
    UNTRAINED,
    Score,
    components,
)
from experiments.harness.train_common import End, LabelledSplit, Probe, Run, TrainConfig
from experiments.harness.train_loop import FEATURE_BATCH, Ensemble, Problem, initial, make_training, train, with_encoder
from mae_align.models import Classifier
from mae_align.probes import Rows, knn_probe, logistic_probe, mlp_probe, principal_components, raw_pixels, ridge_probe
from mae_align.runtime.errors import InputError
from mae_align.train.ensemble import Training, classify
from mae_align.train.loop import Diverged

_PROBES = {Probe.ridge: ridge_probe, Probe.logistic: logistic_probe, Probe.knn: knn_probe, Probe.mlp: mlp_probe}


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Features of all parts of the data.

    Attributes:
        train, validation, test: [n, k] each.
    """

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray

    @classmethod
    def of(cls, encode: Callable[[np.ndarray], np.ndarray], split: LabelledSplit) -> Encoded:
        """Features by a function of images."""
        return cls(encode(split.train_images), encode(split.validation_images), encode(split.test_images))

    def member(self, index: int) -> Encoded:
        """Those of one network of features [E, n, k]."""
        return Encoded(self.train[index], self.validation[index], self.test[index])


@dataclasses.dataclass(frozen=True)
class Features:
    """One kind of features of one network.

    Attributes:
        name: kind. member: position of the network, -1 for none. encoded: gives them, computed when asked for.
        note: how they are taken, for the protocol; empty for as usual.
    """

    name: str
    member: int
    encoded: Callable[[], Encoded]
    note: str = ""

    @property
    def key(self) -> str:
        """As a part of a file name."""
        words = " ".join(part for part in (self.name, self.note) if part)
        return re.sub(r"\W+", "-", words) + (f"-{self.member}" if self.member >= 0 else "")


def probe_scores(
    config: TrainConfig, split: LabelledSplit, kinds: Sequence[Features], parts: Parts, seed: int
) -> list[Score]:
    """Every probe on every kind of features; strengths are chosen on the validation images."""
    jobs = [(probe, features) for features in kinds for probe in config.probes]
    scores = []
    for probe, features in tqdm(jobs, desc="probes", unit="probe", disable=jax.process_index() > 0):

        def compute(probe: Probe = probe, features: Features = features) -> dict[str, Any]:
            encoded = features.encoded()
            result = _PROBES[probe](
                encoded.train,
                split.train_labels,
                encoded.test,
                split.test_labels,
                num_classes=split.num_classes,
                val=Rows(encoded.validation, split.validation_labels),
                seed=seed,
                features=features.name,
            )
            note = {"features_note": features.note} if features.note else {}
            return result.as_dict() | {"split": split.description} | note

        found = parts.once(f"probe-{features.key}-{probe.value}", compute)
        scores.append(Score(features.member, features.name, probe.value, found))
    return scores


def network_features(name: str, ensemble: Callable[[], Ensemble], split: LabelledSplit, members: Sequence[int]):
    """Features of given networks of an ensemble, all of which are computed together, once, when asked for."""

    @functools.cache
    def everything() -> Encoded:
        return Encoded.of(ensemble().features, split)

    return [Features(name, member, lambda i=i: everything().member(i)) for i, member in enumerate(members)]


def plain_features(measured: Measured, count: int) -> list[Features]:
    """Raw pixels and the first ``count`` principal components."""
    split, pool = measured.split, measured.pool
    count = min(count, math.prod(pool(split.train_images[:1]).shape[1:]))
    return [
        Features(RAW + measured.note, -1, lambda: Encoded.of(lambda x: raw_pixels(pool(x)), split)),
        Features(
            components(count) + measured.note,
            -1,
            lambda: Encoded.of(lambda x: principal_components(measured.train, pool(x), count), split),
        ),
    ]


@dataclasses.dataclass(frozen=True)
class EndTraining:
    """Networks trained with labels: for each of some members, one with each learning rate.

    Attributes:
        scores: of the best learning rate of each member, on validation images. ensemble: all networks.
        best: position in it of the best one of each member.
    """

    scores: list[Score]
    ensemble: Ensemble
    best: list[int]


def end_trainings(config: TrainConfig, split: LabelledSplit, problem: Problem) -> dict[End, Training]:
    """The programs of the ends that are wanted; nothing is compiled yet.

    One network for each learning rate and, from scratch, each seed; fine-tuned, each seed at each guidance weight. Both
    share their programs where they have equally many networks. Warm-up is no more than a quarter of the epochs.

    Raises:
        InputError: numbers of networks or images that the mesh does not divide.
    """

    def make_model(rngs: nnx.Rngs) -> Classifier:
        return Classifier(problem.make_autoencoder(rngs), split.num_classes, rngs=rngs)

    @functools.cache
    def programs(count: int) -> Training:
        rates = [rate for _ in range(count) for rate in config.end_learning_rates]
        warmup = min(config.warmup_epochs, config.end_epochs / 4)
        try:
            return make_training(config, split, make_model, classify, rates, config.end_epochs, warmup)
        except InputError as error:
            raise InputError(
                f"{error} (networks trained with labels: one for each --seeds and --end-learning-rates; --ends None "
                "trains none)"
            ) from None

    found = {}
    for end in config.ends or ():
        # A supervised network is one from scratch.
        kind = End.fine_tuning if end is End.fine_tuning else End.from_scratch
        tuned = end is End.fine_tuning
        found[kind] = programs(len({(run.seed, run.guidance if tuned else 0.0) for run in problem.runs}))
    return found


def train_end(
    end: End,
    config: TrainConfig,
    split: LabelledSplit,
    problem: Problem,
    pretrained: Ensemble,
    training: Training,
    members: Sequence[int],
    folder: Path,
    parts: Parts,
) -> EndTraining:
    """Train classifiers on the encoders of given members: fine-tuned where ``end`` says so, else from scratch.

    Raises:
        InputError, Preempted: as :func:`experiments.harness.train_loop.train`.
    """
    rates = config.end_learning_rates
    runs = [Run(problem.runs[m].seed, rate) for m in members for rate in rates]

    state = initial(training, runs, [run.learning_rate for run in runs])
    if end is End.fine_tuning:
        state = with_encoder(state, pretrained.state, problem.inside, [m for m in members for _ in rates])
    state = train(config, split, training, state, config.end_epochs, folder / end.value, parts.identity)
    ensemble = Ensemble(training, state)
    scores, best = [], []
    for i, member in enumerate(members):
        mine = range(i * len(rates), (i + 1) * len(rates))
        found = parts.once(f"{end.value}-{member}", lambda mine=mine: _best(ensemble, split, mine, runs, config))
        best.append(int(found.pop("position")))
        scores.append(Score(member, FINE_TUNED if end is End.fine_tuning else FROM_SCRATCH, "", found))
    return EndTraining(scores, ensemble, best)


def _best(
    ensemble: Ensemble, split: LabelledSplit, positions: Sequence[int], runs: Sequence[Run], config: TrainConfig
) -> dict[str, Any]:
    """Accuracies of the network that is best on validation images, and how it was trained."""
    on_validation = {i: _accuracy(ensemble, i, split.validation_images, split.validation_labels) for i in positions}
    best = max(on_validation, key=lambda i: on_validation[i])
    return {
        "position": best,
        "accuracy_train": _accuracy(ensemble, best, split.train_images, split.train_labels),
        "accuracy_val": on_validation[best],
        "accuracy_test": _accuracy(ensemble, best, split.test_images, split.test_labels),
        "end_learning_rate": runs[best].learning_rate,
        "end_learning_rates_tried": " ".join(f"{rate:g}" for rate in config.end_learning_rates),
        "end_epochs": config.end_epochs,
        "selected_by": "accuracy",
        "n_train": len(split.train_labels),
        "n_val": len(split.validation_labels),
        "n_test": len(split.test_labels),
        "split": split.description,
    }


@jax.jit
def _classes(model: Classifier, images: jax.Array) -> jax.Array:
    return model.logits(images).argmax(1)


def _accuracy(ensemble: Ensemble, member: int, images: np.ndarray, labels: np.ndarray) -> float:
    model: Any = ensemble.training.model(ensemble.state, member)
    right = 0
    for start in range(0, len(images), FEATURE_BATCH):
        part = images[start : start + FEATURE_BATCH]
        rows = np.concatenate([part, np.repeat(part[:1], FEATURE_BATCH - len(part), axis=0)])
        found = np.asarray(_classes(model, rows.astype(np.float32)))[: len(part)]
        right += int((found == labels[start : start + len(part)]).sum())
    return right / len(images)


def all_scores(
    config: TrainConfig,
    measured: Measured,
    problem: Problem,
    trained: Ensemble,
    chosen: Callable[[Sequence[Score]], list[int]],
    trainings: Mapping[End, Training],
    folder: Path,
    parts: Parts,
) -> tuple[list[Score], list[Score], list[int]]:
    """Scores of all probes and of all ends, and the members that are reported on.

    Args:
        chosen: picks these members from the scores of the trained networks. trainings: of :func:`end_trainings`.
    """
    split, runs = measured.split, problem.runs
    latent = len(trained.features(split.test_images[:1])[0, 0])
    firsts = [i for i, run in enumerate(runs) if run.seed not in {other.seed for other in runs[:i]}]

    def untrained() -> Ensemble:
        state = initial(trained.training, runs, [run.learning_rate for run in runs])
        return Ensemble(trained.training, state)

    networks = network_features(NETWORK, lambda: trained, split, range(len(runs)))
    networks = [dataclasses.replace(features, note=trained.note) for features in networks]
    start = [f for f in network_features(UNTRAINED, untrained, split, range(len(runs))) if f.member in firsts]
    # By kind, so that only one ensemble's features are held at a time.
    scores = probe_scores(config, split, networks, parts, config.seed)
    reported = chosen(scores)
    for kinds in (plain_features(measured, latent), start):
        scores += probe_scores(config, split, kinds, parts, config.seed)
    ends: list[Score] = []
    wanted = config.ends or ()

    def train_one(end: End, members: Sequence[int]) -> EndTraining | None:
        """None, and a warning, where a network diverges: the report of what is finished is not lost with it."""
        try:
            return train_end(end, config, split, problem, trained, trainings[end], members, folder, parts)
        except Diverged as error:
            words = f"Left out: networks trained with labels ({end.value}): {error} Give smaller --end-learning-rates."
            warnings.warn(words, stacklevel=2)
            return None

    if End.fine_tuning in wanted and (tuned := train_one(End.fine_tuning, reported)) is not None:
        ends += tuned.scores
    if End.from_scratch in wanted or End.supervised in wanted:
        made = train_one(End.from_scratch, firsts)
        ends += made.scores if made is not None and End.from_scratch in wanted else []
        if made is not None and End.supervised in wanted:

            def supervised() -> Ensemble:
                return made.ensemble

            every = network_features(SUPERVISED, supervised, split, range(made.ensemble.training.num_members))
            kinds = [dataclasses.replace(every[i], member=member) for i, member in zip(made.best, firsts, strict=True)]
            scores += probe_scores(config, split, kinds, parts, config.seed)
    return scores, ends, reported
