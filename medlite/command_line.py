"""The words on the command line, checked before Hydra sees them.

Hydra composes; this file only finds the groups and options, answers misspelt words with the
closest right one, and lets any value be overridden without Hydra's `+` and `++`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf

from medlite.errors import ConfigError, MedliteError, did_you_mean

_PACKAGE = Path(__file__).parent
_SHOWING_FLAGS = {"--cfg", "-c", "--info", "-i"}
_FLAGS_WITH_VALUE = {
    *("--config-dir", "-cd", "--config-name", "-cn", "--config-path", "-cp"),
    *("--package", "-p", *_SHOWING_FLAGS),
}

NULLABLE = ("experiment",)
"""groups of which nothing may be chosen, in the word of conf/config.yaml"""


def conf_directory() -> Path:
    """Where the yaml files are: packed beside the code, or at the top of a checkout."""
    packed = _PACKAGE / "conf"
    return packed if packed.is_dir() else _PACKAGE.parent / "conf"


def find_options(directories: Iterable[Path]) -> dict[str, list[str]]:
    """Every group and its options, from the folders of yaml files."""
    options: dict[str, set[str]] = {}
    for directory in directories:
        for path in directory.glob("*/*.yaml"):
            options.setdefault(path.parent.name, set()).add(path.stem)
    return {group: sorted(names) for group, names in options.items() if group != "hydra"}


def split_verb(argv: Sequence[str], verbs: Iterable[str]) -> tuple[str, list[str]]:
    """The verb ("run" where none is given) and the rest.

    Raises:
        MedliteError: the first word is neither a verb nor an override.
    """
    if not argv or argv[0].startswith(("-", "~", "+")) or "=" in argv[0]:
        return "run", list(argv)
    if argv[0] not in verbs:
        message = f"'{argv[0]}' is not a verb of medlite, {did_you_mean(argv[0], verbs)}"
        raise MedliteError(message)
    return argv[0], list(argv[1:])


def user_directories(argv: Sequence[str]) -> list[Path]:
    """What --config-dir names, if anything."""
    found = []
    for flag, value in pairwise([*argv, ""]):
        if flag in ("--config-dir", "-cd"):
            found.append(Path(value))
        elif flag.startswith("--config-dir="):
            found.append(Path(flag.partition("=")[2]))
    return found


def expand_seeds(argv: Sequence[str]) -> list[str]:
    """`seeds=5` as the sweep that it stands for; the first seed is that of `seed=`, or 0.

    Flags that show something and run nothing, such as --cfg, see the job of the first seed.

    >>> expand_seeds(["model=unet", "seeds=3"])
    ['-m', 'model=unet', 'seed=0,1,2']
    >>> expand_seeds(["seeds=2", "seed=7"])
    ['-m', 'seed=7,8']
    >>> expand_seeds(["--cfg", "job", "seeds=2"])
    ['--cfg', 'job', 'seed=0']

    Raises:
        ConfigError: it is no whole number from 1 up, several seeds are named besides, or one
            directory for all of them.
    """
    counts = [word for word in argv if word.startswith("seeds=")]
    firsts = [word for word in argv if word.startswith("seed=")]
    if not counts:
        return list(argv)
    count, first = (
        words[-1].partition("=")[2] if words else default
        for words, default in ((counts, "1"), (firsts, "0"))
    )
    if not count.isdecimal() or int(count) < 1:
        raise ConfigError([f"seeds={count}: expected how many seeds, a whole number from 1 up"])
    if not first.isdecimal():
        raise ConfigError([f"seeds={count} and seed={first}: give the first seed alone"])
    named = next((word for word in argv if word.startswith("name=")), None)
    if named is not None:
        raise ConfigError([f"{named}: all seeds would share this directory; leave it out"])
    rest = [word for word in argv if word not in (*counts, *firsts, "-m", "--multirun")]
    if _SHOWING_FLAGS & set(argv):
        return [*rest, f"seed={first}"]
    seeds = ",".join(str(int(first) + step) for step in range(int(count)))
    return ["-m", *rest, f"seed={seeds}"]


def refuse_shared_name(argv: Sequence[str], directories: Iterable[Path]) -> None:
    """Refuse one directory for all jobs of a sweep, in which they would overwrite each other.

    Args:
        argv: flags and overrides, without the verb.
        directories: where the experiments are, some of which sweep.

    Raises:
        ConfigError: `name=` is given, and is the same for every job.
    """
    named = [word for word in argv if word.lstrip("+").startswith("name=")]
    if not named or "${" in named[-1] or not _is_sweep(argv, directories):
        return
    try:
        is_swept = OverridesParser.create().parse_override(named[-1]).is_sweep_override()
    except HydraException:
        return  # told with the other misspelt words
    if not is_swept:
        problem = (
            f"{named[-1]}: all jobs of the sweep would share this directory; leave it out, or let "
            "it differ, for example name='mine-${seed}'"
        )
        raise ConfigError([problem])


def _is_sweep(argv: Sequence[str], directories: Iterable[Path]) -> bool:
    if {"-m", "--multirun", "hydra.mode=MULTIRUN"} & set(argv):
        return True
    chosen = [word.partition("=")[2] for word in argv if word.startswith("experiment=")]
    paths = (directory / "experiment" / f"{name}.yaml" for directory in directories
             for name in chosen)  # fmt: skip
    experiments = [OmegaConf.load(path) for path in paths if path.is_file()]
    return any(OmegaConf.select(each, "hydra.mode") == "MULTIRUN" for each in experiments)


def prepare_overrides(argv: Sequence[str], options: Mapping[str, Sequence[str]]) -> list[str]:
    """Check every override and make it one that Hydra takes; flags go first, as it wants them.

    Args:
        argv: flags and overrides, without the verb.
        options: from `find_options`.

    Raises:
        ConfigError: with every misspelt group, option or section.
    """
    sections = [str(key) for key in OmegaConf.load(conf_directory() / "config.yaml")]
    known = {*options, *sections, "hydra"} - {"defaults"}
    flags, prepared, problems = [], [], []
    is_flag_value = False
    for word in argv:
        if is_flag_value or word.startswith("-"):
            flags.append(word)
            is_flag_value = not is_flag_value and word in _FLAGS_WITH_VALUE
            continue
        try:
            override = OverridesParser.create().parse_override(word)
        except HydraException:
            problems.append(f"{word}: expected key=value (quote values with spaces or commas)")
            continue
        prepared.append(_prepare(override, word, options))
        problems += _check(override, known, options)
    if problems:
        raise ConfigError(problems)
    return flags + prepared


def _prepare(override: Override, word: str, options: Mapping[str, Sequence[str]]) -> str:
    """Values may be new keys: constructors are checked later, by their signatures."""
    is_value = override.key_or_group not in options and not override.key_or_group.startswith(
        "hydra"
    )
    is_bare = not word.startswith(("+", "~"))
    return f"++{word}" if is_value and is_bare and override.package is None else word


def _check(
    override: Override, known: Iterable[str], options: Mapping[str, Sequence[str]]
) -> list[str]:
    group = override.key_or_group
    section = group.split(".")[0].split("/")[0]
    if section not in known:
        return [f"{group}: no such group or key, {did_you_mean(section, known)}"]
    if group not in options or override.is_delete():
        return []
    return [
        f"{group}={name}: no such option, {did_you_mean(name, options[group])}"
        for name in _named_options(override)
        if name not in options[group] and not (name == "null" and group in NULLABLE)
    ]


def _named_options(override: Override) -> list[str]:
    """Every option that the override names: a word, a list, or a sweep over either."""
    if override.is_sweep_override():
        values = override.sweep_string_iterator() if not override.is_choice_sweep() else None
        elements = list(values) if values is not None else override.value().list  # type: ignore[union-attr]
    else:
        elements = [override.value()]
    return [name for element in elements for name in _flatten(element)]


def _flatten(element: object) -> list[str]:
    if isinstance(element, list):
        return [name for item in element for name in _flatten(item)]
    return ["null" if element is None else str(getattr(element, "text", element))]
