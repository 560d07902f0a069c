"""MedMNIST v2: 12 sets of images and 6 of volumes in standard sizes.

"MedMNIST v2: a large-scale lightweight benchmark for 2D and 3D biomedical image
classification" (Yang et al., Scientific Data 10:41, 2023, arXiv:2110.14795).
"""

from __future__ import annotations

import logging
import re
import socket
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from medlite.data.cache_folder import cache_folder
from medlite.data.image_data import SPLITS, ArraySamples, ImageData, ImageSplit
from medlite.data.splits import counts_by_split, warn_of_leaks
from medlite.errors import ConfigError, DataError, did_you_mean
from medlite.types import DataSpec, Split

logger = logging.getLogger(__name__)

_MODALITIES = {
    "pathmnist": "microscopy",
    "chestmnist": "xray",
    "dermamnist": "dermatoscopy",
    "octmnist": "oct",
    "pneumoniamnist": "xray",
    "retinamnist": "fundus",
    "breastmnist": "ultrasound",
    "bloodmnist": "microscopy",
    "tissuemnist": "microscopy",
    "organamnist": "ct",
    "organcmnist": "ct",
    "organsmnist": "ct",
    "organmnist3d": "ct",
    "nodulemnist3d": "ct_patch",
    "adrenalmnist3d": "shape",
    "fracturemnist3d": "ct_patch",
    "vesselmnist3d": "shape",
    "synapsemnist3d": "microscopy",
}

_LIMITS = {
    "dermamnist": "its splits share lesions, so test figures are too good",
    "pneumoniamnist": "prevalence is 74.2 % in training and 62.5 % in test",
    "chestmnist": "predicting no finding at all has an accuracy of .947",
}

_NUM_NAMED = 5

_SIZES = {2: (28, 64, 128, 224), 3: (28, 64)}


def medmnist(
    *,
    flag: str = "pneumoniamnist",
    size: int = 28,
    root: str | Path | None = None,
    download: bool = True,
    timeout_seconds: float = 30.0,
) -> ImageData:
    """One of the MedMNIST sets, with its official split.

    Images go from [0, 255] to [-1, 1] (the authors' Normalize(.5, .5)). Patients are not
    published, so that each image is its own group. Ordinal grades are taken as classes.

    Args:
        flag: name of the set, for example "retinamnist" or "adrenalmnist3d".
        size: side in pixels: 28, 64, 128 or 224 for images, 28 or 64 for volumes.
        root: folder of `<flag>.npz` (size 28) or `<flag>_<size>.npz`; None: the cache folder.
        download: fetch a missing file from Zenodo.
        timeout_seconds: how long the server may be silent.

    Raises:
        ConfigError: an unknown flag or size.
        DataError: the file is missing, damaged or cannot be fetched.
    """
    info = _info_of(flag, size)
    folder = Path(root).expanduser() if root else cache_folder() / "medmnist"
    path = folder / (f"{flag}.npz" if size == 28 else f"{flag}_{size}.npz")
    if download:
        _fetch(path, info, size, timeout_seconds)
    arrays = _read(path, download, info)
    images = {name: _channels_first(arrays[f"{name}_images"], info) for name in SPLITS}
    labels = {name: _flat_labels(arrays[f"{name}_labels"]) for name in SPLITS}
    groups = {name: tuple(f"{name}-{i}" for i in range(len(labels[name]))) for name in SPLITS}
    splits = {
        name: ImageSplit(
            ArraySamples(images[name], labels[name], scale=2 / 255, offset=-1), groups[name]
        )
        for name in SPLITS
    }
    spec = _spec(flag, info, images["train"].shape[1:], labels["train"], groups)
    return warn_of_leaks(
        ImageData(
            spec=spec,
            train=splits["train"],
            val=splits["val"],
            test=splits["test"],
            sides=_sides_of(flag),
        )
    )


def _info_of(flag: str, size: int) -> Mapping[str, Any]:
    from medmnist import INFO

    if flag not in INFO:
        raise ConfigError([f"dataset.flag: MedMNIST has no {flag!r}, {did_you_mean(flag, INFO)}"])
    sizes = _sides_of(flag)
    if size not in sizes:
        options = ", ".join(map(str, sizes))
        raise ConfigError([f"dataset.size: {flag} comes in sizes {options}, not {size}"])
    return INFO[flag]


def _sides_of(flag: str) -> tuple[int, ...]:
    return _SIZES[3 if flag.endswith("3d") else 2]


def _fetch(path: Path, info: Mapping[str, Any], size: int, timeout_seconds: float) -> None:
    """Download beside `path` and move it there when its checksum is right; once for all processes.

    The package's downloader has no time-out of its own and turns every failure, an interrupt
    included, into a RuntimeError.
    """
    if path.exists():
        return
    import medmnist

    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"), tempfile.TemporaryDirectory(dir=path.parent) as folder:
        if path.exists():
            return
        source = getattr(medmnist, info["python_class"])
        try:
            with _socket_timeout(timeout_seconds):
                source(split="val", download=True, root=folder, size=size)
        except RuntimeError as error:
            url = info["url" if size == 28 else f"url_{size}"]
            message = (
                f"{path.name} could not be downloaded ({error.__context__ or error}); fetch it by "
                f"hand from {url}, put it into {path.parent} and set dataset.root to that folder"
            )
            raise DataError(message) from error
        (Path(folder) / path.name).replace(path)


@contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _read(path: Path, download: bool, info: Mapping[str, Any]) -> dict[str, np.ndarray]:
    if not path.exists():
        hint = "" if download else ", or set dataset.download=true"
        message = f"{path} does not exist; set dataset.root to the folder that holds it{hint}"
        raise DataError(message)
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {
                f"{n}_{part}": file[f"{n}_{part}"] for n in SPLITS for part in ("images", "labels")
            }
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        message = f"{path} is not a complete MedMNIST file ({error}); delete it and fetch it again"
        raise DataError(message) from error
    problems = [problem for name in SPLITS for problem in _problems_of(name, arrays, info)]
    if problems:
        lines = "\n".join(f"  {problem}" for problem in problems)
        message = (
            f"{path} is not what MedMNIST publishes by that name; delete it and fetch it again:\n"
            f"{lines}"
        )
        raise DataError(message)
    return arrays


def _problems_of(
    split: Split, arrays: Mapping[str, np.ndarray], info: Mapping[str, Any]
) -> Iterator[str]:
    """What of one split does not go with the set's classes and channels."""
    images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
    if len(images) != len(labels):
        yield f"{len(images)} {split}_images do not go with {len(labels)} {split}_labels"
    num_axes = 4 if info["python_class"].endswith("3D") else 3
    channels = (3,) if info["n_channels"] == 3 else ()
    if images.ndim != num_axes + len(channels) or images.shape[num_axes:] != channels:
        kind = f"{'RGB' if channels else 'grey'} {'volumes' if num_axes == 4 else 'images'}"
        yield f"{split}_images of shape {images.shape} are no {kind}"
    is_multilabel = info["task"].startswith("multi-label")
    num_classes = len(info["label"])
    columns = (num_classes,) if is_multilabel else (1,)
    if labels.shape[1:] != columns and (is_multilabel or labels.ndim != 1):
        yield f"{split}_labels of shape {labels.shape} are not one row of {columns[0]} an image"
    known = range(2 if is_multilabel else num_classes)
    wrong = np.setdiff1d(labels, known)
    if wrong.size:
        named = ", ".join(map(str, wrong[:_NUM_NAMED])) + ", ..." * (wrong.size > _NUM_NAMED)
        yield f"{split}_labels hold {named}, which is not from 0 to {known[-1]}"


def _channels_first(images: np.ndarray, info: Mapping[str, Any]) -> np.ndarray:
    """(N, C, H, W[, D]) from (N, H, W[, D]) grey or (N, H, W, 3)."""
    return np.moveaxis(images, -1, 1) if info["n_channels"] == 3 else images[:, None]


def _flat_labels(labels: np.ndarray) -> np.ndarray:
    """(N,) int64 from (N,) or (N, 1); (N, K) float32 for multi-label."""
    if labels.ndim == 2 and labels.shape[1] > 1:
        return labels.astype(np.float32)
    return labels.reshape(len(labels)).astype(np.int64)


def _class_name(label: str) -> str:
    """Lower case with underscores, what stands in brackets left out; grades get a word."""
    words = re.findall(r"[a-z0-9]+", label.partition("(")[0].lower())
    return f"grade_{label}" if label.isdigit() else "_".join(words)


def _spec(
    flag: str,
    info: Mapping[str, Any],
    input_shape: tuple[int, ...],
    train_labels: np.ndarray,
    groups: Mapping[Split, tuple[str, ...]],
) -> DataSpec:
    is_multilabel = train_labels.ndim == 2
    class_names = tuple(_class_name(info["label"][str(k)]) for k in range(len(info["label"])))
    class_counts = (
        train_labels.sum(0).astype(int)
        if is_multilabel
        else np.bincount(train_labels, minlength=len(class_names))
    )
    num_samples, num_groups = counts_by_split(groups)
    limits = _LIMITS.get(flag)
    return DataSpec(
        name=f"medmnist/{flag}",
        task="classification",
        labels="multilabel" if is_multilabel else "multiclass",
        in_channels=input_shape[0],
        num_classes=len(class_names),
        image_size=input_shape[1:],
        class_names=class_names,
        class_counts=tuple(class_counts.tolist()),
        num_samples=num_samples,
        num_groups=num_groups,
        group_kind="image",
        modality=_MODALITIES[flag],
        provenance=f"real; limits: {limits}" if limits else "real",
        origin=f"MedMNIST v2 (Yang et al. 2023), {flag}, {info['license']}",
        preprocessing="official split and size; [0, 255] scaled to [-1, 1]",
    )
