"""Probes on the features of trained networks and of everything they are to be read beside."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from experiments.harness.data import Split
from experiments.harness.ensembles import Ensemble, Probe
from experiments.harness.run import Rows, Run
from mae_align.metrics import rankme
from mae_align.moments.moments import Moments
from mae_align.probes import Rows as Labelled
from mae_align.probes import knn_probe, logistic_probe, mlp_probe, principal_components, raw_pixels, ridge_probe
from mae_align.train.ensemble import Training, TrainState

NETWORK = "trained network"
RAW = "raw pixels"
UNTRAINED = "untrained network"
SUPERVISED = "supervised network"
PREDICTED = "predicted"
_SCORES = ("accuracy_train", "accuracy_val", "accuracy_test", "r2_train", "r2_val", "r2_test")
PROBES = {Probe.ridge: ridge_probe, Probe.logistic: logistic_probe, Probe.knn: knn_probe, Probe.mlp: mlp_probe}


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Features of all parts of the data.

    Attributes:
        train: [n, k], or of several networks [E, n, k].
        validation: [v, k], likewise.
        test: [t, k], likewise.
    """

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray

    @classmethod
    def of(cls, encode: Callable[[np.ndarray], np.ndarray], split: Split) -> Encoded:
        """Features by a function of images."""
        return cls(encode(split.train_images), encode(split.validation_images), encode(split.test_images))

    def member(self, index: int) -> Encoded:
        """Those of one network of several."""
        return Encoded(self.train[index], self.validation[index], self.test[index])


@dataclasses.dataclass(frozen=True)
class Features:
    """One kind of features of one network.

    Attributes:
        name: kind.
        member: position of the network, -1 for none.
        encoded: gives them, computed when asked for.
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


def network_features(
    name: str, ensemble: Callable[[], Ensemble], split: Split, at: Sequence[tuple[int, int]], note: str = ""
) -> list[Features]:
    """Features of networks of an ensemble, all of which are computed together, once, when asked for.

    Args:
        name: kind.
        ensemble: gives it.
        split: the images.
        at: position in the ensemble, and position of the member that the features are of, for each network.
        note: how they are taken.
    """

    @functools.cache
    def everything() -> Encoded:
        return Encoded.of(ensemble().features, split)

    return [Features(name, member, lambda i=i: everything().member(i), note) for i, member in at]


def plain_features(
    moments: Moments, pool: Callable[[np.ndarray], np.ndarray], split: Split, count: int, note: str
) -> list[Features]:
    """Raw pixels and the first ``count`` principal components.

    Args:
        moments: of the pooled training images.
        pool: images to the images that are measured.
        split: the images.
        count: of components, fewer where there are fewer pixels.
        note: what is to be said of the images.
    """
    count = min(count, math.prod(moments.image_shape))
    return [
        Features(RAW + note, -1, lambda: Encoded.of(lambda x: raw_pixels(pool(x)), split)),
        Features(
            f"{count} principal components{note}",
            -1,
            lambda: Encoded.of(lambda x: principal_components(moments, pool(x), count), split),
        ),
    ]


def probe_rows(run: Run[Split], probes: Sequence[Probe], kinds: Sequence[Features], seed: int) -> Rows:
    """Every probe on every kind of features: its scores and protocol; strengths are chosen on validation images.

    Each row has the position of the network as ``member``, -1 for none, the protocol as ``probe_NAME``: a probe may
    have a seed and a learning rate of its own, and the class found for each test image as ``predicted``.
    """
    split = run.data

    def measure(key: str, job: tuple[Features, Probe]) -> dict[str, Any]:
        features, probe = job
        encoded = features.encoded()
        result = PROBES[probe](
            encoded.train,
            split.train_labels,
            encoded.test,
            split.test_labels,
            num_classes=split.num_classes,
            val=Labelled(encoded.validation, split.validation_labels),
            seed=seed,
            features=features.name,
        )
        known = ("probe", "features")
        protocol = {f"probe_{k}": value for k, value in result.protocol.as_dict().items() if k not in known}
        note = {"features_note": features.note} if features.note else {}
        assert result.predicted is not None  # the targets are classes
        run.store.save(f"{key}-{PREDICTED}", {PREDICTED: result.predicted})
        return {name: getattr(result, name) for name in _SCORES} | protocol | note

    jobs = {f"probe-{features.key}-{probe.value}": (features, probe) for features in kinds for probe in probes}
    found = run.each(jobs, lambda key, job: run.once(key, lambda: measure(key, job)), unit="probe")
    rows = []
    for (key, values), (features, probe) in zip(found.items(), jobs.values(), strict=True):
        kept = run.store.load(f"{key}-{PREDICTED}")
        assert kept is not None  # saved before the scores are
        who = {"member": features.member, "features": features.name, "probe": probe.value}
        rows.append({**who, **values, **kept})
    return rows


@dataclasses.dataclass(frozen=True, eq=False)
class OnlineProbe:
    """A ridge probe of every member while it trains, on some training and validation images.

    The strength is chosen on the validation images that the accuracy is measured on, and batch statistics are those of
    training, of corrupted images where there is a corruption: good for watching, not for reporting.

    Attributes:
        training: the programs of the members.
        train: images and labels that the probe is fitted on.
        validation: images and labels that it is measured on.
        num_classes: of the labels.
    """

    training: Training
    train: Labelled
    validation: Labelled
    num_classes: int

    @classmethod
    def of(
        cls, training: Training, train: Labelled, validation: Labelled, num_classes: int, *, most: int, seed: int
    ) -> OnlineProbe:
        """A probe that looks at no more than so many of given training and validation images, drawn at random."""
        rng = np.random.default_rng(seed)

        def some(images: np.ndarray, labels: np.ndarray) -> Labelled:
            rows = np.sort(rng.permutation(len(labels))[:most])
            return Labelled(images[rows], labels[rows])

        return cls(training, some(*train), some(*validation), num_classes)

    def __call__(self, state: TrainState, step: int) -> dict[str, np.ndarray]:
        """Validation accuracy and effective rank of the validation features, [E] each."""
        del step
        ensemble = Ensemble(self.training, state)
        train, validation = (ensemble.features(part.features) for part in (self.train, self.validation))
        found = []
        for x, x_val in zip(train, validation, strict=True):
            held_out = Labelled(x_val, self.validation.targets)
            result = ridge_probe(x, self.train.targets, *held_out, num_classes=self.num_classes, val=held_out)
            found.append(result.accuracy_val)
        return {"probe_accuracy": np.array(found), "rankme": np.array([rankme(x) for x in validation])}
