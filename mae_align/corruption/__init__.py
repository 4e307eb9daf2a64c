"""Corruptions x' of an image x: second moments for the closed forms, a sampler for the training of networks.

Theorem 3 of Balestriero & LeCun (2024) needs two matrices of a corruption, cov(x') and cov(x', x): docs/theory.md,
section 3. A corruption is one object with both its moments and its sampler, and the tests hold the two against each
other.
"""

from mae_align.corruption.base import CleanImages, Corruption, CorruptionMoments, ExactCorruption
from mae_align.corruption.components import ComponentMasking, VarianceShareMasking, principal_components
from mae_align.corruption.linear import AveragePool, Compose, GaussianBlur, LinearCorruption, LinearMap
from mae_align.corruption.masks import BlockMasking, MaskMixture, PixelMasking, ProbabilityMask
from mae_align.corruption.noise import GaussianNoise
from mae_align.corruption.patches import FixedCountPatchMasking, PatchMask, PatchMasking, RandomRatioMasking
from mae_align.corruption.sampled import SampledCorruption

__all__ = [
    "AveragePool",
    "BlockMasking",
    "CleanImages",
    "ComponentMasking",
    "Compose",
    "Corruption",
    "CorruptionMoments",
    "ExactCorruption",
    "FixedCountPatchMasking",
    "GaussianBlur",
    "GaussianNoise",
    "LinearCorruption",
    "LinearMap",
    "MaskMixture",
    "PatchMask",
    "PatchMasking",
    "PixelMasking",
    "ProbabilityMask",
    "RandomRatioMasking",
    "SampledCorruption",
    "VarianceShareMasking",
    "principal_components",
]
