"""What networks learn, and what is noted of them on the way: residuals, frequencies, losses and a probe."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.harness.data import Split
from experiments.learning_dynamics.dynamics import direction_energy, group_shares, shares, variance_groups
from experiments.learning_dynamics.response import ResponseFilter
from experiments.learning_dynamics.spectrum import ImageMap, Spectrum
from mae_align.data.frequency import error_by_band, mean_frequency
from mae_align.models import Autoencoder
from mae_align.probes import ridge_probe
from mae_align.train.ensemble import Training, TrainState
from mae_align.train.loop import Diverged

Arrays = dict[str, np.ndarray]
GROUPS = 10
# Images of one forward pass.
_BATCH = 500


class Scene(NamedTuple):
    """One image set, ready to train on.

    Attributes:
        spectrum: of the training images as given to the networks.
        mean_frequency: [r] of its directions, cycles per pixel.
        images: [n, h, w, c] float32 in units in which the mean image as reconstruction has a loss of 1.
        seen: indices of the training images that are looked at.
        held_out: test images.
        seen_labels: of the former.
        held_out_labels: of the latter.
        seen_energy: [r] along each direction.
        held_out_energy: [r].
        filter: of the response frequencies, at the first of the held-out images.
        num_classes: of the labels.
    """

    spectrum: Spectrum
    mean_frequency: np.ndarray
    images: np.ndarray
    seen: np.ndarray
    held_out: np.ndarray
    seen_labels: np.ndarray
    held_out_labels: np.ndarray
    seen_energy: np.ndarray
    held_out_energy: np.ndarray
    filter: ResponseFilter
    num_classes: int

    @property
    def points(self) -> np.ndarray:
        """The held-out images at which the map is filtered."""
        return self.held_out[: self.filter.weights.shape[1]]


def make_scene(
    data: Split, moved: ImageMap, *, seen: int, response_points: int, widths: Sequence[float], seed: int
) -> Scene:
    """The images of a data set under a map, and what they are looked at with.

    Args:
        data: training and test images.
        moved: of their spectrum.
        seen: most training, and most test, images to look at.
        response_points: of the response filter, at most as many.
        widths: see :class:`ResponseFilter`.
        seed: of the choice of images.
    """
    rng = np.random.default_rng([seed, 7])
    chosen = [
        np.sort(rng.choice(len(labels), min(seen, len(labels)), replace=False))
        for labels in (data.train_labels, data.test_labels)
    ]
    spectrum, images = moved.spectrum, moved.apply(data.train_images)
    held_out = moved.apply(data.test_images[chosen[1]])
    return Scene(
        spectrum,
        mean_frequency(spectrum.vectors.T.reshape(-1, *spectrum.image_shape)),
        images,
        chosen[0],
        held_out,
        data.train_labels[chosen[0]],
        data.test_labels[chosen[1]],
        direction_energy(images[chosen[0]], spectrum),
        direction_energy(held_out, spectrum),
        ResponseFilter.of(held_out[:response_points], widths),
        data.classes,
    )


def look(training: Training, state: TrainState, step: int, scene: Scene, followed: int, bands: int) -> Arrays:
    """Everything that is noted of E networks at one step.

    Args:
        training: of the networks.
        state: after the step.
        step: its number.
        scene: what they learn.
        followed: m, directions whose residuals are noted.
        bands: of spatial frequency.

    Returns:
        residual, test_residual [E, m] on looked-at training and on test images; group_residual [E, 10] of variance
        groups; of all r directions all_residual and energy [E, r], that of the reconstructions; band_error [E, bands];
        response_low_error, response_high_error [E, w]; train_loss, test_loss, test_accuracy [E].

    Raises:
        Diverged: a reconstruction is not finite.
    """
    each = []
    for member in range(training.num_members):
        seen, test = (_outputs(training.model(state, member), x) for x in (scene.images[scene.seen], scene.held_out))
        if not (np.isfinite(seen[0]).all() and np.isfinite(test[0]).all()):
            raise Diverged(f"a reconstruction of member {member} is not finite", step, member, None)
        each.append(_looked(*seen, *test, scene, followed, bands))
    return {name: np.stack([one[name] for one in each]) for name in each[0]}


def _looked(
    seen: np.ndarray,
    seen_features: np.ndarray,
    test: np.ndarray,
    test_features: np.ndarray,
    scene: Scene,
    followed: int,
    bands: int,
) -> Arrays:
    spectrum, missed, missed_out = scene.spectrum, seen - scene.images[scene.seen], test - scene.held_out
    error = direction_energy(missed, spectrum)
    error_out = direction_energy(missed_out, spectrum.first(followed))
    residual = shares(error, scene.seen_energy)
    response = scene.filter.errors(scene.points, test[: len(scene.points)])
    probe = ridge_probe(
        seen_features, scene.seen_labels, test_features, scene.held_out_labels, num_classes=scene.num_classes
    )
    groups = variance_groups(spectrum.values, GROUPS)
    return {
        "residual": residual[:followed],
        "all_residual": residual,
        "energy": direction_energy(seen, spectrum),
        "test_residual": shares(error_out, scene.held_out_energy[:followed]),
        "group_residual": group_shares(error, scene.seen_energy, groups, GROUPS),
        "band_error": error_by_band(scene.held_out, test, bands).share,
        "response_low_error": response.low,
        "response_high_error": response.high,
        "train_loss": np.array(np.square(missed, dtype=np.float64).mean()),
        "test_loss": np.array(np.square(missed_out, dtype=np.float64).mean()),
        "test_accuracy": np.array(probe.accuracy_test),
    }


@jax.jit
def _reconstructed(model: Autoencoder, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    return model.reconstruct(images), model.features(images)


def _outputs(model: Any, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Reconstructions and features; the last batch is filled up, so that one program serves."""
    parts = []
    for start in range(0, len(images), _BATCH):
        part = images[start : start + _BATCH]
        rows = np.concatenate([part, np.repeat(part[:1], _BATCH - len(part), axis=0)])
        parts.append([np.asarray(a)[: len(part)] for a in _reconstructed(model, jnp.asarray(rows))])
    reconstructed, features = zip(*parts, strict=True)
    return np.concatenate(reconstructed), np.concatenate(features)
