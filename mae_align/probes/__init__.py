"""Probes on frozen features: what can be read out of them, by which means, under a stated protocol."""

from mae_align.probes.inputs import Rows, Split, as_images, one_scale, per_feature, validation_split
from mae_align.probes.result import ProbeResult, Protocol
from mae_align.probes.ridge import (
    STRENGTHS,
    RidgePath,
    ridge_from_moments,
    ridge_path,
    ridge_probe,
    ridge_probe_many,
)

__all__ = [
    "STRENGTHS",
    "ProbeResult",
    "Protocol",
    "RidgePath",
    "Rows",
    "Split",
    "as_images",
    "one_scale",
    "per_feature",
    "ridge_from_moments",
    "ridge_path",
    "ridge_probe",
    "ridge_probe_many",
    "validation_split",
]
