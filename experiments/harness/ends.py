"""Networks trained with labels: the encoders of an ensemble fine-tuned, and the same networks from scratch."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from experiments.harness.data import Split
from experiments.harness.ensembles import (
    End,
    Ensemble,
    Member,
    Problem,
    TrainedConfig,
    batches,
    images_for,
    initial,
    make_training,
)
from experiments.harness.probes import PREDICTED
from experiments.harness.run import Rows, Run
from mae_align.models import Classifier
from mae_align.runtime.errors import InputError
from mae_align.train.ensemble import Training, TrainState, classify

NAMES = {End.fine_tuning: "fine-tuned", End.from_scratch: "from scratch"}


@dataclasses.dataclass(frozen=True)
class EndTraining:
    """Networks trained with labels: for each of some members, one with each learning rate.

    Attributes:
        rows: accuracies of the best learning rate of each member, on validation images.
        ensemble: gives all networks.
        best: position in it of the best one, and position of the member, for each member.
    """

    rows: Rows
    ensemble: Callable[[], Ensemble]
    best: list[tuple[int, int]]


def end_programs(config: TrainedConfig, split: Split, problem: Problem) -> dict[End, Training]:
    """The programs of the ends that are wanted; nothing is compiled yet.

    One network for each learning rate and, from scratch, each seed; fine-tuned, each seed at each guidance weight. Both
    share their programs where they have equally many networks. A supervised network is one from scratch.

    Raises:
        InputError: numbers of networks or images that the mesh does not divide.
    """

    def make_model(rngs: nnx.Rngs) -> Classifier:
        return Classifier(problem.make_autoencoder(rngs), split.classes, rngs=rngs)

    @functools.cache
    def programs(count: int) -> Training:
        rates = count * config.end_learning_rates
        try:
            return make_training(config, split, config.end_training, make_model, classify, rates)
        except InputError as error:
            raise InputError(
                f"{error} (networks trained with labels: one for each --seeds and --end-learning-rates; --ends None "
                "trains none)"
            ) from None

    found = {}
    for end in config.ends or ():
        tuned = end is End.fine_tuning
        networks = {(member.seed, member.guidance if tuned else 0.0) for member in problem.members}
        found[End.fine_tuning if tuned else End.from_scratch] = programs(len(networks))
    return found


def train_end(
    end: End,
    config: TrainedConfig,
    run: Run[Split],
    problem: Problem,
    trained: Ensemble,
    training: Training,
    members: Sequence[int],
) -> EndTraining:
    """Train classifiers on the encoders of given members: fine-tuned where ``end`` says so, else from scratch.

    Raises:
        Diverged, Preempted: as :func:`experiments.harness.train.train_at`.
    """
    split, rates = run.data, config.end_learning_rates
    networks = [Member(problem.members[m].seed, rate) for m in members for rate in rates]
    parts = {
        "accuracy_train": (split.train_images, split.train_labels),
        "accuracy_val": (split.validation_images, split.validation_labels),
    }

    def start() -> TrainState:
        state = initial(training, networks)
        if end is End.fine_tuning:
            state = with_encoder(state, trained.state, problem.inside, [m for m in members for _ in rates])
        return state

    def look(state: TrainState, step: int) -> dict[str, np.ndarray]:
        del step
        models = [training.model(state, i) for i in range(training.num_members)]
        found = {name: np.array([accuracy(model, *part) for model in models]) for name, part in parts.items()}
        return found | {PREDICTED: np.stack([predicted_classes(model, split.test_images) for model in models])}

    total = config.end_training.steps(len(split.train_labels))
    way = (end.value, training, start, lambda: images_for(config, split, training), [total], look)
    found = {name: values[-1] for name, values in run.train_at(*way).items()}
    rows, best = [], []
    for i, member in enumerate(members):
        mine = slice(i * len(rates), (i + 1) * len(rates))
        at = mine.start + int(found["accuracy_val"][mine].argmax())
        best.append((at, member))
        rows.append(
            {
                "member": member,
                "features": NAMES[end],
                "probe": "none",
                **{name: float(found[name][at]) for name in parts},
                "accuracy_test": float((found[PREDICTED][at] == split.test_labels).mean()),
                PREDICTED: found[PREDICTED][at],
                "end_learning_rate": networks[at].learning_rate,
                "end_learning_rates_tried": " ".join(f"{rate:g}" for rate in rates),
                "end_epochs": config.end_epochs,
            }
        )
    return EndTraining(rows, functools.cache(lambda: Ensemble(training, run.train_to(*way))), best)


def accuracy(model: Classifier, images: np.ndarray, labels: np.ndarray) -> float:
    """Share of images [n, h, w, c] whose class a network finds."""
    return float((predicted_classes(model, images) == labels).mean())


def predicted_classes(model: Classifier, images: np.ndarray) -> np.ndarray:
    """The class that a network finds for each image, [n] int32."""
    return np.concatenate([np.asarray(_classes(model, part))[:count] for part, count in batches(images)])


@jax.jit
def _classes(model: Classifier, images: jax.Array) -> jax.Array:
    return model.logits(images).argmax(1)


def with_encoder(
    state: TrainState, pretrained: TrainState, inside: str, members: Sequence[int], into: str = "autoencoder"
) -> TrainState:
    """A state whose networks inside are those of given members of another state.

    Args:
        state: of M models with an autoencoder named ``into``.
        pretrained: the other state.
        inside: name of the autoencoder in its models, empty where it is the model.
        members: M positions in it.
        into: see ``state``.
    """
    index = np.asarray(members)
    lent = {part: _inside(getattr(pretrained, part), inside) for part in ("params", "rest")}
    names = {part: list(leaves) for part, leaves in lent.items()}

    def join(state: TrainState, leaves: Mapping[str, list[jax.Array]]) -> TrainState:
        parts = {}
        for part, arrays in leaves.items():
            found = dict(zip(names[part], arrays, strict=True))
            parts[part] = jax.tree_util.tree_map_with_path(
                lambda path, leaf, found=found: found[path[1:]][index] if _name(path) == into else leaf,
                getattr(state, part),
            )
        return dataclasses.replace(state, **parts)

    layout = jax.tree.map(lambda leaf: leaf.sharding, state)
    return jax.jit(join, out_shardings=layout)(state, {part: list(leaves.values()) for part, leaves in lent.items()})


def _inside(tree: Any, name: str) -> dict[Any, jax.Array]:
    """Arrays of the module of that name by their path in it; all of them for an empty name."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {path[1:] if name else path: leaf for path, leaf in leaves if not name or _name(path) == name}


def _name(path: Sequence[Any]) -> str:
    return str(path[0].key)
