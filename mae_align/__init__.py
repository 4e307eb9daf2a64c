"""mae_align: which corruption, if any, makes reconstruction learn what your task needs."""

from mae_align._version import __version__
from mae_align.alignment import encoder_curves, paired_se
from mae_align.closed_form import LinearAutoencoder, denoising_autoencoder, supervised_autoencoder
from mae_align.corruption import FixedCountPatchMasking, GaussianNoise, PatchMasking, RandomRatioMasking
from mae_align.data import ImageDataset, load_dataset
from mae_align.errors import InputError
from mae_align.moments import Moments
from mae_align.streaming import stream_moments
from mae_align.sweep import RunOptions, gaussian_sweep, lambda_sweep, masking_sweep, sweep

__all__ = [
    "FixedCountPatchMasking",
    "GaussianNoise",
    "ImageDataset",
    "InputError",
    "LinearAutoencoder",
    "Moments",
    "PatchMasking",
    "RandomRatioMasking",
    "RunOptions",
    "__version__",
    "denoising_autoencoder",
    "encoder_curves",
    "gaussian_sweep",
    "lambda_sweep",
    "load_dataset",
    "masking_sweep",
    "paired_se",
    "stream_moments",
    "supervised_autoencoder",
    "sweep",
]
