"""What training experiments report: every column of their tables has a line."""

from __future__ import annotations

from fnmatch import fnmatchcase

import numpy as np
import pytest

from experiments.harness.config import RunConfig
from experiments.harness.data import Split
from experiments.harness.ensembles import Member, Probe
from experiments.harness.probes import NETWORK, PROBES, Encoded, Features, probe_rows
from experiments.harness.report import COLUMNS, result_rows
from experiments.harness.run import Run


@pytest.mark.parametrize("probe", list(Probe))
def test_every_column_of_the_results_has_a_line(probe, tmp_path):
    """Whole runs are slow tests; the columns must not wait for them."""
    assert set(PROBES) == set(Probe)
    config = RunConfig(max_train=60, max_test=40, out=str(tmp_path / "run"))
    split = Split.load(config)
    run = Run("toy", config, split, COLUMNS)
    kinds = [
        Features(NETWORK, 0, lambda: Encoded.of(lambda x: x.reshape(len(x), -1)[:, 20:24] / np.float32(16), split), "")
    ]
    rows = result_rows([Member(0, 0.1)], probe_rows(run, [probe], kinds, 0), [0])
    run.table("results", rows)
    for name in {name for row in rows for name in row}:
        assert any(fnmatchcase(name, pattern) for pattern in COLUMNS), name
    text = (tmp_path / "run" / "columns.md").read_text()
    assert "- `accuracy_test`: accuracy of the probe on test images" in text
