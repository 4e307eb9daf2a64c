"""One cell of the alignment experiment: its networks trained, its tasks probed, its closed form evaluated."""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from experiments.alignment_vs_probe.tasks import Task
from mae_align.closed_form.predictions import Row, closed_form_rows, denoising_encoder
from mae_align.corruption import FixedCountPatchMasking
from mae_align.data import ImageDataset
from mae_align.data.patches import ImageShape, patch_grid
from mae_align.models import AllPixels, Classifier, MaskedAutoencoder, MaskedPatches, Pixels, VitSize
from mae_align.models.vit_mae import visible_patches
from mae_align.moments.moments import Moments
from mae_align.probes import ProbeResult, ridge_probe, ridge_probe_many
from mae_align.runtime.errors import InputError
from mae_align.runtime.processes import train_mesh
from mae_align.train.checkpoint import Checkpoints
from mae_align.train.ensemble import Training, TrainState, classify, reconstruct
from mae_align.train.log import MetricLog
from mae_align.train.loop import Evaluate, fit
from mae_align.train.optimizer import OptimizerConfig, adamw

# Images of one forward pass when features are taken.
_FEATURE_BATCH = 500
# Groups of held-out images: their spread is not used here, and the curves want at least two.
_GROUPS = 2
_MEASURES = ("accuracy", "r2")
_PARTS = ("train", "val", "test")


class Loss(enum.Enum):
    """What the networks are trained for: all pixels as in Theorem 3, or hidden patches as published."""

    matched = "matched"
    standard = "standard"


_OBJECTIVES = {Loss.matched: AllPixels(), Loss.standard: MaskedPatches(norm_pix=True)}


@dataclasses.dataclass(frozen=True)
class NetworkConfig:
    """The masked autoencoders, all of one size, and their training."""

    width: int = 64
    """Width of the encoder's tokens, and number of features."""
    depth: int = 2
    """Blocks of the encoder."""
    heads: int = 4
    """Attention heads of the encoder."""
    decoder_width: int = 64
    """Width of the decoder's tokens."""
    decoder_depth: int = 1
    """Blocks of the decoder."""
    decoder_heads: int = 4
    """Attention heads of the decoder."""
    epochs: int = 5
    """Passes over the training images."""
    batch_size: int = 64
    """Images in a step."""
    learning_rate: float = 2e-3
    """Peak learning rate of AdamW."""
    weight_decay: float = 0.05
    """Weight decay of AdamW."""
    warmup_epochs: float = 1.0
    """Epochs of linear warm-up; after it the learning rate falls to 0 along a cosine."""
    bfloat16: bool = False
    """Compute in bfloat16, parameters and losses in float32: for accelerators."""

    @property
    def size(self) -> VitSize:
        """As the model takes it."""
        return VitSize(self.width, self.depth, self.heads, self.decoder_width, self.decoder_depth, self.decoder_heads)


@dataclasses.dataclass(frozen=True)
class Cell:
    """A masked autoencoder's mask and loss."""

    patch_size: int
    mask_ratio: float
    loss: Loss

    @property
    def key(self) -> str:
        """A file name."""
        return f"patch{self.patch_size}-ratio{self.mask_ratio:g}-{self.loss.value}"


def make_training(pixels: Pixels, cell: Cell, config: NetworkConfig, num_images: int, seeds: int) -> Training:
    """The networks of one cell, one for each seed, as an ensemble.

    Raises:
        InputError: sizes that do not fit the images or each other.
    """

    def make(rngs: nnx.Rngs) -> MaskedAutoencoder:
        return _network(pixels, cell, config, rngs)

    optimizer = adamw(_schedule(config, num_images))
    return Training(make, reconstruct, optimizer, batch_size=config.batch_size, num_members=seeds, mesh=_mesh(config))


