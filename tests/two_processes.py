"""Starts a script several times as the processes of one distributed run on this machine, for tests.

The script calls `mae_align.runtime.processes.start_distributed()` before any JAX computation and leaves its results
in files (what is printed may be mixed with lines of the communication library).
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextlib.contextmanager
def started(
    script: str | Path,
    *arguments: object,
    count: int = 2,
    devices: int = 2,
    environment: Mapping[str, str] | None = None,
) -> Iterator[list[subprocess.Popen[str]]]:
    """The running processes; killed at the end, if they still run.

    Args:
        script: a file, run as `python SCRIPT ARGUMENTS`, or "-m MODULE".
        count: processes. devices: virtual CPU devices of each. environment: more variables.
    """
    program = str(script).split() if str(script).startswith("-m ") else [str(script)]
    shared = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "MAE_ALIGN_COORDINATOR": f"127.0.0.1:{free_port()}",
        "MAE_ALIGN_NUM_PROCESSES": str(count),
    }
    running = [
        subprocess.Popen(
            [sys.executable, *program, *map(str, arguments)],
            env=shared | {"MAE_ALIGN_PROCESS_ID": str(i)} | dict(environment or {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(count)
    ]
    try:
        yield running
    finally:
        for process in running:
            process.kill()
            process.communicate()


def run_processes(
    script: str | Path,
    *arguments: object,
    count: int = 2,
    devices: int = 2,
    environment: Mapping[str, str] | None = None,
    timeout: float = 60.0,
) -> list[str]:
    """Run to the end.

    Returns:
        What each process printed; a process that fails fails the test, with what it printed.
    """
    with started(script, *arguments, count=count, devices=devices, environment=environment) as running:
        outputs = [process.communicate(timeout=timeout)[0] for process in running]
        for process, output in zip(running, outputs, strict=True):
            assert process.returncode == 0, output
        return outputs
