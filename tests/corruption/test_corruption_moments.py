"""Stated moments against each corruption's own sampler: one Monte-Carlo test over all of them."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from mae_align.corruption import (
    AveragePool,
    BlockMasking,
    CleanImages,
    ComponentMasking,
    Compose,
    Corruption,
    ExactCorruption,
    FixedCountPatchMasking,
    GaussianBlur,
    GaussianNoise,
    LinearCorruption,
    MaskMixture,
    PatchMasking,
    RandomRatioMasking,
    SampledCorruption,
    VarianceShareMasking,
)
from mae_align.runtime.errors import InputError
from tests import oracles
from tests.oracles import SHAPE

D, BATCH, BATCHES = 60, 50, 300
# With the fixed seeds the largest of some thousand standard scores stays under this: P < 1e-6 each.
LIMIT = 5.2
RNG = np.random.default_rng(0)
X = oracles.draw(9, BATCH).x
MEAN = X.mean(0)
CLEAN = CleanImages((X - MEAN).T @ (X - MEAN) / BATCH, MEAN, SHAPE, images=X.reshape(BATCH, *SHAPE))
COMPONENTS = np.linalg.eigh(CLEAN.sxx + np.eye(D))[1]
PICTURE = RNG.normal(size=SHAPE) * 3
MASKS = RNG.random((7, *SHAPE)) < np.linspace(0.2, 0.8, 2)
FLAT_MASKS = RNG.random((3, *SHAPE[:2])) < 0.6

EXACT: dict[str, Corruption] = {
    "black patches": PatchMasking(2, 0.4, fill=0.0),
    "patches of a picture": PatchMasking((2, 4), 0.6, fill=PICTURE),
    "bright patches, one count": FixedCountPatchMasking(2, 4, fill=5.0),
    "bright patches, random ratio": RandomRatioMasking((3, 2), 0.1, 0.9, fill=-4.0),
    "one patch": PatchMasking((6, 5), 0.3, fill=2.0),
    "a list of masks": MaskMixture(MASKS, RNG.random(7)),
    "a list of masks of pixels, black": MaskMixture(FLAT_MASKS, fill=0.0),
    "blocks of pixels": BlockMasking(2, (0.1, 0.3), (0.4, 2.0)),
    "blocks of patches, a picture": BlockMasking(3, (0.05, 0.5), (1.0, 1.0), patch_size=2, fill=PICTURE),
    "one size of block": BlockMasking(1, (0.2, 0.2), (1.5, 1.5)),
    "components": ComponentMasking(COMPONENTS, 0.4),
    "some components": ComponentMasking(COMPONENTS, RNG.random(D)),
    "noise per pixel": GaussianNoise(np.abs(PICTURE)),
    "any matrix": LinearCorruption(RNG.normal(size=(D, D)) / 8),
    "blur": GaussianBlur(0.8),
    "pooling": AveragePool((4, 2)),
    "noise, then a mask": Compose(GaussianNoise(1.5), PatchMasking(2, 0.5)),
    "a mask, then noise": Compose(PatchMasking(2, 0.5), GaussianNoise(1.5)),
    "blur, then a mask to the mean image": Compose(GaussianBlur(1.0), PatchMasking(2, 0.5)),
    "black patches, then blur": Compose(PatchMasking(2, 0.5, fill=0.0), GaussianBlur(1.0)),
    "two masks with two fills": Compose(PatchMasking(3, 0.4, fill=1.0), PatchMasking((2, 5), 0.3, fill=-3.0)),
    "a fill, a list of masks, components": Compose(
        FixedCountPatchMasking(2, 5, fill=3.0), MaskMixture(MASKS), ComponentMasking(COMPONENTS, RNG.random(D))
    ),
    "blocks, pooling, blocks": Compose(BlockMasking(1, fill=2.0), AveragePool(2), BlockMasking(2, (0.1, 0.2))),
}


def drawn(corruption: Corruption, batches: int = BATCHES) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Per batch of all images: E[x'] - mean, second moments of x' - mean, and of x' - mean with x - mean."""
    images = np.tile(X.reshape(BATCH, *SHAPE), (batches, 1, 1, 1)).astype(np.float32)
    out = np.asarray(jax.jit(corruption.sample)(jax.random.key(5), images, MEAN.reshape(SHAPE).astype(np.float32)))
    assert out.dtype == np.float32
    moved = out.reshape(batches, BATCH, D).astype(np.float64) - MEAN
    return moved.mean(1), moved.transpose(0, 2, 1) @ moved / BATCH, moved.transpose(0, 2, 1) @ (X - MEAN) / BATCH


