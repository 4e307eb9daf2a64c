"""One task: targets for some rows of a data set."""

from __future__ import annotations

import dataclasses
import enum

import numpy as np


class TaskKind(enum.Enum):
    """What a task asks for; the value is the word in tables."""

    FINE_LABELS = "fine labels"
    COARSE_LABELS = "coarse labels"
    CLASS_SUBSET = "class subset"
    CLASS_PAIR = "class pair"
    BRIGHTNESS = "brightness"
    CONTRAST = "contrast"
    POSITION = "position"
    TOP_COMPONENTS = "top components"
    BOTTOM_COMPONENTS = "bottom components"


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """Targets for some rows of a data set.

    Attributes:
        name: for tables; unique within :func:`standard_tasks`.
        kind: what it asks for.
        train_targets: [n'] int64 labels in 0..num_classes - 1, or [n', q] float64 numbers with mean 0 and variance 1 in
            training; one per row below.
        test_targets: likewise.
        num_classes: for labels; None for numbers.
        train_rows: [n'] int64 positions of the images they belong to, ascending.
        test_rows: likewise.
        restricted: whether some images are left out.
    """

    name: str
    kind: TaskKind
    train_targets: np.ndarray
    test_targets: np.ndarray
    num_classes: int | None
    train_rows: np.ndarray
    test_rows: np.ndarray
    restricted: bool

    def tested_on(self, rows: np.ndarray) -> Task:
        """The same task with some of the test images as all of them.

        Args:
            rows: [m] their positions among the test images, ascending.

        Returns:
            The task, with positions among these.

        Example:
            >>> rows = np.arange(4)
            >>> task = Task("a", TaskKind.FINE_LABELS, rows % 2, rows % 2, 2, rows, rows, restricted=False)
            >>> some = task.tested_on(np.array([1, 2]))
            >>> some.test_rows.tolist(), some.test_targets.tolist()
            ([0, 1], [1, 0])
        """
        inside = np.isin(self.test_rows, rows)
        positions = np.searchsorted(rows, self.test_rows[inside])
        return dataclasses.replace(self, test_rows=positions, test_targets=self.test_targets[inside])
