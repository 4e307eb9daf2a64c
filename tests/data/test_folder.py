from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mae_align.data import source
from mae_align.data.dataset import ImageDataset
from mae_align.data.folder import open_folder
from mae_align.data.registry import load_dataset
from mae_align.data.source import in_memory
from mae_align.runtime.errors import InputError


def load(root: Path, image_size: int | None = None, seed: int = 0, test_fraction: float = 0.25) -> ImageDataset:
    return in_memory(open_folder(root, image_size, seed, test_fraction))


def pixels(seed: int, shape: tuple[int, ...] = (6, 5, 3)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def write(path: Path, array: np.ndarray | Image.Image) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    (array if isinstance(array, Image.Image) else Image.fromarray(array)).save(path)


def write_classes(root: Path, names=("cat", "dog"), each: int = 4, shape=(6, 5, 3)) -> Path:
    for label, name in enumerate(names):
        for i in range(each):
            write(root / name / f"{i}.png", pixels(100 * label + i, shape))
    return root


def test_split_folder_is_read_back(tmp_path):
    data = load(write_classes(tmp_path / "pets"))
    assert (len(data.train_labels), len(data.test_labels)) == (6, 2)
    assert data.class_names == ("cat", "dog") and data.name == "pets"
    found = {
        (int(label), image.tobytes())
        for images, labels in (
            (data.train_images, data.train_labels),
            (data.test_images, data.test_labels),
        )
        for image, label in zip(images, labels, strict=True)
    }
    assert found == {(k, pixels(100 * k + i).tobytes()) for k in range(2) for i in range(4)}
    assert sorted(data.test_labels.tolist()) == [0, 1]


def test_split_follows_the_seed(tmp_path):
    write_classes(tmp_path, each=12)
    tests = [load(tmp_path, seed=seed).test_images for seed in (1, 1, 2)]
    np.testing.assert_array_equal(tests[0], tests[1])
    assert not np.array_equal(tests[0], tests[2])


@pytest.mark.parametrize("held_out", ["test", "val", "validation"])
def test_train_and_test_folders(tmp_path, held_out):
    write_classes(tmp_path / "train", each=3)
    for label, name in enumerate(("cat", "dog")):
        write(tmp_path / held_out / name / "deeper" / "x.PNG", pixels(50 + label))
    data = load(tmp_path)
    assert data.train_labels.tolist() == [0, 0, 0, 1, 1, 1]
    np.testing.assert_array_equal(data.train_images[4], pixels(101))
    np.testing.assert_array_equal(data.test_images, [pixels(50), pixels(51)])


def test_test_goes_before_val(tmp_path):
    for part, each in (("train", 3), ("val", 2), ("test", 1)):
        write_classes(tmp_path / part, each=each)
    assert len(load(tmp_path).test_labels) == 2


def test_train_folder_alone_is_split(tmp_path):
    write_classes(tmp_path / "train")
    assert len(load(tmp_path).test_labels) == 2


def test_a_class_may_be_called_train(tmp_path):
    assert load(write_classes(tmp_path, ("bus", "train"))).class_names == ("bus", "train")


def test_hidden_and_other_files_are_left_out(tmp_path):
    write_classes(tmp_path)
    write(tmp_path / ".git" / "a.png", pixels(0))
    write(tmp_path / "__MACOSX" / "a.png", pixels(0))
    write(tmp_path / "cat" / "._0.png", pixels(0))
    (tmp_path / "cat" / "readme.txt").write_text("cats")
    assert load(tmp_path).num_classes == 2 and len(load(tmp_path).train_labels) == 6


def test_grey_images_keep_one_channel(tmp_path):
    write_classes(tmp_path, shape=(6, 5))
    bits = Image.fromarray(pixels(3, (6, 5))).convert("1")
    write(tmp_path / "dog" / "bits.png", bits)
    data = load(tmp_path)
    assert data.image_shape == (6, 5, 1)
    images = np.concatenate([data.train_images, data.test_images])[..., 0]
    for expected in (pixels(0, (6, 5)), np.asarray(bits, np.uint8) * 255):
        assert any(np.array_equal(image, expected) for image in images)


def test_palette_alpha_and_grey_become_rgb(tmp_path):
    colour = Image.fromarray(pixels(0))
    with_alpha = Image.fromarray(pixels(1, (6, 5, 4)))
    palette = Image.new("P", (5, 6), 1)
    palette.putpalette([9, 9, 9, 10, 20, 30])
    palette.info["transparency"] = b"\x00\xff"
    grey_alpha = Image.merge("LA", [Image.new("L", (5, 6), 70), Image.new("L", (5, 6), 0)])
    pictures = [colour, with_alpha, palette, grey_alpha, Image.fromarray(pixels(2, (6, 5)))]
    for part in ("train", "test"):
        for name in ("a", "b"):
            for i, picture in enumerate(pictures):
                write(tmp_path / part / name / f"{i}.png", picture)
    images = load(tmp_path).train_images[:5]
    np.testing.assert_array_equal(images[0], pixels(0))
    np.testing.assert_array_equal(images[1], pixels(1, (6, 5, 4))[..., :3])
    assert (images[2] == [10, 20, 30]).all() and (images[3] == 70).all()
    np.testing.assert_array_equal(images[4], np.repeat(pixels(2, (6, 5))[..., None], 3, axis=2))


def test_palette_alone_is_rgb(tmp_path):
    picture = Image.fromarray(pixels(0, (6, 5))).convert("P")
    for name in ("a/1.gif", "a/2.gif", "b/1.gif", "b/2.gif"):
        write(tmp_path / name, picture)
    assert load(tmp_path).image_shape == (6, 5, 3)


def test_mixed_sizes_are_resized_only_on_request(tmp_path):
    write_classes(tmp_path)
    write(tmp_path / "dog" / "9.png", np.full((9, 12, 3), 77, np.uint8))
    message = r"9\.png is 12 x 9 pixels but .* is 5 x 6: pass image_size"
    with pytest.raises(InputError, match=message):
        load(tmp_path)
    data = load(tmp_path, image_size=4)
    assert data.image_shape == (4, 4, 3)
    images = np.concatenate([data.train_images, data.test_images])
    assert any((image == 77).all() for image in images)
    box = (0, 0.5, 5, 5.5)
    expected = Image.fromarray(pixels(0)).resize((4, 4), Image.Resampling.BICUBIC, box=box)
    assert any(np.array_equal(image, np.asarray(expected)) for image in images)


@pytest.mark.parametrize("damage", ["text", "empty", "cut"])
def test_corrupt_images_are_named(tmp_path, damage):
    write_classes(tmp_path, shape=(40, 40, 3))
    path = tmp_path / "dog" / "2.png"
    content = path.read_bytes()
    path.write_bytes({"text": b"not an image", "empty": b"", "cut": content[:2000]}[damage])
    with pytest.raises(InputError, match=r"cannot read the image .*2\.png \(.*\): replace"):
        load(tmp_path)


def test_corrupt_jpeg_is_named(tmp_path):
    write_classes(tmp_path, shape=(40, 40, 3))
    path = tmp_path / "cat" / "5.jpg"
    write(path, pixels(0, (40, 40, 3)))
    path.write_bytes(path.read_bytes()[:1500])
    with pytest.raises(InputError, match=r"cannot read the image .*5\.jpg \(.*truncated"):
        load(tmp_path)


@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
def test_deep_images_are_read_in_full_and_never_beside_others(tmp_path, dtype):
    deep = [(65535 * np.random.default_rng(i).random((6, 5))).astype(dtype) for i in range(8)]
    for i, array in enumerate(deep):
        write(tmp_path / "cd"[i % 2] / f"{i}.tif", array)
    data = load(tmp_path)
    images = np.concatenate([data.train_images, data.test_images])[..., 0]
    assert images.dtype == np.float32
    assert sorted(image.tobytes() for image in images) == sorted(a.astype(np.float32).tobytes() for a in deep)
    write(tmp_path / "c" / "grey.png", pixels(0, (6, 5)))
    with pytest.raises(InputError, match=r"\.tif has 16 bits per pixel and .*grey\.png 8: bring all to one depth"):
        load(tmp_path)


def test_missing_and_empty_folders(tmp_path):
    with pytest.raises(InputError, match=r"no folder .*nowhere: give a folder with one sub-folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"holds 0 sub-folder\(s\)"):
        load(tmp_path)
    write_classes(tmp_path, ("cat",))
    with pytest.raises(InputError, match=r"holds 1 sub-folder\(s\)"):
        load(tmp_path)
    (tmp_path / "dog").mkdir()
    with pytest.raises(InputError, match=r"dog holds no image file \(\.bmp .* \.webp\)"):
        load(tmp_path)


def test_single_image_of_a_class_is_named(tmp_path):
    write_classes(tmp_path)
    write(tmp_path / "eel" / "1.png", pixels(0))
    with pytest.raises(InputError, match=r"class\(es\) \['eel'\] have a single sample"):
        load(tmp_path)


def test_classes_must_agree(tmp_path):
    write_classes(tmp_path / "train", ("ant", "bee", "cat"))
    write_classes(tmp_path / "test", ("ant", "bee"))
    assert load(tmp_path).notes == ("test/ has no image of cat",)
    write_classes(tmp_path / "test", [*"defghi", "cat"])
    with pytest.raises(
        InputError, match=r"classes differ: .*test has d, e, f, g, h and 1 more, of which .*train has no images"
    ):
        load(tmp_path)


def test_test_folder_without_train(tmp_path):
    write_classes(tmp_path / "test")
    with pytest.raises(InputError, match=r"holds test/ but no train/"):
        load(tmp_path)


def test_train_and_test_may_not_differ_in_size(tmp_path):
    write_classes(tmp_path / "train")
    write_classes(tmp_path / "test", shape=(7, 5, 3))
    with pytest.raises(InputError, match=r"5 x 7 pixels but .* is 5 x 6: pass image_size"):
        load(tmp_path)


def test_progress_bar_for_many_files_alone(tmp_path, monkeypatch, capfd):
    write_classes(tmp_path / "pets", each=5)
    load(tmp_path / "pets")
    assert capfd.readouterr().err == ""
    monkeypatch.setattr(source, "PROGRESS_FROM", 9)
    load(tmp_path / "pets")
    shown = capfd.readouterr().err
    assert "pets: images" in shown and "10/10" in shown


def test_many_batches_keep_their_order(tmp_path, monkeypatch):
    monkeypatch.setattr(source, "BATCH", 3)
    write_classes(tmp_path / "train", each=7)
    shutil.copytree(tmp_path / "train", tmp_path / "test")
    expected = [pixels(100 * k + i) for k in range(2) for i in range(7)]
    data = load(tmp_path)
    np.testing.assert_array_equal(data.train_images, expected)
    np.testing.assert_array_equal(data.test_images, expected)


def test_pictures_without_labels(tmp_path):
    rng = np.random.default_rng(0)
    for file in ("a/1.png", "a/2.png", "b/c/3.jpg", "4.png", ".hidden/5.png", "notes.txt"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        if file.endswith("txt"):
            (tmp_path / file).touch()
        else:
            Image.fromarray(rng.integers(0, 256, (4, 6), dtype=np.uint8)).save(tmp_path / file)
    data = load_dataset(f"images:{tmp_path}", test_fraction=0.5)
    assert (len(data.train_images), len(data.test_images), data.train_labels.shape) == (2, 2, (2, 0))
    assert data.class_names == () and data.num_classes is None and "no targets" in repr(data)
    assert "a/, b/: read together" in repr(data) and "notes.txt" in repr(data)
    with pytest.raises(InputError, match="no folder /nowhere: give a folder of pictures"):
        load_dataset("images:/nowhere")
    with pytest.raises(InputError, match=r"holds 1 image file\(s\)"):
        load_dataset(f"images:{tmp_path / 'b'}")


def test_parts_beside_other_folders_are_not_read_together(tmp_path):
    for file in ("train/1.png", "train/2.png", "holdout/3.png"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (2, 2), int(file[-5])).save(tmp_path / file)
    with pytest.raises(InputError, match=r"holds train/ and holdout: if its folders are parts of the data, call them"):
        load_dataset(f"images:{tmp_path}")


def test_pictures_without_labels_in_parts(tmp_path):
    for file in ("Training/1.png", "Training/2.png", "dev/3.png", "test/x/4.png"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (2, 2), int(file[-5])).save(tmp_path / file)
    data = load_dataset(f"images:{tmp_path}")
    assert {part: images[:, 0, 0, 0].tolist() for part, (images, _) in data.parts.items()} == {
        "train": [1, 2],
        "test": [4],
        "validation": [3],
    }
    assert data.notes == ("Training/ is the train set", "dev/ is the validation set", "test/ is the test set")