def assert_scores(per_batch: np.ndarray, expected: np.ndarray) -> None:
    """Standard scores under the limit; sampling is in float32, so nothing is closer than its rounding."""
    rounding = 2e-6 * np.abs(per_batch).max()
    error = np.sqrt(per_batch.var(0, ddof=1) / len(per_batch) + rounding**2)
    assert np.abs((per_batch.mean(0) - expected) / error).max() < LIMIT


@pytest.mark.parametrize("name", EXACT)
def test_exact_moments_are_those_of_the_sampler(name):
    corruption = EXACT[name]
    corruption.check(SHAPE)
    stated = corruption.moments(CLEAN)
    assert (stated.gram_se, stated.cross_se) == (0.0, 0.0)
    assert stated.gram.dtype == stated.cross.dtype == np.float64
    np.testing.assert_allclose(stated.gram, stated.gram.T, atol=1e-12)
    offset = np.broadcast_to(stated.offset, D)
    mean, gram, cross = drawn(corruption)
    assert_scores(mean, offset)
    assert_scores(gram, stated.keep * stated.gram + np.outer(offset, offset))
    assert_scores(cross, stated.keep * stated.cross)


@pytest.mark.parametrize("name", EXACT)
def test_moments_leave_those_before_them_as_they_are(name):
    before = CLEAN.sxx.copy()
    found = EXACT[name].moments(CLEAN)
    found.gram[:] = 7.0
    np.testing.assert_array_equal(CLEAN.sxx, before)


ESTIMATED: dict[str, Corruption] = {
    "a share of the variance": VarianceShareMasking(COMPONENTS, np.linspace(0.1, 3, D) ** 3, 0.5, draws=3000),
    "sampled patches": SampledCorruption(
        lambda image, key: PatchMasking(2, 0.5, fill=1.0).sample(key, image[None], image)[0], 40
    ),
    "a nonlinear function": SampledCorruption(
        lambda image, key: jax.nn.relu(image + jax.random.normal(key, image.shape, np.float32)), 40
    ),
    "sampled, then exact": Compose(
        SampledCorruption(lambda image, key: image * jax.random.uniform(key, (), np.float32), 40), PatchMasking(2, 0.3)
    ),
}


@pytest.mark.parametrize("name", ESTIMATED)
def test_estimated_moments_are_those_of_the_sampler_within_their_standard_error(name):
    stated = ESTIMATED[name].moments(CLEAN)
    offset = np.broadcast_to(stated.offset, D)
    mean, gram, cross = drawn(ESTIMATED[name])
    for per_batch, found, se in (
        (gram - mean.mean(0)[:, None] * mean.mean(0), stated.gram, stated.gram_se),
        (cross, stated.cross, stated.cross_se),
    ):
        sampling = np.sqrt(per_batch.var(0, ddof=1).sum() / BATCHES)
        error = np.linalg.norm(per_batch.mean(0) - found)
        both = np.hypot(sampling, se * np.linalg.norm(found))
        assert 0.0 < se < 0.2
        assert 0.3 * both < error < 2.5 * both
    assert np.linalg.norm(mean.mean(0) - offset) < 0.1 * np.sqrt(np.trace(CLEAN.sxx))


def test_composed_exactly_equals_pushed_by_hand_and_nesting_changes_nothing():
    first, second, third = GaussianNoise(1.0), PatchMasking(2, 0.5, fill=1.0), GaussianBlur(1.0)
    assert all(isinstance(part, ExactCorruption) for part in (first, second, third))
    by_hand = third.push(second.push(first.moments(CLEAN), CLEAN), CLEAN)
    for made in (Compose(first, second, third), Compose(Compose(first, second), third)):
        assert made.parts == (first, second, third)
        for a, b in zip(made.moments(CLEAN), by_hand, strict=True):
            np.testing.assert_array_equal(a, b)
    assert made.name == " + ".join(part.name for part in (first, second, third))


AFTER = [GaussianNoise(1.0), PatchMasking(2, 0.5, fill=9.0), MaskMixture(FLAT_MASKS, fill=9.0)]


@pytest.mark.parametrize("after", AFTER)
def test_randomness_after_a_mask_that_drops_everything_is_refused(after):
    with pytest.raises(InputError, match="drops everything"):
        Compose(PatchMasking(2, 1.0), after).moments(CLEAN)
