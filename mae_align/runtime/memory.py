"""How much memory a problem takes, so that one that cannot fit is refused before any work."""

from __future__ import annotations

import os
from pathlib import Path

from mae_align.runtime.errors import InputError

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")
# Pixel values that the dual holds in float64 at a time.
PIXELS_AT_ONCE = 2048


def available_bytes() -> int | None:
    """Memory that this process can still get: free or reclaimable, within the limit of its container.

    Returns:
        Bytes; None where the system does not tell.

    Example:
        >>> available_bytes() is None or available_bytes() > 0
        True
    """
    found = []
    try:
        lines = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines())
        found.append(1024 * int(lines["MemAvailable"].split()[0]))
    except (OSError, KeyError, ValueError):
        try:
            found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
        except (AttributeError, ValueError, OSError):
            return None
    try:
        limit = int((_CGROUP / "memory.max").read_text())  # "max" without a limit
        used = int((_CGROUP / "memory.current").read_text()) - _reclaimable()
        found.append(min(max(limit - used, 0), limit))
    except (OSError, ValueError):
        pass
    return min(found)


def _reclaimable() -> int:
    """Bytes of the container's files in memory, which the system drops when it needs the room."""
    try:
        lines = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        return int(lines["inactive_file"]) + int(lines["active_file"])
    except (OSError, ValueError, KeyError):
        return 0


def accumulator_bytes(d: int, q: int, groups: int) -> int:
    """Memory to sum second moments: sums of 5 bytes for each entry and group, and their float64 copies at the end.

    Args:
        d: number of pixel values.
        q: target columns.
        groups: of the samples.

    Returns:
        About 21 g d^2 + 21 g d q + 16 g q^2 bytes.

    Example:
        >>> accumulator_bytes(1000, 0, 1) / 1e6
        21.0
    """
    return groups * (21 * d**2 + 21 * d * q + 16 * q**2)


def primal_bytes(d: int) -> int:
    """Memory to factorise second moments: S three times, its eigenvectors, and three times the same in LAPACK.

    Args:
        d: number of pixel values.

    Returns:
        56 d^2 bytes, beside the moments themselves (8 d^2 for each group).

    Example:
        >>> primal_bytes(3072) / 2**30 < 0.5
        True
    """
    return 8 * 7 * d**2


def dual_bytes(n: int, d: int) -> int:
    """Memory to factorise n samples: the same of n x n, and a block of pixels in float64.

    Args:
        n: number of samples.
        d: number of pixel values.

    Returns:
        56 n^2 + 24 n PIXELS_AT_ONCE bytes, beside the images themselves.

    Example:
        >>> dual_bytes(1500, 150528) / 2**30 < 0.3
        True
    """
    return 8 * (7 * n**2 + 3 * n * min(d, PIXELS_AT_ONCE))


def sweep_bytes(rank: int, workers: int, bases: int, points: int, max_k: int, targets: int, groups: int) -> int:
    """Memory of a sweep of a factorised problem, beside the projected held-out data.

    Bases of 3 r^2 numbers, at most ``2 workers + 1`` of them, 10 r^2 in each running solve, and what every point keeps.

    Args:
        rank: r.
        workers: solves at a time.
        bases: pairs of patch size and noise.
        points: cells of the grid.
        max_k: number of features.
        targets: q.
        groups: of held-out samples, 0 without.

    Returns:
        8 r^2 (3 min(bases, 2 workers + 1) + 10 min(points, workers)) + 16 points max_k (q + 2 groups + 8) bytes.

    Example:
        >>> sweep_bytes(1499, 2, 3, 20, 1499, 10, 20) / 2**30 < 1
        True
    """
    square = 3 * min(bases, 2 * workers + 1) + 10 * min(points, workers)
    return 8 * (rank**2 * square + 2 * points * max_k * (targets + 2 * groups + 8))


def check_memory(needed: int, what: str, remedy: str) -> None:
    """Refuse what cannot fit.

    Args:
        needed: bytes.
        what: the work, for the message.
        remedy: what to do instead.

    Raises:
        InputError: more is needed than :func:`available_bytes`.
    """
    available = available_bytes()
    if available is not None and needed > available:
        raise InputError(
            f"{what} takes about {needed / 1e9:.3g} GB of memory and {available / 1e9:.3g} GB are available: {remedy}"
        )
