from __future__ import annotations

import jax
import numpy as np
import pytest
from flax import nnx

from mae_align.models import MLPAutoencoder, Pixels
from mae_align.runtime.errors import InputError

IMAGES = np.random.default_rng(0).integers(0, 256, (12, 4, 3, 2), dtype=np.uint8)
PIXELS = Pixels.from_images(IMAGES)


@pytest.mark.parametrize(
    "decoder_hidden, shapes", [((), [(3, 24)]), ((5, 6), [(3, 5), (5, 6), (6, 24)]), (None, [(3, 9), (9, 8), (8, 24)])]
)
def test_decoder_has_its_own_widths_and_the_encoder_keeps_its(decoder_hidden, shapes):
    model = MLPAutoencoder(PIXELS, hidden=(8, 9), decoder_hidden=decoder_hidden, latent=3, rngs=nnx.Rngs(0))
    assert [layer.kernel[...].shape for layer in model.up] == shapes
    assert [layer.kernel[...].shape for layer in model.down] == [(24, 8), (8, 9), (9, 3)]


def test_without_hidden_layers_the_decoder_is_affine_and_the_encoder_is_not():
    model = MLPAutoencoder(PIXELS, hidden=(8,), decoder_hidden=(), latent=3, rngs=nnx.Rngs(0))
    a, b = np.random.default_rng(1).normal(size=(2, 4, 3)).astype(np.float32)
    decode = jax.jit(model.decoder)
    np.testing.assert_allclose(decode(0.3 * a + 0.7 * b), 0.3 * decode(a) + 0.7 * decode(b), atol=1e-5)
    x, y = IMAGES[:6].astype(np.float32), IMAGES[6:].astype(np.float32)
    encode = jax.jit(model.encode)
    assert np.abs(encode(0.5 * x + 0.5 * y) - 0.5 * encode(x) - 0.5 * encode(y)).max() > 1e-2


def test_width_below_one_is_refused():
    with pytest.raises(InputError, match="hidden widths"):
        MLPAutoencoder(PIXELS, hidden=(8,), decoder_hidden=(4, 0), latent=3, rngs=nnx.Rngs(0))
