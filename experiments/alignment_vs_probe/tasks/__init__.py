"""Many tasks from one labelled image set: what the same features are asked for, from labels to hidden detail.

A reconstruction that serves one task may fail another. So encoders are compared on many: the labels and what can be
made of them (coarse groups, subsets, pairs), and quantities of the image itself (brightness, contrast, position, scores
along principal components of large and of small variance). Everything is a pure function of the data set, the moments
of its training images and a seed; numbers are standardised by the training rows, so that all columns of a task weigh
the same.
"""

from experiments.alignment_vs_probe.tasks.labels import (
    CLASS_GROUPS,
    class_pairs,
    class_subset,
    class_subsets,
    coarse_labels,
    fine_labels,
)
from experiments.alignment_vs_probe.tasks.numbers import (
    bottom_components,
    brightness,
    components_with_variance,
    contrast,
    position,
    top_components,
)
from experiments.alignment_vs_probe.tasks.standard import standard_tasks
from experiments.alignment_vs_probe.tasks.task import Task, TaskKind

__all__ = [
    "CLASS_GROUPS",
    "Task",
    "TaskKind",
    "bottom_components",
    "brightness",
    "class_pairs",
    "class_subset",
    "class_subsets",
    "coarse_labels",
    "components_with_variance",
    "contrast",
    "fine_labels",
    "position",
    "standard_tasks",
    "top_components",
]
