"""What masked autoencoders make of images: restored in the units of the images, and as pictures."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from experiments.harness.figures import Column, picture_figure
from mae_align.models import Loss, MaskedAutoencoder


def restore(model: MaskedAutoencoder, images: jax.Array, key: jax.Array) -> jax.Array:
    """What a network makes of masked images; visible patches as they are, unless the loss is on them too.

    Args:
        images: [b, h, w, c] in stored units.
        key: of the masks.

    Returns:
        [b, h, w, c] float32 in stored units.
    """
    found = model.predict(images, key)
    own = model.patchify(model.pixels.normalize(images))
    patches = model.objective.pixels_of(found.prediction, own)
    if model.objective is not Loss.matched:
        patches = jnp.where(found.mask[:, :, None], patches, own)
    return model.pixels.restore(model.unpatchify(patches))


def pictures(model: MaskedAutoencoder, images: np.ndarray, like: np.ndarray, seed: int) -> Figure:
    """Inputs, what the network sees of them, and what it predicts, in the units in which it does.

    With normalised patches the network says nothing about the mean and the contrast of a hidden patch: its prediction
    is shown beside the normalised target, and once more with the true mean and contrast of each patch lent to it.
    """
    given = jnp.asarray(images, jnp.float32)
    found = model.predict(given, jax.random.key(seed))
    hidden = found.mask[:, :, None]
    target = model.targets(given)
    pasted = jnp.where(hidden, found.prediction, target)
    painted = np.asarray(model.unpatchify(jnp.broadcast_to(hidden, target.shape)))[..., 0]

    def in_pixels(patches: jax.Array) -> np.ndarray:
        """Stored units; where targets are normalised per patch, with the statistics of the true patches."""
        restored = model.objective.pixels_of(patches, model.patchify(model.pixels.normalize(given)))
        return np.asarray(model.pixels.restore(model.unpatchify(restored)))

    columns = [
        Column.pixels("input", images, like),
        Column.pixels("visible patches", images, like, painted),
    ]
    if model.objective is Loss.standard:
        columns += [
            Column.normalised("target: patches\nnormalised", np.asarray(model.unpatchify(target))),
            Column.normalised("prediction, visible\npatches pasted", np.asarray(model.unpatchify(pasted))),
            Column.pixels("the same, with\ntrue contrasts", in_pixels(pasted), like),
        ]
        caption = (
            "The loss normalises each patch: the network predicts patterns of mean 0 and variance 1 in hidden patches; "
            "grey is the mean of a patch. Visible patches are those of the target beside the prediction, those of the "
            "input in the last column. There the mean and the contrast of every hidden patch are those of the input, "
            "too: the network does not predict them."
        )
    else:
        columns += [
            Column.pixels("prediction\nof all patches", in_pixels(found.prediction), like),
            Column.pixels("prediction, visible\npatches pasted", in_pixels(pasted), like),
        ]
        caption = (
            "The loss is on all pixels, of visible patches too."
            if model.objective is Loss.matched
            else "The loss is on hidden patches alone: what is predicted for visible ones was never trained."
        )
    return picture_figure(columns, caption)
