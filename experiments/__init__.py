"""What runs: ``python -m experiments`` lists it."""

import os as _os
import sys as _sys

# Figures are files. The backend that a notebook sets for itself would end a command at the import of matplotlib.
if "ipykernel" not in _sys.modules:
    _os.environ.pop("MPLBACKEND", None)


def _asked_for() -> str | None:
    """NAME of ``python -m experiments.NAME`` while Python looks for it; None at any other time."""
    if _sys.argv[:1] != ["-m"] or "-m" not in _sys.orig_argv:
        return None
    module = _sys.orig_argv[_sys.orig_argv.index("-m") + 1]
    return module.partition(".")[2] if module.startswith("experiments.") else None


if (_name := _asked_for()) is not None:
    from experiments.__main__ import ROOT as _ROOT
    from experiments.__main__ import main as _main

    # Python itself would only say that there is no such module.
    if not (_ROOT / f"{_name.replace('.', '/')}.py").exists() and not (_ROOT / _name / "__main__.py").exists():
        raise SystemExit(_main([_name]))