def make_supervised(
    pixels: Pixels, cell: Cell, config: NetworkConfig, num_images: int, seeds: int, num_classes: int
) -> Training:
    """The encoders of a cell's networks with a linear head, one for each seed, to be trained with labels instead.

    No patch is hidden and no decoder used: the cell's mask and loss do not matter.

    Raises:
        InputError: as :func:`make_training`, and fewer than two classes.
    """

    def make(rngs: nnx.Rngs) -> Classifier:
        return Classifier(_network(pixels, cell, config, rngs), num_classes, rngs=rngs)

    optimizer = adamw(_schedule(config, num_images))
    return Training(make, classify, optimizer, batch_size=config.batch_size, num_members=seeds, mesh=_mesh(config))


def check_ratios(image_shape: ImageShape, patch_size: int, mask_ratios: Sequence[float]) -> None:
    """Refuse mask ratios that are too few masks for a correlation over them, because some hide as many patches.

    Args:
        image_shape: (h, w, c). patch_size: divides the sides. mask_ratios: in [0, 1).

    Raises:
        InputError: see above.

    Example:
        >>> check_ratios((8, 8, 1), 4, [0.25, 0.5, 0.75])
    """
    patches = math.prod(patch_grid(image_shape, patch_size))
    if len({visible_patches(patches, ratio) for ratio in mask_ratios}) < 3:
        listed = " ".join(f"{ratio:g}" for ratio in mask_ratios)
        raise InputError(
            f"--mask-ratios {listed}: of the {patches} patches of {patch_size}x{patch_size} pixels they leave fewer "
            "than three different numbers visible, give ratios further apart or a smaller --patch-sizes"
        )


def _network(pixels: Pixels, cell: Cell, config: NetworkConfig, rngs: nnx.Rngs) -> MaskedAutoencoder:
    return MaskedAutoencoder(
        pixels,
        patch_size=cell.patch_size,
        mask_ratio=cell.mask_ratio,
        objective=_OBJECTIVES[cell.loss],
        dtype=jnp.bfloat16 if config.bfloat16 else jnp.float32,
        rngs=rngs,
        **vars(config.size),
    )


