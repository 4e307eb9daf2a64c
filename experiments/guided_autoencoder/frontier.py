"""The exact frontier of Theorem 1, measured like the networks: linear codes of the best trade-off of both errors."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from tqdm import tqdm

import mae_align as ma
from experiments.guided_autoencoder.networks import GuidedSplit, Row, probe_cells
from experiments.harness.ensembles import Probe
from experiments.harness.folder import silent
from mae_align.closed_form.autoencoder import supervised_solution
from mae_align.closed_form.factorize import factorize

# Images in float64 at a time.
_ROWS = 2048


def linear_rows(
    split: GuidedSplit, latents: Sequence[int], lambdas: Sequence[float], probes: Sequence[Probe]
) -> list[Row]:
    """One row for each code size and weight of reconstruction.

    Args:
        split: the encoders are solved on its fitted images and labels.
        latents: sizes of the code.
        lambdas: relative weights lambda tr Sxx / tr Syy; infinity, PCA, is added.
        probes: as for the networks.

    Returns:
        Rows with labels "linear", lam_relative; fit_error and fit_r2, the exact trade-off on the fitted images;
        val_error, test_error and the cells of every probe as for networks.

    Raises:
        InputError: a code size over the rank of the images.
    """
    classes = split.data.num_classes
    problem = factorize(ma.Moments.from_arrays(split.fit_images, split.fit_labels, num_classes=classes))
    for latent in latents:
        problem.check_k(latent)
    task = float(np.trace(problem.syy))
    unit = task / problem.trace
    rows = []
    for relative in tqdm(sorted({*lambdas, math.inf}), desc="linear frontier", unit="lambda", disable=silent()):
        solved = supervised_solution(problem, relative * unit, max(latents))
        codes = [_encode(solved, part) for part in split.measured]
        for latent in latents:
            own = [z[:, :latent] for z in codes]
            val, test = (_error(solved, z, x) for z, x in zip(own[1:], split.measured[1:], strict=True))
            rows.append(
                {
                    "dataset": split.data.name,
                    "latent": latent,
                    "labels": "linear",
                    "lam_relative": relative,
                    "fit_error": 1.0 - float((solved.decoder[:latent] ** 2).sum()) / problem.trace,
                    "fit_r2": float((solved.head[:latent] ** 2).sum()) / task,
                    "val_error": val,
                    "test_error": test,
                    **probe_cells([z.astype(np.float32) for z in own], split, probes, "linear code"),
                }
            )
    return rows


def _encode(solved: ma.LinearAutoencoder, images: np.ndarray) -> np.ndarray:
    return np.concatenate([solved.encode(images[i : i + _ROWS]) for i in range(0, len(images), _ROWS)])


def _error(solved: ma.LinearAutoencoder, codes: np.ndarray, images: np.ndarray) -> float:
    """E|x_hat - x|^2 / E|x - mean|^2, the first features' decoder."""
    sums = np.zeros(2)
    for i in range(0, len(images), _ROWS):
        centred = images[i : i + _ROWS].reshape(-1, len(solved.mean_x)) - solved.mean_x
        error = codes[i : i + _ROWS] @ solved.decoder[: codes.shape[1]] - centred
        sums += (error**2).sum(), (centred**2).sum()
    return float(sums[0] / sums[1]) if sums[1] > 0 else math.nan
