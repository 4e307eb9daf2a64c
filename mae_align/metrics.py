"""The one report for both worlds: what the closed form says of a corruption and what a trained network makes of it.

:func:`report_row` puts everything of one network into one flat row; :func:`report_table` puts rows side by side.
Features are those of frozen networks in evaluation mode on clean images; reconstructions are in stored pixel units.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import xarray as xr

from mae_align.closed_form.predictions import KS, Row, closed_form_row
from mae_align.corruption import Corruption
from mae_align.data.frequency import error_by_band
from mae_align.moments.moments import Moments
from mae_align.moments.principal import PrincipalComponents, count_of_share, varying_components
from mae_align.probes import ProbeResult, as_images, ridge_from_moments
from mae_align.runtime.checks import check_images
from mae_align.runtime.errors import InputError

# Images held in float64 at a time.
_ROWS = 4096


class FeatureR2(NamedTuple):
    """Share of target variance that a least-squares probe on features explains.

    Attributes:
        r2: on the samples it is fitted on.
        eval_r2: on held-out ones (may be negative), NaN without.
    """

    r2: float
    eval_r2: float


class SubspaceErrors(NamedTuple):
    """Reconstruction error as a share of the images' own energy about the training mean.

    Attributes:
        mse: mean squared error of a pixel value, squared pixel units.
        total: share, 1 for the mean image.
        top: share within the fewest principal components that carry the given share of the variance.
        bottom: within the others; NaN where there are none.
        bands: [B] per band of spatial frequency, NaN where images do not vary.
        top_count: number of components in the top subspace.
    """

    mse: float
    total: float
    top: float
    bottom: float
    bands: np.ndarray
    top_count: int


class Outputs(NamedTuple):
    """What a network makes of images, in evaluation mode.

    Attributes:
        features: [n, k] of clean training images.
        eval_features: [m, k] of clean held-out images.
        reconstructed: [m, h, w, c] of the held-out images, stored pixel units.
    """

    features: np.ndarray
    eval_features: np.ndarray
    reconstructed: np.ndarray


def rankme(features: np.ndarray) -> float:
    """Effective rank of features: exp of the entropy of their normalised singular values.

    exp(-sum p_i log p_i) with p_i = s_i / sum s, s the singular values of the feature matrix as it is, not centred:
    between 1 (all samples along one direction) and k (as much of each).

    Args:
        features: [n, k] finite.

    Returns:
        The effective rank; NaN where all features are 0. float64; cost n k^2.

    Raises:
        InputError: another shape, NaN or infinite values.

    Source: Garrido et al., RankMe (ICML 2023), without their 1e-7 in the logarithm, which zeros do not need.

    Example:
        >>> rankme(np.eye(4)), round(rankme(np.ones((5, 3))), 6)
        (4.0, 1.0)
    """
    z = np.asarray(features, np.float64)
    if z.ndim != 2 or 0 in z.shape or not np.isfinite(z).all():
        raise InputError(f"features of shape {list(z.shape)}: give finite numbers [n, k]")
    # The triangle has the singular values of the features; a covariance would square their spread.
    s = np.linalg.svd(np.linalg.qr(z, mode="r"), compute_uv=False)
    if not s[0] > 0:
        return math.nan
    p = s / s.sum()
    p = p[p > 0]
    return float(np.exp(-(p * np.log(p)).sum()))


def feature_r2(
    features: np.ndarray,
    targets: np.ndarray,
    eval_features: np.ndarray | None = None,
    eval_targets: np.ndarray | None = None,
    *,
    num_classes: int | None = None,
) -> FeatureR2:
    """r2 of features as the closed form defines it: 1 - min_W E|y - W z|^2 / tr Syy, without regularisation.

    Args:
        features: [n, k].
        targets: [n] labels or numbers, or [n, q].
        eval_features, eval_targets: held-out ones, probed with the same W; their r2 is about the training mean.
        num_classes: for labels.

    Returns:
        Both shares. Constant and dependent features are no obstacle. Cost: n k (k + q) and one eigh of size k.

    Raises:
        InputError: features or targets that are bad or do not fit together, or one held-out part without the other.

    Example:
        >>> z = np.random.default_rng(0).normal(size=(50, 3))
        >>> round(feature_r2(z, z[:, :1] + z[:, 1:2]).r2, 9)
        1.0
    """
    if (eval_features is None) != (eval_targets is None):
        raise InputError("give held-out features and held-out targets, or neither")
    train = Moments.from_arrays(as_images(features), targets, num_classes=num_classes)
    held = train
    if eval_features is not None:
        labelled = np.ndim(targets) == 1 and np.asarray(targets).dtype.kind in "iub"
        classes = train.num_targets if labelled else None
        held = Moments.from_arrays(as_images(eval_features), eval_targets, num_classes=classes)
    found = ridge_from_moments(train, held, held, strengths=(0.0,))
    return FeatureR2(found.r2_train, math.nan if eval_features is None else found.r2_test)


def reconstruction_errors(
    images: np.ndarray,
    reconstructed: np.ndarray,
    moments: Moments,
    *,
    share: float = 0.9,
    num_bands: int = 8,
    components: PrincipalComponents | None = None,
) -> SubspaceErrors:
    """Where a reconstruction errs: in total, in the top and bottom principal subspaces, per band of frequency.

    With e = x_hat - x, x0 = x - mean and P the projection on a subspace: E|P e|^2 / E|P x0|^2, over these images.

    Args:
        images: [m, h, w, c] clean.
        reconstructed: likewise, stored pixel units.
        moments: of the training images: their mean and principal components.
        share: of the variance, in the top subspace.
        num_bands: see :mod:`mae_align.data.frequency`.
        components: of :func:`mae_align.moments.principal.varying_components` of the moments, where several networks
            share them; None: computed.

    Returns:
        The errors. Cost: m d^2, and one eigh of size d for the components.

    Raises:
        InputError: shapes that differ, NaN or infinite pixels, a share outside (0, 1).

    Example:
        >>> x = np.random.default_rng(0).normal(size=(60, 4, 4, 1))
        >>> m = Moments.from_arrays(x)
        >>> found = reconstruction_errors(x, np.broadcast_to(m.mean_x.reshape(4, 4, 1), x.shape), m)
        >>> round(found.total, 6), round(found.top, 6), round(found.bottom, 6)
        (1.0, 1.0, 1.0)
    """
    x, x_hat = check_images(images), check_images(reconstructed)
    if x.shape != x_hat.shape or x.shape[1:] != moments.image_shape:
        raise InputError(
            f"images {list(x.shape)}, reconstructions {list(x_hat.shape)}, moments of {list(moments.image_shape)}: "
            "give one reconstruction per image, and the moments of such images"
        )
    if not 0.0 < share < 1.0:
        raise InputError(f"share={share}: give a share of the variance between 0 and 1")
    whole, variances = varying_components(moments) if components is None else components
    top_count = count_of_share(variances, share)
    mean = moments.mean_x
    # Sums over images of squares: in total, within the top components, within all components with variance.
    error, energy = np.zeros(3), np.zeros(3)
    for start in range(0, len(x), _ROWS):
        clean = x[start : start + _ROWS].reshape(-1, moments.num_pixels).astype(np.float64)
        e = x_hat[start : start + _ROWS].reshape(clean.shape) - clean
        for sums, part in ((error, e), (energy, clean - mean)):
            along = (part @ whole) ** 2
            sums += (part**2).sum(), along[:, :top_count].sum(), along.sum()
    bands = error_by_band(x, x_hat, num_bands, mean_image=mean.reshape(moments.image_shape)).share
    bottom = math.nan
    if len(variances) > top_count:
        bottom = _ratio(error[2] - error[1], energy[2] - energy[1])
    total = _ratio(error[0], energy[0])
    return SubspaceErrors(float(error[0] / x.size), total, _ratio(error[1], energy[1]), bottom, bands, top_count)


def _ratio(error: float, energy: float) -> float:
    return float(error / energy) if energy > 0 else math.nan


def probe_row(result: ProbeResult, prefix: str = "probe") -> Row:
    """Scores and protocol of a probe as cells PREFIX_accuracy_test, PREFIX_r2_test, PREFIX_name, PREFIX_features, ...

    Args:
        result: of any probe.
        prefix: of the columns.

    Returns:
        One cell per score and per entry of the protocol; a strength that does not exist is NaN.

    Example:
        >>> from mae_align.probes import Protocol
        >>> p = Protocol("ridge", "pixels", "per_feature", 80, 10, 10, seed=0, strength=0.1)
        >>> row = probe_row(ProbeResult(1.0, 0.9, 0.8, 0.7, 0.6, 0.5, p))
        >>> row["probe_accuracy_test"], row["probe_name"], row["probe_strength"]
        (0.8, 'ridge', 0.1)
    """
    cells = {("name" if key == "probe" else key): value for key, value in result.as_dict().items()}
    return {f"{prefix}_{key}": math.nan if value is None else value for key, value in cells.items()}


def report_row(
    identity: Mapping[str, float | int | str],
    outputs: Outputs,
    *,
    moments: Moments,
    eval_moments: Moments,
    corruption: Corruption | None,
    targets: np.ndarray,
    eval_images: np.ndarray,
    eval_targets: np.ndarray,
    probes: Mapping[str, ProbeResult],
    ks: Sequence[int] = KS,
    share: float = 0.9,
    num_bands: int = 8,
    closed_form: Mapping[str, float | int | str] | None = None,
    components: PrincipalComponents | None = None,
) -> Row:
    """One row: a trained network and its data, what the closed form says and what was measured.

    Args:
        identity: what tells the row from others (data set, model, corruption, seed, ...), first in the row.
        outputs: of the network.
        moments, eval_moments: of training and held-out images and targets.
        corruption: of the network; None for none.
        targets, eval_targets: [n] and [m] as probes take them.
        eval_images: [m, h, w, c].
        probes: by name, which becomes the prefix of their cells.
        ks: numbers of features of the closed form.
        share, num_bands: see :func:`reconstruction_errors`.
        closed_form: the cells of :func:`mae_align.closed_form.predictions.closed_form_row` where several networks share
            them; None: computed, which is most of the cost.
        components: likewise, see :func:`reconstruction_errors`.

    Returns:
        ``identity``, latent, rankme (of held-out features), feature_r2, feature_eval_r2, the cells of
        :func:`mae_align.closed_form.predictions.closed_form_row`, reconstruction_mse, reconstruction_error, .._top,
        .._bottom, .._band0 and so on, reconstruction_top_count, and the cells of every probe.

    Raises:
        InputError: as the functions named; a name that occurs twice.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> x, y = rng.normal(size=(90, 4, 4, 1)), np.arange(90) % 3
        >>> m = Moments.from_arrays(x, y)
        >>> flat = x.reshape(90, 16)
        >>> data = dict(moments=m, eval_moments=m, targets=y, eval_images=x, eval_targets=y)
        >>> row = report_row({"seed": 0}, Outputs(flat, flat, x), corruption=None, probes={}, **data)
        >>> row["latent"], row["reconstruction_error"]
        (16, 0.0)
    """
    classes = moments.num_targets if np.ndim(targets) == 1 and np.asarray(targets).dtype.kind in "iub" else None
    own = feature_r2(outputs.features, targets, outputs.eval_features, eval_targets, num_classes=classes)
    error = reconstruction_errors(
        eval_images, outputs.reconstructed, moments, share=share, num_bands=num_bands, components=components
    )
    parts: list[Mapping[str, float | int | str]] = [
        identity,
        {"latent": outputs.features.shape[1], "rankme": rankme(outputs.eval_features)},
        {"feature_r2": own.r2, "feature_eval_r2": own.eval_r2},
        closed_form_row(moments, corruption, eval_moments, ks) if closed_form is None else closed_form,
        {"reconstruction_mse": error.mse, "reconstruction_error": error.total},
        {"reconstruction_error_top": error.top, "reconstruction_error_bottom": error.bottom},
        {f"reconstruction_error_band{i}": float(value) for i, value in enumerate(error.bands)},
        {"reconstruction_top_count": error.top_count, "reconstruction_top_share": share},
        *(probe_row(result, name) for name, result in probes.items()),
    ]
    row: Row = {}
    for part in parts:
        twice = row.keys() & part.keys()
        if twice:
            raise InputError(f"{sorted(twice)[0]!r} names two cells of a row: rename it in identity or probes")
        row |= part
    return row


def report_table(rows: Sequence[Mapping[str, float | int | str]]) -> xr.Dataset:
    """Rows side by side: a variable per column over the dimension ``row``.

    Args:
        rows: with any columns; what a row lacks is NaN, in columns of text "".

    Returns:
        Dataset over row: float64 for numbers (int64 where all rows have whole numbers), text otherwise.
        ``.to_dataframe().to_csv(...)`` is the tidy table.

    Raises:
        InputError: no rows.

    Example:
        >>> report_table([{"seed": 0, "r2": 0.5}, {"seed": 1, "name": "mae"}]).r2.values.tolist()
        [0.5, nan]
    """
    if not rows:
        raise InputError("there are no rows: give at least one")
    data: dict[str, tuple[str, np.ndarray]] = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        cells = [row.get(name) for row in rows]
        if any(isinstance(cell, str) for cell in cells):
            data[name] = ("row", np.array(["" if cell is None else str(cell) for cell in cells]))
        elif all(isinstance(cell, int | np.integer) for cell in cells):
            data[name] = ("row", np.array(cells, np.int64))
        else:
            data[name] = ("row", np.array([math.nan if cell is None else cell for cell in cells], np.float64))
    return xr.Dataset(data)
