"""From the command line to checked, typed settings; all mistakes are told at once."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from medlite.config_schema import TYPED, LoggerSettings, check_values, job_values, typed_section
from medlite.errors import ConfigError, MedliteError, did_you_mean
from medlite.safety_settings import (
    ExplainabilitySettings,
    RobustnessSettings,
    SafetyMargins,
    ShortcutSettings,
)
from medlite.types import BenchmarkSettings, Hardware, TrainSettings

STAGES = ("train", "compress", "export", "bench", "report")
KEYED = (
    "dataset",
    "model",
    "compression",
    "runtime",
    "hardware",
    "train",
    "seed",
    "control",
    "benchmark",
    "safety",
    "robustness",
    "shortcuts",
    "explainability",
)
"""the sections that decide a run's result; the others only say where it goes"""

DATA_FACTS = ("in_channels", "num_classes", "image_size", "spatial_dims")
"""what the dataset tells every model that names it in its constructor"""

REQUIRED_FACTS = ("in_channels", "num_classes")
"""those that a constructor with **arguments is told as well"""


def keyed_sections(plain: Mapping[str, Any]) -> dict[str, Any]:
    """What of a configuration decides a run's result; how its verdict ends the command does not."""
    sections = {section: plain.get(section, {}) for section in KEYED}
    margins = {key: value for key, value in (sections["safety"] or {}).items() if key != "enforce"}
    return {**sections, "safety": margins}


def digest(made_of: Any) -> str:
    """12 hexadecimal digits that name plain values.

    >>> digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    True
    """
    canonical = json.dumps(made_of, sort_keys=True, default=str)
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


@dataclass(frozen=True, kw_only=True)
class JobConfig:
    """One job, checked: plain values only."""

    name: str
    directory: Path
    outputs: Path
    seed: int
    control: bool
    """whether a float net that is fine-tuned as long as the steps train stands beside them"""
    stages: tuple[str, ...]
    choices: Mapping[str, str]
    """the option that was chosen in each group, lists joined by "+" """
    dataset: dict[str, Any]
    model: dict[str, Any]
    compression: dict[str, dict[str, Any]]
    runtime: dict[str, dict[str, Any]]
    hardware: Hardware
    train: TrainSettings
    benchmark: BenchmarkSettings
    safety: SafetyMargins
    robustness: RobustnessSettings
    shortcuts: ShortcutSettings
    explainability: ExplainabilitySettings
    logger: LoggerSettings
    conf_directories: tuple[Path, ...]
    """where options are looked for"""
    resolved: dict[str, Any] = field(repr=False)
    """the whole configuration as plain values, for the record"""

    @property
    def key(self) -> str:
        """The same for two jobs that must give the same result; order of steps counts."""
        order = [list(self.compression), list(self.runtime)]
        return digest([keyed_sections(self.resolved), order])


def build(node: Mapping[str, Any], /, **arguments: Any) -> Any:
    """Call the node's `_target_` with its values and with those `arguments` that it accepts.

    The one place where configuration becomes objects.

    Raises:
        MedliteError: raised by the constructor itself.
    """
    target = locate(node["_target_"])
    named = inspect.signature(target).parameters
    fitting = {
        name: value
        for name, value in arguments.items()
        if name in named or (name in REQUIRED_FACTS and _takes_any_keyword(target))
    }
    try:
        return instantiate({**node}, **fitting, _convert_="all")
    except InstantiationException as error:
        if isinstance(error.__cause__, MedliteError):
            raise error.__cause__ from None
        raise


def locate(target: str) -> Callable[..., Any]:
    """Import what a `_target_` names.

    Raises:
        ConfigError: there is no such module or name.
    """
    module_name, _, name = target.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not module_name.startswith(error.name):
            raise
        raise ConfigError([f"_target_: there is no module {module_name!r}"]) from error
    if not hasattr(module, name):
        names = [n for n in vars(module) if not n.startswith("_")]
        hint = did_you_mean(name, names)
        raise ConfigError([f"_target_: {module_name} has no {name!r}, {hint}"])
    return getattr(module, name)


def model_config(name: str, directories: Iterable[Path], *, key: str = "model") -> dict[str, Any]:
    """The values of `model=<name>`, for a net beside the job's own (a teacher, an audited one).

    Args:
        name: the option.
        directories: where conf/model is.
        key: what named it, for the message.

    Raises:
        ConfigError: there is no such option.
    """
    return _option("model", name, directories, key=key)


def step_config(name: str, directories: Iterable[Path]) -> dict[str, Any]:
    """The values of the step that `compression=<name>` brings.

    Raises:
        ConfigError: there is no such option.
    """
    return _option("compression", name, directories, key="compression")[name]


def margins_config(name: str, directories: Iterable[Path]) -> SafetyMargins:
    """The margins of `safety=<name>`, or of the yaml file that `name` is.

    Raises:
        ConfigError: there is no such option or file, or it holds something else than margins.
    """
    path = Path(name)
    is_file = path.suffix in (".yaml", ".yml")
    if is_file and not path.is_file():
        raise ConfigError([f"safety: no file {name}"])
    if is_file:
        values = cast("dict[str, Any]", OmegaConf.to_container(OmegaConf.load(path)))
    else:
        values = _option("safety", name, directories, key="safety")
    margins, problems = typed_section("safety", SafetyMargins, values)
    if problems:
        raise ConfigError(problems)
    return margins


