"""Direct float64 solutions from the definitions, in NumPy and SciPy. Nothing here uses the package that is tested."""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import numpy as np
import scipy.linalg
from sklearn.datasets import load_digits
from sklearn.linear_model import LinearRegression

Shape = tuple[int, int, int]
Patch = int | tuple[int, int]


class Sample(NamedTuple):
    """Images [n, h, w, c], class labels [n] and one-hot targets [n, q]."""

    images: np.ndarray
    labels: np.ndarray
    y: np.ndarray

    @property
    def x(self) -> np.ndarray:
        return self.images.reshape(len(self.images), -1).astype(np.float64)


class Stats(NamedTuple):
    """Covariances about the means, and the uncentred second moment of the targets."""

    sxx: np.ndarray
    sxy: np.ndarray
    syy: np.ndarray
    yty: np.ndarray


class Direct(NamedTuple):
    """Curves over k and encoder columns of a generalised eigenproblem."""

    v: np.ndarray
    mu: np.ndarray
    r2: np.ndarray
    alignment: np.ndarray
    reconstruction: np.ndarray


SHAPE: Shape = (6, 5, 2)
CLASSES = 4


def draw(seed: int, n: int, shape: Shape = SHAPE, classes: int = CLASSES) -> Sample:
    """Smooth-ish correlated images whose classes are unbalanced and only partly linear in the pixels."""
    fixed, rng = np.random.default_rng(77), np.random.default_rng(seed)
    d = math.prod(shape)
    h, w, c = np.indices(shape).reshape(3, -1)
    distance = (h[:, None] - h) ** 2 + (w[:, None] - w) ** 2 + 2.0 * (c[:, None] - c) ** 2
    prior = np.exp(-distance / 6.0) * np.outer(scale := fixed.uniform(0.5, 2.0, d), scale) + 0.05 * np.eye(d)
    teacher = fixed.normal(size=(d, classes)) / math.sqrt(d)
    z = rng.normal(size=(n, d)) @ np.linalg.cholesky(prior).T
    scores = z @ teacher + 0.3 * rng.normal(size=(n, classes)) + np.linspace(0.8, -0.8, classes)
    labels = scores.argmax(1)
    return Sample((z + fixed.normal(size=d)).reshape(n, *shape), labels, np.eye(classes)[labels])


@cache
def train() -> Sample:
    return draw(1, 400)


@cache
def held_out() -> Sample:
    return draw(2, 250)


@cache
def unbalanced_digits() -> Sample:
    """The first 4 classes of scikit-learn's digits, 8 x 8, with 150, 90, 50 and 25 images."""
    pixels, labels = (np.asarray(a) for a in load_digits(return_X_y=True))
    counts = {0: 150, 1: 90, 2: 50, 3: 25}
    take = np.concatenate([np.flatnonzero(labels == digit)[:count] for digit, count in counts.items()])
    images = pixels[take].reshape(-1, 8, 8, 1).astype(np.uint8)
    return Sample(images, labels[take], np.eye(4)[labels[take]])


def stats(x: np.ndarray, y: np.ndarray) -> Stats:
    xc, yc = x - x.mean(0), y - y.mean(0)
    n = len(x)
    return Stats(xc.T @ xc / n, xc.T @ yc / n, yc.T @ yc / n, y.T @ y / n)


def patch_members(shape: Shape, patch: Patch) -> list[np.ndarray]:
    """Flat pixel indices of every patch, corner by corner; border patches are cut off by the image."""
    height, width, channels = shape
    ph, pw = (patch, patch) if isinstance(patch, int) else patch
    index = np.arange(height * width * channels).reshape(shape)
    return [
        index[top : top + ph, left : left + pw].reshape(-1)
        for top in range(0, height, ph)
        for left in range(0, width, pw)
    ]


def pair_matrix(shape: Shape, patch: Patch, keep: float, both: float) -> np.ndarray:
    """M_ij = P(pixels i and j both kept): ``keep`` within a patch, ``both`` between two patches."""
    m = np.full((math.prod(shape),) * 2, both)
    for members in patch_members(shape, patch):
        m[np.ix_(members, members)] = keep
    return m


def bernoulli(p: float) -> tuple[float, float]:
    """Keep and pair probabilities of independent dropping; p = 1 stands for the limit of both over keep."""
    return (1.0 - p, (1.0 - p) ** 2) if p < 1 else (1.0, 0.0)


def fixed_count(visible: int, patches: int) -> tuple[float, float]:
    return visible / patches, visible * (visible - 1) / (patches * (patches - 1))


def uniform_ratio(low: float, high: float, points: int = 64) -> tuple[float, float]:
    """E[1 - p] and E[(1 - p)^2] for p uniform on [low, high], by Gauss-Legendre quadrature."""
    node, weight = np.polynomial.legendre.leggauss(points)
    kept = 1.0 - (low + (high - low) * (node + 1) / 2)
    return float(weight @ kept / 2), float(weight @ kept**2 / 2)


