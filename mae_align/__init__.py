"""mae_align: which corruption, if any, makes reconstruction learn what your task needs."""

from importlib import import_module
from typing import TYPE_CHECKING

from mae_align.closed_form.autoencoder import LinearAutoencoder, denoising_autoencoder, supervised_autoencoder
from mae_align.closed_form.compare import compare_corruptions, compare_many
from mae_align.closed_form.corruption_sweep import corruption_sweep
from mae_align.closed_form.curves import encoder_curves
from mae_align.closed_form.held_out import paired_se
from mae_align.closed_form.sweep import gaussian_sweep, lambda_sweep, masking_sweep, sweep
from mae_align.closed_form.targets import Components, HighPass, MatrixTarget, PatchMeanRemoved, TargetOperator
from mae_align.corruption import (
    AveragePool,
    BlockMasking,
    ComponentMasking,
    Compose,
    FixedCountPatchMasking,
    GaussianBlur,
    GaussianNoise,
    LinearCorruption,
    MaskMixture,
    PatchMasking,
    PixelMasking,
    RandomRatioMasking,
    SampledCorruption,
    VarianceShareMasking,
)
from mae_align.data import ImageDataset, encode_labels, load_dataset
from mae_align.moments.moments import Moments
from mae_align.moments.samples import Samples, summarize
from mae_align.moments.streaming import stream_moments
from mae_align.runtime.errors import InputError
from mae_align.runtime.pool import RunOptions

if TYPE_CHECKING:
    from mae_align.models.export import export_encoder
    from mae_align.models.published import load_mae

__version__ = "0.1.0"

__all__ = [
    "AveragePool",
    "BlockMasking",
    "ComponentMasking",
    "Components",
    "Compose",
    "FixedCountPatchMasking",
    "GaussianBlur",
    "GaussianNoise",
    "HighPass",
    "ImageDataset",
    "InputError",
    "LinearAutoencoder",
    "LinearCorruption",
    "MaskMixture",
    "MatrixTarget",
    "Moments",
    "PatchMasking",
    "PatchMeanRemoved",
    "PixelMasking",
    "RandomRatioMasking",
    "RunOptions",
    "SampledCorruption",
    "Samples",
    "TargetOperator",
    "VarianceShareMasking",
    "__version__",
    "compare_corruptions",
    "compare_many",
    "corruption_sweep",
    "denoising_autoencoder",
    "encode_labels",
    "encoder_curves",
    "export_encoder",
    "gaussian_sweep",
    "lambda_sweep",
    "load_dataset",
    "load_mae",
    "masking_sweep",
    "paired_se",
    "stream_moments",
    "summarize",
    "supervised_autoencoder",
    "sweep",
]

# Networks are loaded where they are asked for: closed forms do without flax.
_NETWORKS = {"export_encoder": "mae_align.models.export", "load_mae": "mae_align.models.published"}


def __getattr__(name: str) -> object:
    """What is loaded when it is first asked for."""
    if name not in _NETWORKS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_NETWORKS[name]), name)
