"""What does an encoder that I have know about my task? Probes on a published network, or on features as files.

Paper: Sec. 5, for networks of others
Time: 20 seconds

Every probe on the features of the encoder, by the mean over patches and by the class token, beside the same probes on
raw pixels, on principal components and on an untrained network of the same shape; differences are paired over the test
images. Beside them stands the linear masked autoencoder in closed form for the same mask (Theorem 3).

    python -m experiments.probe_encoder                          # digits: what an encoder has to beat
    python -m experiments.probe_encoder --data folder:DIR --mae MAE_FOLDER --image-size 224
    python -m experiments.probe_encoder --features FILE.npz      # x_train [n, k], y_train, x_test, y_test

``--mae`` takes what `mae_align.load_mae` reads: a folder in Hugging Face layout, or a safetensors file with the names
of facebookresearch/mae. ``--features`` takes features of any framework, with their labels, and no images; ``x_val`` and
``y_val`` are the validation part where they are there. Tables: results (every probe on everything), comparisons,
encoders (effective rank of the features) and, for a masked autoencoder, closed_form.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
from flax import nnx

import mae_align as ma
from experiments.harness.cli import launch_experiment
from experiments.harness.config import ADDS, RunConfig
from experiments.harness.data import Split
from experiments.harness.ensembles import Probe, batches
from experiments.harness.figures import accuracy_figure
from experiments.harness.probes import NETWORK, PREDICTED, UNTRAINED, Encoded, Features, plain_features, probe_rows
from experiments.harness.report import COLUMNS as REPORT
from experiments.harness.report import (
    Measured,
    accuracy_table,
    closed_form_rows,
    compared,
    comparison_rows,
    result_rows,
    worth,
)
from experiments.harness.run import Rows, Run
from mae_align.corruption import FixedCountPatchMasking
from mae_align.data.dataset import encode_labels
from mae_align.metrics import rankme
from mae_align.models import Pooling, PublishedAutoencoder, load_mae
from mae_align.runtime.checks import as_array
from mae_align.runtime.processes import refused_together

_COMPONENTS = 64
_PARTS = {"train": "train", "val": "validation", "test": "test"}


@dataclasses.dataclass(frozen=True)
class Config(RunConfig):
    """Settings of the probes."""

    mae: str | None = None
    """A published masked autoencoder: folder or safetensors file."""
    features: str | None = None
    """A file of features and labels, in place of --data: x_train, y_train, x_test, y_test."""
    probes: Annotated[tuple[Probe, ...], ADDS] = (Probe.ridge, Probe.logistic, Probe.knn)
    """Probes to fit; more are added to a finished run."""

    def check(self) -> None:
        """Refuse two encoders."""
        super().check()
        if self.mae is not None and self.features is not None:
            raise ma.InputError("--mae and --features are two encoders: give one, with a run folder for each")


PRESETS = {"laptop": Config()}
COLUMNS = {
    **REPORT,
    "encoder": "features that are probed",
    "num_features": "number of features",
    "rankme": "effective rank of the features of test images",
}


def load(config: Config) -> Split:
    """The data set, or features as images of one pixel with as many channels.

    Raises:
        InputError: data or features that cannot be read.
    """
    if config.features is None:
        return Split.load(config)
    with refused_together():
        data = features_of(Path(config.features).expanduser())
    return Split.of(data, config)


def features_of(path: Path) -> ma.ImageDataset:
    """Features and labels of a file, as images [n, 1, 1, k].

    Raises:
        InputError: a file that cannot be read, or arrays that do not fit together.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise ma.InputError(f"no file {path}: check --features") from None
    except Exception as error:  # damage shows as whatever the reader stumbles on
        raise ma.InputError(f"{path} is damaged or no .npz file ({str(error).splitlines()[0]})") from None
    parts = [part for part in _PARTS if f"x_{part}" in arrays]
    missing = [
        f"{kind}_{part}" for part in {"train", "test", *parts} for kind in "xy" if f"{kind}_{part}" not in arrays
    ]
    if missing:
        raise ma.InputError(f"{path} lacks {', '.join(sorted(missing))}: save x_train [n, k], y_train, x_test, y_test")
    labels, names = encode_labels(*(arrays[f"y_{part}"] for part in parts))
    fields = {}
    for part, numbers in zip(parts, labels, strict=True):
        x = as_array(arrays[f"x_{part}"], f"x_{part} of {path}")
        if x.ndim != 2 or x.dtype.kind not in "fiu":
            raise ma.InputError(f"x_{part} of {path} is {x.dtype} {list(x.shape)}: give features [n, k] as numbers")
        floats = x if x.dtype == np.float64 else x.astype(np.float32)
        fields |= {f"{_PARTS[part]}_images": floats[:, None, None], f"{_PARTS[part]}_labels": numbers}
    return ma.ImageDataset(**fields, class_names=names, name=path.stem)