def _option(group: str, name: str, directories: Iterable[Path], *, key: str) -> dict[str, Any]:
    paths = {path.stem: path for d in directories for path in (d / group).glob("*.yaml")}
    if name not in paths:
        raise ConfigError([f"{key}: no {group} {name!r}, {did_you_mean(name, paths)}"])
    return cast("dict[str, Any]", OmegaConf.to_container(OmegaConf.load(paths[name])))


def check(
    cfg: DictConfig,
    *,
    choices: Mapping[str, str],
    options: Mapping[str, list[str]],
    directories: Iterable[Path] = (),
) -> JobConfig:
    """Turn the composed configuration into a `JobConfig`.

    Args:
        cfg: as Hydra composed it.
        choices: the option chosen in each group that takes one.
        options: all options of each group, for hints.
        directories: where the options are.

    Raises:
        ConfigError: with every problem that was found.
    """
    missing = sorted(OmegaConf.missing_keys(cfg))
    problems = [f"{key}: needs a value, for example {key}=..." for key in missing]
    if problems:
        raise ConfigError(problems)
    plain = cast("dict[str, Any]", OmegaConf.to_container(cfg, resolve=True))
    for section in ("dataset", "model", "compression", "runtime", *TYPED):
        plain[section] = plain.get(section) or {}
    own, problems = job_values(plain)
    plain |= own
    typed = {}
    for section, schema in TYPED.items():
        typed[section], found = typed_section(section, schema, plain[section])
        problems += found
    problems += list(check_values(plain))
    for section in ("compression", "runtime"):
        problems += _check_parts(section, plain[section], options[section])
        plain[section] = chosen_parts(plain[section])
    problems += list(_check_constructors(plain))
    problems += _check_stages(plain["stages"])
    if not plain["runtime"]:
        problems.append(f"runtime: name at least one of {', '.join(options['runtime'])}")
    if problems:
        raise ConfigError(problems)
    plain |= {section: asdict(settings) for section, settings in typed.items()}
    outputs = Path(plain["outputs"])
    return JobConfig(
        name=plain["name"],
        directory=outputs / "runs" / plain["name"],
        outputs=outputs,
        seed=plain["seed"],
        control=plain["control"],
        stages=tuple(plain["stages"]),
        choices={
            **choices,
            "compression": "+".join(plain["compression"]) or "none",
            "runtime": "+".join(plain["runtime"]),
        },
        dataset=plain["dataset"],
        model=plain["model"],
        compression=plain["compression"],
        runtime=plain["runtime"],
        conf_directories=tuple(directories),
        resolved=plain,
        **typed,
    )


def _check_stages(stages: Sequence[str]) -> Iterator[str]:
    unknown = [stage for stage in stages if stage not in STAGES]
    yield from (f"stages: {name!r}, {did_you_mean(name, STAGES)}" for name in unknown)
    if not unknown and tuple(stages) != STAGES[: len(stages)]:
        first = ", ".join(STAGES[: len(stages)])
        yield f"stages: a run stops after one of them: [{first}]; what is there is not made again"


def chosen_parts(parts: Mapping[str, Any]) -> dict[str, Any]:
    """Keep the parts that have a `_target_`; settings of parts that were not chosen fall away."""
    return {name: node for name, node in parts.items() if "_target_" in (node or {})}


def _check_parts(section: str, parts: Mapping[str, Any], options: list[str]) -> Iterator[str]:
    for name in parts:
        if name not in options and name not in chosen_parts(parts):
            yield f"{section}.{name}: no such option, {did_you_mean(name, options)}"


def _check_constructors(plain: Mapping[str, Any]) -> Iterator[str]:
    nodes = {"dataset": plain["dataset"], "model": plain["model"]}
    for section in ("compression", "runtime"):
        nodes |= {f"{section}.{name}": node for name, node in plain[section].items()}
    for path, node in nodes.items():
        if "_target_" not in node:
            yield f"{path}: has no _target_"
            continue
        try:
            target = locate(node["_target_"])
        except ConfigError as error:
            yield from (f"{path}.{problem}" for problem in error.problems)
            continue
        found = list(check_signature(path, target, node))
        yield from found
        if not found and path.split(".")[0] in ("compression", "runtime"):
            yield from _problems_of_building(path, node)


def check_signature(
    path: str, target: Callable[..., Any], node: Mapping[str, Any]
) -> Iterator[str]:
    """What of `node`, at `path` of the configuration, a constructor does not take, or lacks."""
    if _takes_any_keyword(target):
        return
    parameters = inspect.signature(target).parameters
    for key in node:
        if not key.startswith("_") and key not in parameters:
            name = getattr(target, "__name__", str(target))
            known = set(parameters) - set(DATA_FACTS)
            yield f"{path}.{key}: {name} takes no {key!r}, {did_you_mean(key, known)}"
    for key, parameter in parameters.items():
        is_required = parameter.default is inspect.Parameter.empty
        if is_required and key not in node and key not in DATA_FACTS:
            yield f"{path}.{key}: needs a value"


def _problems_of_building(path: str, node: Mapping[str, Any]) -> list[str]:
    try:
        build(node)
    except ConfigError as error:
        return [f"{path}.{problem}" for problem in error.problems]
    except MedliteError as error:
        return [f"{path}: {error}"]
    return []


def _takes_any_keyword(target: Callable[..., Any]) -> bool:
    kinds = (parameter.kind for parameter in inspect.signature(target).parameters.values())
    return inspect.Parameter.VAR_KEYWORD in kinds
