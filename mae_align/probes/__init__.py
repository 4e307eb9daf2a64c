"""Probes on frozen features: what can be read out of them, by which means, under a stated protocol.

The ridge probe at strength 0 measures the r2 of docs/theory.md, section 5; beyond that there is no mathematics here.
"""

from mae_align.probes.baselines import principal_components, raw_pixels
from mae_align.probes.inputs import Rows, Split, as_images, one_scale, per_feature, validation_split
from mae_align.probes.logistic import LOGISTIC_STRENGTHS, logistic_probe
from mae_align.probes.mlp import mlp_probe
from mae_align.probes.neighbors import NEIGHBORS, ExponentialVotes, knn_probe, plain_votes
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
    "LOGISTIC_STRENGTHS",
    "NEIGHBORS",
    "STRENGTHS",
    "ExponentialVotes",
    "ProbeResult",
    "Protocol",
    "RidgePath",
    "Rows",
    "Split",
    "as_images",
    "knn_probe",
    "logistic_probe",
    "mlp_probe",
    "one_scale",
    "per_feature",
    "plain_votes",
    "principal_components",
    "raw_pixels",
    "ridge_from_moments",
    "ridge_path",
    "ridge_probe",
    "ridge_probe_many",
    "validation_split",
]
