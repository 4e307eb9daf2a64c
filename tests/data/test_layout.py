"""What a folder means: parts by their names, classes, what is passed over; what can be read in two ways is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from mae_align.data.layout import part_of, read_layout
from mae_align.runtime.errors import InputError


def make(root: Path, *files: str) -> Path:
    for file in files:
        path = root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def classes_of(*parts: str, each: int = 2) -> list[str]:
    return [f"{part}{name}/{i}.png" for part in parts for name in ("cat", "dog") for i in range(each)]


def counts(root: Path) -> dict[str, int]:
    return {part: len(files.paths) for part, files in read_layout(root).parts.items()}


NAMES = {
    "train": "train Train TRAIN training TRAINING training_set Training Set train-set trainset train_data",
    "validation": "val Val valid validate validation VALIDATION dev Dev eval val_set validation set evaluation",
    "test": "test TEST testing Testing test_set test-set TestSet",
}


@pytest.mark.parametrize("part", NAMES)
def test_parts_are_known_by_their_names(part):
    for name in NAMES[part].replace("Training Set", "Training_Set").replace("validation set", "validation_set").split():
        assert part_of(name) == part
    assert part_of("Test Set") == "test"


@pytest.mark.parametrize("name", ["cat", "trains", "trainer", "tests", "valley", "set", "data", "contest", "value", ""])
def test_other_names_are_no_parts(name):
    assert part_of(name) is None


@pytest.mark.parametrize(
    "train, held_out, part",
    [
        ("Training", "Testing", "test"),
        ("train", "valid", "validation"),
        ("Train", "Test", "test"),
        ("TRAINING", "TESTING", "test"),
        ("train", "dev", "validation"),
        ("training_set", "test_set", "test"),
        ("train", "eval", "validation"),
    ],
)
def test_split_names_are_no_classes(tmp_path, train, held_out, part):
    layout = read_layout(make(tmp_path, *classes_of(f"{train}/"), *classes_of(f"{held_out}/", each=1)))
    assert layout.classes == ("cat", "dog")
    assert {name: len(files.paths) for name, files in layout.parts.items()} == {"train": 4, part: 2}
    assert [note for note in layout.notes if held_out in note] == (
        [f"{held_out}/ is the {part} set"] if held_out != part else []
    )


def test_a_third_part_is_the_validation_set(tmp_path):
    make(tmp_path, *classes_of("train/"), *classes_of("val/", each=1), *classes_of("test/", each=3))
    assert counts(tmp_path) == {"train": 4, "validation": 2, "test": 6}


@pytest.mark.parametrize("names", [("bus", "train"), ("bus", "test", "car"), ("train", "trolley", "val")])
def test_a_class_may_be_called_like_a_part(tmp_path, names):
    layout = read_layout(make(tmp_path, *(f"{name}/{i}.png" for name in names for i in range(2))))
    assert layout.classes == tuple(sorted(names)) and layout.notes == ()


REFUSED = {
    "parts of one kind": (
        [*classes_of("train/"), *classes_of("val/"), *classes_of("dev/")],
        "both look like the validation set",
    ),
    "the same in another case": ([*classes_of("train/"), *classes_of("Train/")], "both look like the train set"),
    "no training set": (classes_of("test/"), "holds test/ but no train/"),
    "two held-out sets alone": ([*classes_of("test/"), *classes_of("val/")], "but no train/"),
    "a training set beside classes": (
        [*classes_of("train/"), *classes_of("")],
        "train/ with folders in it beside cat, dog",
    ),
    "a test set beside classes": ([*classes_of("test/"), *classes_of("")], "test/ with folders in it beside cat, dog"),
    "parts without class folders": (["train/1.png", "train/2.png", "test/1.png"], "holds 0 sub-folder(s)"),
    "one class": (["train/cat/1.png", "test/cat/1.png"], "holds 1 sub-folder(s)"),
    "a class without training images": (
        [*classes_of("train/"), *classes_of("test/"), "test/eel/1.png", "test/fox/1.png"],
        "test has eel, fox, of which",
    ),
    "an empty class": (
        [*classes_of("train/"), "train/eel/x.txt", *classes_of("test/")],
        "train/eel holds no image file",
    ),
    "held-out images without classes": (
        [*classes_of("train/"), "test/1.png"],
        "the images of test/ lie in no class folders",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_can_be_read_in_two_ways_or_none_is_refused_in_one_line(tmp_path, case):
    files, message = REFUSED[case]
    with pytest.raises(InputError) as refused:
        read_layout(make(tmp_path, *files))
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_a_class_without_held_out_images_is_said_and_kept(tmp_path):
    make(tmp_path, *classes_of("train/"), "train/rare/1.png", *classes_of("test/"))
    (tmp_path / "test" / "rare").mkdir()
    layout = read_layout(tmp_path)
    assert layout.classes == ("cat", "dog", "rare") and layout.notes == ("test/ has no image of rare",)
    (tmp_path / "test" / "rare").rmdir()
    assert read_layout(tmp_path).notes == layout.notes


@pytest.mark.parametrize(
    "extra",
    [".ipynb_checkpoints", ".thumbnails", "@eaDir/1.png", "__MACOSX/cat", ".git", "$RECYCLE.BIN", "deeper/.cache"],
)
def test_folders_of_systems_and_programs_are_no_images(tmp_path, extra):
    make(tmp_path, *classes_of(""), f"cat/{extra}/1.png", f"{extra}/cat/1.png", "cat/._1.png", "dog/Thumbs.db")
    layout = read_layout(tmp_path) if not extra.startswith("deeper") else None
    if layout is None:
        make(tmp_path / "own", *classes_of(""), f"cat/{extra}/1.png")
        layout = read_layout(tmp_path / "own")
    assert layout.classes == ("cat", "dog") and len(layout.parts["train"].paths) == 4
    (note,) = [note for note in layout.notes if "system" in note]
    assert extra.split("/")[-1] in note or extra.split("/")[0] in note


def test_what_is_passed_over_is_named(tmp_path):
    make(tmp_path, *classes_of("train/"), *classes_of("test/"), "train/cat/a.txt", "annotations/1.png", "readme.md")
    assert read_layout(tmp_path).notes == (
        "passed over, beside the parts: annotations",
        "passed over, no image file: train/cat/a.txt",
    )


def tiny_imagenet(root: Path) -> Path:
    files = [f"train/n0{i}/images/n0{i}_{j}.JPEG" for i in (1, 2) for j in range(3)]
    files += [f"val/images/val_{i}.JPEG" for i in range(4)] + [
        "test/images/test_0.JPEG",
        "wnids.txt",
        "train/n01/n01_boxes.txt",
    ]
    make(root, *files)
    lines = [f"val_{i}.JPEG\tn0{2 - i % 2}\t0\t0\t62\t62\n" for i in range(4)]
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    return root


def test_tiny_imagenet_is_read_as_downloaded(tmp_path):
    layout = read_layout(tiny_imagenet(tmp_path))
    assert layout.classes == ("n01", "n02") and set(layout.parts) == {"train", "validation"}
    files = layout.parts["validation"]
    named = {path.name: int(label) for path, label in zip(*files, strict=True)}
    assert named == {"val_0.JPEG": 1, "val_1.JPEG": 0, "val_2.JPEG": 1, "val_3.JPEG": 0}
    assert any(note.startswith("test/ is passed over: its images lie in no class folders") for note in layout.notes)


@pytest.mark.parametrize("line", ["val_9.JPEG\tn01\n", "val_0.JPEG\tn09\n", "val_0.JPEG\n", "val_1.JPEG\tn01\n"])
def test_annotations_of_what_is_not_there_are_refused(tmp_path, line):
    path = tiny_imagenet(tmp_path) / "val" / "val_annotations.txt"
    path.write_text(path.read_text() + line)
    with pytest.raises(InputError, match=r"line 5 of .*val_annotations.txt names .*, which is not there: repair"):
        read_layout(tmp_path)


def test_links_to_folders_are_followed_and_links_to_nothing_are_named(tmp_path):
    make(tmp_path / "store", "a/1.png", "a/2.png", "b/1.png")
    root = tmp_path / "set"
    root.mkdir()
    for name in "ab":
        (root / name).symlink_to(tmp_path / "store" / name)
    assert read_layout(root).classes == ("a", "b") and counts(root) == {"train": 3}