def main(config: Config, run: Run[Split]) -> None:
    """Probe everything, compare, and say whether the encoder is worth having.

    Raises:
        InputError: an encoder that does not fit the images, before any long work.
    """
    split = run.data
    network = None if config.mae is None else load_mae(config.mae, image_size=split.image_shape[:2])
    if network is not None and network.image_shape != split.image_shape:
        raise ma.InputError(
            f"{config.mae} takes images of {network.image_shape[2]} channels, not {split.image_shape[2]}"
        )
    kinds, corruption = [], None
    if network is not None:
        corruption = FixedCountPatchMasking(network.corruption.patch_size, network.corruption.num_visible)
        kinds = [*_encoded(NETWORK, network, split), *_encoded(UNTRAINED, network.untrained(), split)]
    elif config.features is not None:
        kinds = [Features(NETWORK, -1, lambda: Encoded.of(lambda x: x.reshape(len(x), -1), split))]
    measured = Measured.of(split, corruption)
    if config.features is None:
        count = min(_COMPONENTS, int(np.prod(split.image_shape)))
        kinds += plain_features(measured.train, measured.pool, split, count, measured.note)
    rows = probe_rows(run, config.probes, kinds, config.seed)
    results = pd.DataFrame(result_rows([], rows, []))
    results["reported"] = True
    correct = np.stack([row[PREDICTED] for row in rows]) == split.test_labels
    run.table("results", results, show=accuracy_table(results, split.chance))
    comparisons = comparison_rows(results, correct)
    if comparisons:
        run.table("comparisons", comparisons)
    ranks = [
        {"encoder": kind.name, "num_features": x.shape[1], "rankme": rankme(x)}
        for kind in kinds
        for x in [kind.encoded().test]
    ]
    run.table("encoders", ranks)
    if corruption is not None:
        run.table("closed_form", closed_form_rows(run, measured))
    run.figure("accuracy", accuracy_figure(results, split.chance))
    run.verdict(*verdict(results, comparisons, config.probes[0]))


def _encoded(name: str, network: PublishedAutoencoder, split: Split) -> list[Features]:
    """Features by the mean over patches and by the class token."""

    def of(pooling: Pooling) -> Callable[[np.ndarray], np.ndarray]:
        program = nnx.jit(lambda network, part: network.encode(part, pooling))
        return lambda x: np.concatenate([np.asarray(program(network, part))[:n] for part, n in batches(x)])

    words = {Pooling.mean: "mean over patches", Pooling.cls: "class token"}
    return [
        Features(f"{name}, {word}", -1, lambda pooling=pooling: Encoded.of(of(pooling), split))
        for pooling, word in words.items()
    ]


def verdict(results: pd.DataFrame, comparisons: Rows, probe: Probe) -> list[str]:
    """What the features are worth beside what needs no training, by one probe; without such, how good they are."""
    by_one = [row for row in comparisons if row["probe"] == probe.value]
    if by_one:
        networks = dict.fromkeys(row["compared_as"] for row in by_one)
        each = {name: [row for row in by_one if row["compared_as"] == name] for name in networks}
        return [f"{worth(name, rows)} In points: {'; '.join(map(compared, rows))}." for name, rows in each.items()]
    best = results.loc[results.accuracy_test.idxmax()]
    right = f"{100 * best.accuracy_test:.1f} % of test images right by the {best.probe} probe"
    if str(best.features).startswith(NETWORK):
        return [f"The features get {right}. Pixels to compare with need images: --data and --mae."]
    return [f"An encoder has to beat {best.features}, which get {right}: give one with --mae or --features."]


if __name__ == "__main__":
    launch_experiment(main, Config, PRESETS, COLUMNS, load)
