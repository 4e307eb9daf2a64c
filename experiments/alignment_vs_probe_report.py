"""What the closed form predicted and what probes found, from one tidy table.

A row is one trained network probed on one task: who it is, what the closed form says of its corruption and the task,
what its probe found, and what else was measured of the network. ``COLUMNS`` names the columns in one place; a table
that holds the required ones can come from anywhere, and rows can be added to it.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Column:
    """One column of the table.

    Attributes:
        name: in the header. of: type of its cells. required: whether the analysis needs it. text: what it says.
    """

    name: str
    of: type
    required: bool
    text: str


COLUMNS: tuple[Column, ...] = (
    Column("dataset", str, True, "data set"),
    Column("task", str, True, "name of the task"),
    Column("task_kind", str, True, "kind of the task"),
    Column("patch_size", int, True, "side of a patch, pixels"),
    Column("mask_ratio", float, True, "share of the patches that is hidden, as asked for"),
    Column("objective", str, True, "training objective: matched (all raw pixels) or standard (hidden patches)"),
    Column("seed", int, True, "seed of the network"),
    Column("probe_r2_test", float, True, "r2 of the probe on test images"),
    Column("probe_r2_train", float, False, "r2 of the probe on the images it was fitted on"),
    Column("probe_r2_val", float, False, "r2 of the probe on validation images"),
    Column("probe_accuracy_train", float, False, "accuracy of the probe on the images it was fitted on; classes only"),
    Column("probe_accuracy_val", float, False, "accuracy of the probe on validation images; classes only"),
    Column("probe_accuracy_test", float, False, "accuracy of the probe on test images; classes only"),
    Column("closed_eval_r2_logmean", float, True, "closed form: held-out r2, mean over log k up to the rank"),
    Column("closed_eval_r2_k8", float, False, "closed form: held-out r2 of 8 features"),
    Column("closed_eval_r2_k32", float, False, "closed form: held-out r2 of 32 features"),
    Column("closed_eval_r2_k128", float, False, "closed form: held-out r2 of 128 features"),
    Column("closed_r2_logmean", float, False, "closed form: in-sample r2, mean over log k up to the rank"),
    Column("closed_r2_k8", float, False, "closed form: in-sample r2 of 8 features"),
    Column("closed_r2_k32", float, False, "closed form: in-sample r2 of 32 features"),
    Column("closed_r2_k128", float, False, "closed form: in-sample r2 of 128 features"),
    Column("closed_rank", int, False, "closed form: number of features that the images and the corruption leave"),
    Column("closed_clipped", str, False, "closed form: numbers of features over the rank, answered at the rank"),
    Column("reconstruction_loss", float, True, "held-out training loss, comparable within an objective only"),
    Column("rankme", float, True, "effective rank of the features of test images"),
    Column("latent", int, False, "number of features of the encoder"),
    Column("realized_ratio", float, False, "share of the patches that is hidden, in whole patches"),
    Column("probe_name", str, False, "protocol: probe"),
    Column("probe_features", str, False, "protocol: what it was fitted on"),
    Column("probe_normalization", str, False, "protocol: normalisation of the features"),
    Column("probe_n_train", int, False, "protocol: images it was fitted on"),
    Column("probe_n_val", int, False, "protocol: images its strength was chosen on"),
    Column("probe_n_test", int, False, "protocol: images it was tested on"),
    Column("probe_seed", int, False, "protocol: seed of the split"),
    Column("probe_strength", float, False, "protocol: chosen strength"),
    Column("probe_selected_by", str, False, "protocol: what was best on the validation images"),
)
"""All columns that the analysis knows; others are kept and ignored."""

KEYS = ("dataset", "task", "patch_size", "mask_ratio", "objective", "seed")
"""What tells rows apart: one row for each combination."""

REQUIRED = tuple(column.name for column in COLUMNS if column.required)
"""Columns without which there is no analysis."""
