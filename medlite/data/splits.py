"""Train, validation and test splits that keep each patient in one of them."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from medlite.data.image_data import SPLITS, ImageData
from medlite.errors import ConfigError, DataError
from medlite.types import Split

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SplitRatios:
    """Shares of the groups for validation and test; the rest is for training.

    Raises:
        ConfigError: shares that leave nothing for one of the splits.
    """

    val: float = 0.1
    test: float = 0.2

    def __post_init__(self) -> None:
        if self.val <= 0 or self.test < 0 or self.val + self.test >= 1:
            message = (
                f"dataset.val_ratio and dataset.test_ratio: {self.val:g} and {self.test:g} are not "
                "positive with a sum below 1"
            )
            raise ConfigError([message])


def split_by_group(
    groups: Sequence[str],
    labels: Sequence[str],
    ratios: SplitRatios,
    *,
    seed: int,
) -> dict[Split, list[int]]:
    """Positions of the samples of each split, whole groups together, stratified by label.

    A group counts as the rarest label among its samples. Of each label, groups go to the test
    split and to the validation split by their ratios: at least one to test where the label has
    two groups, and one to validation where it has three; the only group of a label goes to
    training.

    Args:
        groups: the group id of each sample.
        labels: what to stratify by, for each sample.
        ratios: shares of the groups.
        seed: of the choice within each label.
    """
    members = defaultdict(list)
    for position, group in enumerate(groups):
        members[group].append(position)
    sample_counts = Counter(labels)
    strata = defaultdict(list)
    for group in sorted(members):
        own_labels = {labels[position] for position in members[group]}
        strata[min(own_labels, key=lambda label: (sample_counts[label], label))].append(group)
    assigned: dict[Split, list[int]] = {name: [] for name in SPLITS}
    for label in sorted(strata):
        order = np.random.default_rng((seed, *label.encode())).permutation(len(strata[label]))
        names = _names_for(len(order), ratios)
        for name, choice in zip(names, order, strict=True):
            assigned[name] += members[strata[label][choice]]
    return {name: sorted(positions) for name, positions in assigned.items()}


def complete_splits(
    given: Sequence[Split | None],
    groups: Sequence[str],
    labels: Sequence[str],
    ratios: SplitRatios,
    *,
    seed: int,
) -> dict[Split, list[int]]:
    """Positions of the samples of each split: as given, else chosen by `split_by_group`.

    Where training and test are given but no validation, validation is taken from training.

    Raises:
        DataError: some samples have a split and others none, a split is empty, or a group lies
            in two splits.
    """
    if all(split is None for split in given):
        positions = split_by_group(groups, labels, ratios, seed=seed)
    else:
        positions = {name: [p for p, split in enumerate(given) if split == name] for name in SPLITS}
        if None in given:
            message = f"{given.count(None)} of {len(given)} images have no split; give all or none"
            raise DataError(message)
        if positions["train"] and not positions["val"]:
            of_train = positions["train"]
            parts = split_by_group(
                [groups[p] for p in of_train],
                [labels[p] for p in of_train],
                SplitRatios(ratios.val / (1 - ratios.test), 0),
                seed=seed,
            )
            positions |= {name: [of_train[p] for p in parts[name]] for name in ("train", "val")}
    _check_splits(positions, groups)
    _warn_of_missing(positions, labels)
    return positions


def _check_splits(positions: Mapping[Split, Sequence[int]], groups: Sequence[str]) -> None:
    empty = [name for name in SPLITS if not positions[name]]
    if empty:
        message = (
            f"{len(groups)} images of {len(set(groups))} groups leave nothing for "
            f"{' and '.join(empty)}; add images, or give other splits"
        )
        raise DataError(message)
    splits_of = defaultdict(list)
    for name in SPLITS:
        for group in {groups[position] for position in positions[name]}:
            splits_of[group].append(name)
    straddling = [f"{g} ({', '.join(names)})" for g, names in splits_of.items() if len(names) > 1]
    if straddling:
        message = f"groups that lie in several splits: {'; '.join(sorted(straddling))}"
        raise DataError(message)


def _warn_of_missing(positions: Mapping[Split, Sequence[int]], labels: Sequence[str]) -> None:
    for name in SPLITS:
        present = {labels[position] for position in positions[name]}
        for label in sorted(set(labels) - present):
            logger.warning("class '%s' has no images in the %s split", label, name)


def _names_for(num_groups: int, ratios: SplitRatios) -> list[Split]:
    """The split of each of a label's groups, in the order of drawing."""
    num_test = max(round(num_groups * ratios.test), int(num_groups >= 2 and ratios.test > 0))
    num_val = max(round(num_groups * ratios.val), int(num_groups >= 3))
    num_train = max(num_groups - num_test - num_val, 1)
    counts: dict[Split, int] = {"train": num_train, "test": num_test, "val": num_val}
    return [name for name, count in counts.items() for _ in range(count)][:num_groups]


@dataclass(frozen=True)
class Leaks:
    """What two splits share, for each pair of splits such as ("train", "test")."""

    num_groups: dict[tuple[Split, Split], int]
    """groups with samples in both"""
    num_images: dict[tuple[Split, Split], int]
    """exactly equal images in both"""

    def __str__(self) -> str:
        lines = [
            f"{count} {what} in both {first} and {second}"
            for what, counts in (
                ("group(s)", self.num_groups),
                ("exactly equal image(s)", self.num_images),
            )
            for (first, second), count in counts.items()
            if count
        ]
        return "; ".join(lines)

    def __bool__(self) -> bool:
        return any((*self.num_groups.values(), *self.num_images.values()))


def find_leaks(data: ImageData) -> Leaks:
    """Count the groups and the exactly equal images that two splits share."""
    groups = {name: set(data.split(name).groups) for name in SPLITS}
    digests = {name: set(data.split(name).samples.image_digests()) for name in SPLITS}
    return Leaks(_shared(groups), _shared(digests))


def warn_of_leaks(data: ImageData) -> ImageData:
    """Log what `find_leaks` finds, and hand the data on."""
    leaks = find_leaks(data)
    if leaks:
        logger.warning("dataset %s: %s", data.spec.name, leaks)
    return data


def _shared(sets: dict[Split, set[str]]) -> dict[tuple[Split, Split], int]:
    return {(a, b): len(sets[a] & sets[b]) for a, b in combinations(SPLITS, 2)}


def counts_by_split(
    groups: Mapping[Split, Sequence[str]],
) -> tuple[dict[str, int], dict[str, int]]:
    """(samples, groups) of each split, as `DataSpec` wants them."""
    return (
        {name: len(ids) for name, ids in groups.items()},
        {name: len(set(ids)) for name, ids in groups.items()},
    )
