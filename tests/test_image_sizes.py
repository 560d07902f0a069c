"""A model that cannot take the images says how to get images that it takes."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from PIL import Image

from medlite.command_line import conf_directory, find_options, prepare_overrides
from medlite.config import check
from medlite.data.image_data import SPLITS
from medlite.errors import ShapeError
from medlite.pipeline.job import remedies_for
from medlite.pipeline.run import run

OPTIONS = find_options([conf_directory()])
MODELS = {
    "classification": ("model=timm", "model.name=vit_tiny_patch16_224"),
    "segmentation": ("model=ultralight_vm_unet",),
}


def plan(outputs, dataset, task, *words):
    """A job up to its plan; its last word in the place of an earlier one of the same key."""
    OmegaConf.register_new_resolver("run_name", lambda: "job", replace=True)
    words = [
        f"dataset={dataset}", *MODELS[task], "compression=none", "logger=none", "stages=[]",
        f"outputs={outputs}", *words,
    ]  # fmt: skip
    with initialize_config_dir(str(conf_directory()), version_base="1.3"):
        cfg = compose("config", prepare_overrides(words, OPTIONS))
    choices = {"dataset": dataset, "model": "some_model"}
    return run(check(cfg, choices=choices, options=OPTIONS, directories=[conf_directory()]))


def remedy_of(error):
    return re.search(r"set '?(dataset\.[^']*)'?$", str(error)).group(1)


def write_medmnist(folder, flag, shape):
    labels = np.arange(12)[:, None] % 2
    for side in (28, 64):
        images = np.random.default_rng(side).integers(0, 256, (3, 12, *[side] * shape), np.uint8)
        arrays = {f"{name}_images": images[i] for i, name in enumerate(SPLITS)}
        arrays |= {f"{name}_labels": labels for name in SPLITS}
        np.savez(folder / (f"{flag}.npz" if side == 28 else f"{flag}_64.npz"), **arrays)


def write_pictures(folder):
    random = np.random.default_rng(0)
    for name in ("ill", "well"):
        (folder / name).mkdir()
        for i in range(10):
            pixels = random.integers(0, 256, (40, 40), np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")


@pytest.mark.parametrize("size", [[40, 40], [40, 60]])
@pytest.mark.parametrize("task", ["classification", "segmentation"])
def test_the_remedy_works_for_phantoms(tmp_path, task, size):
    words = ["dataset.task=" + task, "train.epochs=1", "dataset.num_train=8"]
    with pytest.raises(ShapeError) as caught:
        plan(tmp_path, "phantom", task, *words, f"dataset.image_size={size}")
    assert plan(tmp_path, "phantom", task, *words, remedy_of(caught.value))


def test_the_remedy_works_for_a_folder_of_images(tmp_path):
    write_pictures(tmp_path)
    words = ("image_folder", "classification", f"dataset.root={tmp_path}")
    with pytest.raises(ShapeError) as caught:
        plan(tmp_path / "outputs", *words, "dataset.image_size=[40,40]")
    assert remedy_of(caught.value) == "dataset.image_size=48"
    assert plan(tmp_path / "outputs", *words, remedy_of(caught.value))


def test_the_remedy_works_for_medmnist_which_has_some_sizes_alone(tmp_path):
    write_medmnist(tmp_path, "pneumoniamnist", 2)
    words = ("medmnist", "classification", f"dataset.root={tmp_path}", "dataset.download=false")
    with pytest.raises(ShapeError, match=r"got 28x28; set dataset.size=64$") as caught:
        plan(tmp_path / "outputs", *words)
    assert plan(tmp_path / "outputs", *words, remedy_of(caught.value))


@pytest.mark.parametrize(
    ("dataset", "sides", "size", "divisor", "text"),
    [
        ({"size": 28}, (28, 64, 128, 224), (70, 70), 14, "p; set dataset.size=224"),
        ({"size": 28}, (28, 64), (32, 32, 32), 32, "p; set dataset.size=64"),
        ({"size": 28}, (28, 64), (70, 70), 14, "p; dataset=mine has no other images"),
        ({}, (), (96, 96), 32, "p; dataset=mine has no other images: take another model or dat"),
        ({"image_size": 9}, (), (16, 8), 8, "p; set 'dataset.image_size=\\[16,8\\]'"),
        ({"image_size": 9}, (), (16, 16), 8, "p; set dataset.image_size=16"),
        ({"size": 28}, (28, 64), None, 1, "p$"),
    ],
)
def test_remedies_are_those_of_the_dataset(dataset, sides, size, divisor, text):
    error = ShapeError("p", size=size, divisor=divisor)
    config = SimpleNamespace(dataset=dataset, choices={"dataset": "mine"})
    with (
        pytest.raises(ShapeError, match=f"^{text}"),
        remedies_for(config, SimpleNamespace(sides=sides)),
    ):
        raise error
