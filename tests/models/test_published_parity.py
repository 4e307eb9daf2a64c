"""Published masked autoencoders against transformers and timm, where these are installed (the extra "parity").

transformers makes no network for images that are no squares (5.24): its encoder sees them by interpolated positions
alone, and a whole one is compared with NumPy in test_published.py.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mae_align.corruption import FixedCountPatchMasking
from mae_align.models import Layout, MaskedAutoencoder, Pixels, Pooling, export_encoder, gelu_exact, load_mae

torch = pytest.importorskip("torch", reason="torch is in the extra parity")
transformers = pytest.importorskip("transformers", reason="transformers is in the extra parity")

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
DECODER = {
    "decoder_hidden_size": 24,
    "decoder_num_hidden_layers": 2,
    "decoder_num_attention_heads": 3,
    "decoder_intermediate_size": 48,
}
SIZES = {
    "odd grid": {**SMALL, **DECODER, "image_size": 12, "patch_size": 4, "mask_ratio": 0.5},
    "grey": {**SMALL, **DECODER, "image_size": 24, "patch_size": 8, "num_channels": 1, "mask_ratio": 0.75},
    "base": {"image_size": 224, "patch_size": 16},
}


def published(folder, **sizes):
    """A network of transformers with random weights and positions, written by it; a fresh one has zero positions."""
    torch.manual_seed(0)
    config = transformers.ViTMAEConfig(norm_pix_loss=True, **sizes)
    network = transformers.ViTMAEForPreTraining(config).eval()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.normal_(float("norm" in name and name.endswith("weight")), 0.03)
        network.vit.embeddings.position_embeddings.normal_(0, 0.5)
        network.decoder.decoder_pos_embed.normal_(0, 0.5)
    network.save_pretrained(folder)
    return network


def pictures(network):
    h, w, c = network.image_shape
    return np.random.default_rng(0).integers(0, 256, (2, h, w, c), dtype=np.uint8)


def as_torch(network, images):
    return torch.from_numpy(np.array(network.pixels.normalize(images)).transpose(0, 3, 1, 2))


@pytest.mark.parametrize("name", list(SIZES))
def test_encoder_decoder_and_loss_agree_with_transformers(name, tmp_path, record_property):
    theirs = published(tmp_path, **SIZES[name])
    ours = load_mae(tmp_path)
    images = pictures(ours)
    key = jax.random.key(0)
    order = np.asarray(ours.corruption.sample_order(key, len(images), ours.num_patches))
    noise = torch.from_numpy(np.argsort(order, axis=1).astype(np.float32))
    with torch.no_grad():
        x = as_torch(ours, images)
        found = theirs(x, noise=noise)
        kept = theirs.vit(x, noise=noise).last_hidden_state.numpy()
    np.testing.assert_array_equal(found.mask.numpy() > 0, np.argsort(order, 1) >= ours.corruption.num_visible)
    patches = ours.patchify(ours.pixels.normalize(images))
    visible = order[:, : ours.corruption.num_visible]
    seen = jnp.take_along_axis(patches, jnp.asarray(visible)[..., None], 1)
    tokens = ours._encode_tokens(seen, ours.positions[...][visible])
    predicted = ours.predict(images, key).prediction
    differences = {
        "encoder": abs(np.asarray(tokens) - kept).max(),
        "decoder": abs(np.asarray(predicted) - found.logits.numpy()).max(),
        "loss": abs(float(ours.loss(images, key)[0]) - float(found.loss)) / float(found.loss),
    }
    for what, difference in differences.items():
        record_property(what, float(difference))
        print(name, what, difference)
    assert differences["encoder"] < 1e-5 and differences["decoder"] < 1e-5 and differences["loss"] < 1e-6


@pytest.mark.parametrize("size", [(12, 20), (24, 16)])
def test_interpolated_positions_agree_with_transformers(size, tmp_path):
    theirs = published(tmp_path, **{**SIZES["odd grid"], "mask_ratio": 0.0})
    ours = load_mae(tmp_path, image_size=size)
    images = pictures(ours)
    order = torch.arange(ours.num_patches)[None].repeat(2, 1).float()
    with torch.no_grad():
        found = theirs.vit(as_torch(ours, images), noise=order, interpolate_pos_encoding=True).last_hidden_state
    np.testing.assert_allclose(ours.encode(images, Pooling.tokens), found.numpy(), atol=1e-5)


def own_network(**changes):
    """A network of ours with random weights, and pixel statistics that have to be folded."""
    rng = np.random.default_rng(1)
    images = (rng.normal(120, 40, (50, 8, 12, 3)) + np.linspace(-60, 60, 12)[:, None]).clip(0, 255).astype(np.uint8)
    sizes = {"width": 32, "depth": 2, "heads": 4, "decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2}
    network = MaskedAutoencoder(
        Pixels.from_images(images), corruption=FixedCountPatchMasking(4, 2), **sizes, **changes, rngs=nnx.Rngs(0)
    )
    state = nnx.state(network, nnx.Param)
    nnx.update(network, jax.tree.map(lambda leaf: leaf + 0.1 * rng.normal(size=leaf.shape).astype(np.float32), state))
    return network, images[:4]


@pytest.mark.parametrize("activation", [jax.nn.gelu, gelu_exact])
def test_exported_encoders_are_opened_by_transformers(activation, tmp_path):
    network, images = own_network(activation=activation)
    folder = export_encoder(network, tmp_path / "out")
    theirs, about = transformers.ViTMAEModel.from_pretrained(folder, output_loading_info=True)
    assert not about["missing_keys"] and not about["unexpected_keys"]
    pixels = torch.from_numpy((images / np.float32(255)).transpose(0, 3, 1, 2))
    order = torch.arange(6)[None].repeat(4, 1).float()
    with torch.no_grad():
        tokens = theirs.eval()(pixels, noise=order).last_hidden_state.numpy()
    np.testing.assert_allclose(tokens[:, 1:].mean(1), network.encode(images), atol=1e-5)
    # And back: what was exported is read as any published network.
    again = load_mae(folder)
    np.testing.assert_allclose(again.encode(images), network.encode(images), atol=1e-5)
    np.testing.assert_allclose(again.encode(images, Pooling.tokens), tokens, atol=1e-5)


def test_published_networks_are_exported_and_read_back(tmp_path):
    published(tmp_path / "theirs", **SIZES["odd grid"])
    network = load_mae(tmp_path / "theirs")
    images = pictures(network)
    theirs = transformers.ViTMAEModel.from_pretrained(export_encoder(network, tmp_path / "out")).eval()
    order = torch.arange(9)[None].repeat(2, 1).float()
    with torch.no_grad():
        tokens = theirs(torch.from_numpy((images / np.float32(255)).transpose(0, 3, 1, 2)), noise=order)
    np.testing.assert_allclose(tokens.last_hidden_state.numpy(), network.encode(images, Pooling.tokens), atol=1e-5)


def test_exported_encoders_are_opened_by_timm(tmp_path):
    timm = pytest.importorskip("timm", reason="timm is in the extra parity")
    from safetensors.torch import load_file

    network, images = own_network(activation=gelu_exact)
    folder = export_encoder(network, tmp_path / "out", Layout.timm)
    theirs = timm.models.VisionTransformer(
        img_size=(8, 12), patch_size=4, embed_dim=32, depth=2, num_heads=4, num_classes=0, global_pool="token"
    ).eval()
    theirs.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    with torch.no_grad():
        tokens = theirs.forward_features(torch.from_numpy((images / np.float32(255)).transpose(0, 3, 1, 2))).numpy()
    np.testing.assert_allclose(tokens[:, 1:].mean(1), network.encode(images), atol=1e-5)
