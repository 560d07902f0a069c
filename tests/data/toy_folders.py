"""Small image folders as a user would have them."""

import numpy as np
from PIL import Image

from medlite.data.image_data import SPLITS
from medlite.data.image_folder import image_folder


def write_image(path, seed=0, size=(12, 10)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, size, np.uint8)).save(path)


def write_mask(path, size=(12, 10), value=255):
    path.parent.mkdir(parents=True, exist_ok=True)
    mask = np.zeros(size, np.uint8)
    mask[3:9, 2:8] = value
    Image.fromarray(mask).save(path)


def write_classes(root, **num_by_class):
    for seed, (name, num) in enumerate(num_by_class.items()):
        for i in range(num):
            write_image(root / name / f"{i:03d}.png", seed=1000 * seed + i)


def write_pairs(root, num=20, **mask):
    for i in range(num):
        write_image(root / "images" / f"{i:03d}.png", seed=i)
        write_mask(root / "masks" / f"{i:03d}.png", **mask)


def load(root, **options):
    return image_folder(root=root, **({"image_size": (8, 8), "in_channels": 1} | options))


def segmentation(root, **options):
    return load(root, task="segmentation", **options)


def classes_of(data):
    """Class name of each image, by file name."""
    return {
        group: data.spec.class_names[int(target)]
        for name in SPLITS
        for group, target in zip(
            data.split(name).groups, data.split(name).samples.targets, strict=True
        )
    }


def csv_of(tmp_path, header, rows):
    path = tmp_path / "labels.csv"
    path.write_text("\n".join([header, *rows]))
    return "labels.csv"