def top_directions(weight: np.ndarray, gram: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Solutions of weight v = mu gram v, largest mu first."""
    mu, v = scipy.linalg.eigh((weight + weight.T) / 2, (gram + gram.T) / 2)
    return mu[::-1], v[:, ::-1]


def targets_of(v: np.ndarray, sxx: np.ndarray, sxy: np.ndarray) -> np.ndarray:
    """t = Q^T Y / sqrt n for features with Gram matrix V^T Sxx V = L L^T, whose leading blocks serve every k."""
    return scipy.linalg.solve_triangular(np.linalg.cholesky(v.T @ sxx @ v), v.T @ sxy, lower=True)


def r2_of(v: np.ndarray, m: Stats) -> np.ndarray:
    return np.cumsum((targets_of(v, m.sxx, m.sxy) ** 2).sum(1)) / np.trace(m.syy)


def solve(
    m: Stats,
    shape: Shape,
    patch: Patch = 1,
    chances: tuple[float, float] = (1.0, 1.0),
    *,
    sigma: float = 0.0,
    lam: float = math.inf,
    contrast: bool = False,
) -> Direct:
    """x' = mask(x + noise): top solutions of (lam A A^T + B B^T) v = mu G v, or of E[x'_1 x'_2^T] v = omega G v."""
    keep, both = chances
    gram = (m.sxx + sigma**2 * np.eye(len(m.sxx))) * pair_matrix(shape, patch, keep, both)
    cross, task = keep * m.sxx, keep * m.sxy
    weight = cross @ cross.T if math.isinf(lam) else lam * cross @ cross.T + task @ task.T
    mu, v = top_directions(keep**2 * m.sxx if contrast else weight, gram)
    t = targets_of(v, m.sxx, m.sxy)
    score = np.cumsum(((t @ m.yty) * t).sum(1))
    pixels = np.cumsum((targets_of(v, m.sxx, m.sxx) ** 2).sum(1))
    return Direct(v, mu, r2_of(v, m), score / score[-1], np.trace(m.sxx) - pixels)


def alignment_from_samples(v: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The published ratio: sum of ||Y Y^T q_i||^2 over i <= k, Y [n, q] not centred, q_i from QR of the features."""
    q, _ = np.linalg.qr((x - x.mean(0)) @ v)
    score = np.cumsum([np.linalg.norm(y @ (y.T @ column)) ** 2 for column in q.T])
    return score / score[-1]


def predicted_r2(v: np.ndarray, fit: Sample, test: Sample) -> np.ndarray:
    """Held-out r2 of real predictions, k = 1, 2, ...: scikit-learn's least squares on the features of clean images."""
    total = ((test.y - fit.y.mean(0)) ** 2).sum()
    out = []
    for k in range(1, v.shape[1] + 1):
        model = LinearRegression().fit(fit.x @ v[:, :k], fit.y)
        out.append(1.0 - ((test.y - model.predict(test.x @ v[:, :k])) ** 2).sum() / total)
    return np.array(out)


def angles(a: np.ndarray, b: np.ndarray, metric: np.ndarray) -> np.ndarray:
    """Principal angles (radians, descending) between the features a^T x and b^T x, x of covariance ``metric``."""
    root = np.linalg.cholesky(metric)
    return scipy.linalg.subspace_angles(root.T @ a, root.T @ b)


def enumerate_masks(shape: Shape, patch: Patch) -> tuple[np.ndarray, np.ndarray]:
    """Every mask of few patches: [2^N, d] of zeros and ones, and the number of kept patches of each."""
    members = patch_members(shape, patch)
    masks = np.zeros((2 ** len(members), math.prod(shape)))
    for code in range(len(masks)):
        for bit, pixels in enumerate(members):
            masks[code, pixels] = code >> bit & 1
    return masks, np.array([code.bit_count() for code in range(len(masks))])


def extended_cholesky(a: np.ndarray) -> np.ndarray:
    """Cholesky factor in the machine's longest floating point type (LAPACK stops at float64)."""
    a = np.array(a, np.longdouble)
    for j in range(len(a)):
        a[j:, j] = (a[j:, j] - a[j:, :j] @ a[j, :j]) / np.sqrt(a[j, j] - a[j, :j] @ a[j, :j])
        a[j, j + 1 :] = 0
    return a


def extended_forward(lower: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Solve lower x = b by forward substitution."""
    x = np.array(b, np.longdouble)
    for i in range(len(lower)):
        x[i] = (x[i] - lower[i, :i] @ x[:i]) / lower[i, i]
    return x


def extended_left_vectors(a: np.ndarray, sweeps: int = 12) -> np.ndarray:
    """Left singular vectors, largest singular value first, by one-sided Jacobi rotations of the rows."""
    a = np.array(a, np.longdouble)
    vectors = np.eye(len(a), dtype=np.longdouble)
    for _ in range(sweeps):
        for i in range(len(a) - 1):
            for j in range(i + 1, len(a)):
                inner = a[i] @ a[j]
                zeta = (a[j] @ a[j] - a[i] @ a[i]) / (2 * inner) if inner else np.longdouble(0)
                if not inner:
                    continue
                tangent = np.copysign(1, zeta) / (abs(zeta) + np.sqrt(1 + zeta**2))
                cosine = 1 / np.sqrt(1 + tangent**2)
                rotation = np.array([[cosine, -cosine * tangent], [cosine * tangent, cosine]])
                a[[i, j]] = rotation @ a[[i, j]]
                vectors[[i, j]] = rotation @ vectors[[i, j]]
    order = np.argsort(-(a**2).sum(1))
    return vectors[order].T


def extended_denoising(s: np.ndarray, gram: np.ndarray, sxy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Theorem 3 with A = S in extended precision: encoder columns and their targets t, every k."""
    lower = extended_cholesky(gram)
    left = extended_left_vectors(extended_forward(lower, s))
    # V = L^-T left: solved backwards as a forward substitution in reversed order.
    flipped = extended_forward(lower.T[::-1, ::-1], left[::-1])
    v = flipped[::-1]
    return v, extended_forward(extended_cholesky(v.T @ np.array(s, np.longdouble) @ v), v.T @ sxy)
