from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys

import mae_align as ma

# What `import mae_align` need not pay for: figures, other loaders, training.
HEAVY = ["matplotlib", "sklearn", "PIL", "optax", "flax", "orbax", "grain", "tensorflow", "tensorflow_datasets"]

PROBE = """
import json, sys
import mae_align
import jax
import numpy as np
print(json.dumps({
    "loaded": [name for name in HEAVY if name in sys.modules],
    "x64": jax.config.jax_enable_x64,
    "float": str(jax.numpy.ones(()).dtype),
    "star": sorted(mae_align.__all__),
}))
"""


def test_importing_the_package_loads_nothing_heavy_and_changes_no_setting():
    """In a fresh interpreter, where a warning is an error."""
    code = PROBE.replace("HEAVY", repr(HEAVY))
    out = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stderr
    found = json.loads(out.stdout)
    assert found["loaded"] == []
    assert (found["x64"], found["float"]) == (False, "float32")
    assert found["star"] == sorted(ma.__all__)


def test_the_package_is_found_beside_a_folder_of_its_name(tmp_path):
    """Where scripts lie beside the clone: its folder, without an __init__.py, must not pass for the package."""
    (tmp_path / "mae_align").mkdir()
    code = "import mae_align, experiments.harness.cli; print(mae_align.__file__)"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert out.returncode == 0 and out.stdout.strip().endswith("__init__.py"), out.stderr


def test_every_public_name_exists_and_says_what_it_is():
    for name in ma.__all__:
        thing = getattr(ma, name)
        if name != "__version__":
            assert inspect.getdoc(thing), name
            assert thing.__module__.startswith("mae_align."), name
    assert ma.__version__.count(".") == 2
