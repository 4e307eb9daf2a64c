"""Lines for columns that the tables of several experiments have."""

from __future__ import annotations

from collections.abc import Mapping

CLOSED_FORM: Mapping[str, str] = {
    "closed_rank": "closed form: number of features that the images and the corruption leave",
    "closed_clipped": "closed form: numbers of features over closed_rank, answered at it",
    "closed_r2_k*": "closed form: label variance of training images that so many features explain [share]",
    "closed_r2_logmean": "closed form: mean over log k of the same [share]",
    "closed_alignment_k*": "closed form: alignment of so many features with the labels [share]",
    "closed_alignment_logmean": "closed form: mean over log k of the same [share]",
    "closed_eval_r2_k*": "closed form: label variance of held-out images that so many features explain [share]",
    "closed_eval_r2_logmean": "closed form: mean over log k of the same [share]",
    "closed_eval_r2_se_*": "closed form: standard error of closed_eval_r2 over groups of held-out images [share]",
}
"""Of :func:`mae_align.closed_form.predictions.closed_form_row`."""
PROBE: Mapping[str, str] = {
    "probe_accuracy_train": "accuracy of the probe on the images it was fitted on; classes only [share]",
    "probe_accuracy_val": "accuracy of the probe on the images it was chosen on; classes only [share]",
    "probe_accuracy_test": "accuracy of the probe on test images; classes only [share]",
    "probe_r2_train": "variance of the targets that the probe explains on the images it was fitted on [share]",
    "probe_r2_val": "variance of the targets that the probe explains on the images it was chosen on [share]",
    "probe_r2_test": "variance of the targets that the probe explains on test images [share]",
    "probe_name": "protocol: probe",
    "probe_features": "protocol: what it was fitted on",
    "probe_normalization": "protocol: normalisation of the features",
    "probe_n_train": "protocol: images it was fitted on",
    "probe_n_val": "protocol: images its strength was chosen on",
    "probe_n_test": "protocol: images it was tested on",
    "probe_seed": "protocol: seed of the split",
    "probe_strength": "protocol: chosen strength",
    "probe_selected_by": "protocol: what was best on the validation images",
    "probe_*": "protocol: a setting of the probe",
}
"""Scores and protocol of a probe."""