def _schedule(config: NetworkConfig, num_images: int) -> OptimizerConfig:
    per_epoch = max(num_images // config.batch_size, 1)
    steps = config.epochs * per_epoch
    warmup = min(round(config.warmup_epochs * per_epoch), steps - 1)
    return OptimizerConfig(
        total_steps=steps,
        learning_rate=config.learning_rate,
        warmup_steps=warmup,
        weight_decay=config.weight_decay,
    )


def _mesh(config: NetworkConfig) -> Mesh:
    """All devices; of one process only as many as divide a batch."""
    if jax.process_count() > 1:
        return train_mesh()
    return train_mesh(devices=jax.devices()[: math.gcd(config.batch_size, jax.device_count())])


def train(
    training: Training,
    images: np.ndarray,
    config: NetworkConfig,
    seeds: Sequence[int],
    folder: Path,
    identity: str,
    labels: np.ndarray | None = None,
    evaluate: Evaluate | None = None,
) -> TrainState:
    """Trains an ensemble, from its latest checkpoint if there is one.

    Args:
        labels: where the objective needs them. evaluate: measured once an epoch, for the progress line and the log.
    """
    per_epoch = max(len(images) // config.batch_size, 1)
    with (
        Checkpoints.open(folder, identity=identity, every=max(per_epoch, 100), keep_latest=2) as checkpoints,
        MetricLog(folder, shown=("probe_accuracy", "accuracy")) as log,
    ):
        return fit(
            training,
            training.init(seeds),
            training.put(images, labels),
            num_steps=config.epochs * per_epoch,
            checkpoints=checkpoints,
            log=log,
            evaluate=evaluate,
            evaluate_every=per_epoch,
            steps_per_call=min(per_epoch, 50),
            log_every=per_epoch,
        )


def masked_loss(training: Training, state: TrainState, images: np.ndarray) -> np.ndarray:
    """Training loss of each network on other images, with masks that are the same for all of a cell, [E]."""
    # Whole batches alone, so that one program serves.
    parts = [images[i : i + _FEATURE_BATCH] for i in range(0, len(images) - _FEATURE_BATCH + 1, _FEATURE_BATCH)]
    parts = parts or [images]
    models = [training.model(state, member) for member in range(training.num_members)]
    each = [[float(_loss(m, jnp.asarray(x), jax.random.key(i))) for i, x in enumerate(parts)] for m in models]
    return np.mean(each, axis=1)


@jax.jit
def _loss(model: MaskedAutoencoder, images: jax.Array, key: jax.Array) -> jax.Array:
    return model.loss(images, key)[0]


def probe_tasks(
    train_features: np.ndarray, test_features: np.ndarray, tasks: Sequence[Task], name: str
) -> dict[str, ProbeResult]:
    """Ridge probes of all tasks on the features of one network.

    Tasks on all images share one eigendecomposition; a task on some of the classes has one of its own.

    Args:
        train_features: [n, k]. test_features: [m, k]. tasks: on these images. name: of the features, for the protocol.
    """
    whole = {task.name: task for task in tasks if not task.restricted}
    results = ridge_probe_many(
        train_features,
        {key: task.train_targets for key, task in whole.items()},
        test_features,
        {key: task.test_targets for key, task in whole.items()},
        num_classes={key: task.num_classes for key, task in whole.items() if task.num_classes is not None},
        features=name,
    )
    for task in tasks:
        if task.restricted:
            results[task.name] = ridge_probe(
                train_features[task.train_rows],
                task.train_targets,
                test_features[task.test_rows],
                task.test_targets,
                num_classes=task.num_classes,
                features=name,
            )
    return results


def probe_columns(result: ProbeResult) -> dict[str, Any]:
    """The scores of a probe and its protocol, as columns of a table; None is a blank cell."""
    scores = {f"probe_{what}_{part}": getattr(result, f"{what}_{part}") for what in _MEASURES for part in _PARTS}
    protocol = result.protocol.as_dict()
    names = {"probe": "probe_name"} | {key: f"probe_{key}" for key in protocol if key != "probe"}
    # A blank cell, not "nan": JSON has none.
    return {key: None if isinstance(v, float) and np.isnan(v) else v for key, v in scores.items()} | {
        names[key]: value for key, value in protocol.items()
    }


def closed_form(
    moments: Moments,
    masking: FixedCountPatchMasking,
    data: ImageDataset,
    tasks: Sequence[Task],
    ks: Sequence[int],
) -> dict[str, Row]:
    """Columns of the closed form of every task: r2 and alignment on the features of a linear masked autoencoder.

    Args:
        moments: of all training images, without targets. masking: the cell's. data: training and held-out images.
        tasks: on these images. ks: numbers of features.
    """
    encoder = denoising_encoder(moments, masking)
    found = {}
    for whole in (True, False):
        for group in _side_by_side([task for task in tasks if task.restricted is not whole], whole):
            first, columns = group[0], _columns(group)
            parts = (
                (data.train_images, first.train_rows, [_matrix(task, task.train_targets) for task in group]),
                (data.test_images, first.test_rows, [_matrix(task, task.test_targets) for task in group]),
            )
            fitted, held_out = (
                Moments.from_arrays(images[rows], np.concatenate(targets, axis=1), groups=_GROUPS)
                for images, rows, targets in parts
            )
            found |= closed_form_rows(fitted, masking, columns, held_out, ks, encoder=encoder)
    return found


def _matrix(task: Task, targets: np.ndarray) -> np.ndarray:
    """Targets as numbers [n', q]: one-hot rows for classes."""
    return targets if task.num_classes is None else np.eye(task.num_classes)[targets]


def _side_by_side(tasks: Sequence[Task], whole: bool) -> list[list[Task]]:
    """Tasks on all images share moments; one on some of the images has its own."""
    if not tasks:
        return []
    return [list(tasks)] if whole else [[task] for task in tasks]


def _columns(tasks: Sequence[Task]) -> dict[str, slice]:
    ends = np.cumsum([_matrix(task, task.train_targets).shape[1] for task in tasks]).tolist()
    return {task.name: slice(a, b) for task, a, b in zip(tasks, [0, *ends], ends, strict=False)}
