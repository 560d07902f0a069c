"""`python -m medlite [verb] [overrides]`: heavy imports only inside the verbs."""

from __future__ import annotations

import errno
import importlib
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from medlite.command_line import (
    conf_directory,
    expand_seeds,
    find_options,
    prepare_overrides,
    refuse_shared_name,
    split_verb,
    user_directories,
)
from medlite.config import JobConfig, check, chosen_parts, digest, keyed_sections
from medlite.errors import EXIT_UNSAFE, MedliteError

_log = logging.getLogger("medlite")


def main(argv: Sequence[str] | None = None) -> None:
    """Run one verb and exit: 0 done, 1 failed, 2 misused, 3 unsafe where that is enforced."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        verb, rest = split_verb(arguments, VERBS)
        sys.exit(VERBS[verb](rest))
    except MedliteError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


def _run(argv: list[str]) -> int:
    """Compose the configuration and run its job, or the jobs of a sweep."""
    # Threads that spin while they wait make small steps 10 times slower on a shared machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    argv = expand_seeds(argv)
    directories = [conf_directory(), *user_directories(argv)]
    refuse_shared_name(argv, directories)
    finished: list[str] = []
    unsafe: list[str] = []
    sys.argv = ["medlite", *prepare_overrides(argv, find_options(directories))]
    OmegaConf.register_new_resolver("run_name", _run_name, replace=True)

    def job(cfg: DictConfig) -> str:
        config = _job(cfg, directories)
        finished.append(str(config.directory))
        if config.safety.enforce and "report" in config.stages:
            reasons = _unsafe_reasons(config.directory)
            unsafe.extend(f"{reason}: {config.directory}" for reason in reasons)
        return finished[-1]

    try:
        hydra.main(config_path=str(conf_directory()), config_name="config", version_base="1.3")(
            job
        )()
    finally:
        _show_sweep([Path(directory) for directory in finished])
    for line in unsafe:
        _log.error("safety.enforce: %s", line)
    return EXIT_UNSAFE if unsafe else 0


def _unsafe_reasons(directory: Path) -> list[str]:
    """Why a run must not be deployed: it fails, or cannot run; INCONCLUSIVE is no proof of harm."""
    verdict = json.loads((directory / "result.json").read_text())["verdict"]
    reasons = ["the safety gate says FAIL"] if verdict["safety"] == "FAIL" else []
    if verdict.get("unmeasured"):
        runtimes = ", ".join(verdict["unmeasured"])
        reasons.append(f"the deployed model could not be measured on {runtimes}")
    return reasons


def _show_sweep(directories: list[Path]) -> None:
    """The runs of a sweep side by side, with means over seeds; nothing for a single job."""
    with_result = [path for path in directories if (path / "result.json").exists()]
    if len(with_result) < 2:
        return
    stem = directories[0].parent.parent / "sweeps" / f"sweep-{digest(sys.argv)[:6]}"
    stem.parent.mkdir(exist_ok=True)
    targets = ["--csv", f"{stem}.csv", "--html", f"{stem}.html"]
    _compare([*map(str, with_result), "--over-seeds", *targets])
    _log.info("sweep: %s.html", stem)


def _job(cfg: DictConfig, directories: list[Path]) -> JobConfig:
    hydra_cfg = HydraConfig.get()
    is_sweep = hydra_cfg.mode == RunMode.MULTIRUN
    pipeline = importlib.import_module("medlite.pipeline.run")
    pipeline.quieten_libraries()
    try:
        config = check(
            cfg,
            choices=_choices(hydra_cfg),
            options=find_options(directories),
            directories=directories,
        )
        if is_sweep and config.logger.group is None:
            config.logger.group = f"sweep-{digest(sys.argv)[:6]}"
        pipeline.run(config)
    except MedliteError as error:
        if is_sweep:
            raise
        _log.error("%s: %s", type(error).__name__, error)
        sys.exit(1)
    except OSError as error:
        if error.errno != errno.ENOSPC or is_sweep:
            raise
        _log.error("%s", _disk_is_full(error, cfg))
        sys.exit(1)
    return config


def _compare(argv: list[str]) -> int:
    return importlib.import_module("medlite.report.compare").main(argv, over_seeds=_exemplars)


def _exemplars(results: dict[Path, Any]) -> list[Any]:
    found = importlib.import_module("medlite.gate.exemplars_over_seeds")
    return found.exemplar_sections(results)


def _audit(argv: list[str]) -> int:
    return importlib.import_module("medlite.audit.command").main(argv)


def _search(argv: list[str]) -> int:
    return importlib.import_module("medlite.search.command").main(argv)


def _gate(argv: list[str]) -> int:
    return importlib.import_module("medlite.gate.command").main(argv)


def _choices(hydra_cfg: Any) -> dict[str, str]:
    chosen = hydra_cfg.runtime.choices
    return {
        group: str(option)
        for group, option in chosen.items()
        if option is not None and not group.startswith("hydra/")
    }


def _run_name(*, _root_: DictConfig) -> str:
    """`<dataset>-<model>-<compression>-<digest>`: the same configuration, the same directory."""
    hydra_cfg = _root_.hydra if "hydra" in _root_ else HydraConfig.get()
    choices = _choices(hydra_cfg)
    plain = cast("dict[str, Any]", OmegaConf.to_container(_root_))
    for section in ("compression", "runtime"):
        plain[section] = chosen_parts(plain.get(section) or {})
    steps = "+".join(plain["compression"]) or "none"
    parts = [choices.get("dataset", "dataset"), choices.get("model", "model"), steps]
    return "-".join([*parts, digest(list(keyed_sections(plain).values()))[:6]])


def _disk_is_full(error: OSError, cfg: DictConfig) -> str:
    where = error.filename or cfg.outputs
    return (
        f"no space left on the disk that holds {where}: free some and run the same command again, "
        "it goes on from the last whole checkpoint; outputs=... puts the run on another disk"
    )


VERBS: dict[str, Callable[[list[str]], int]] = {
    "run": _run,
    "compare": _compare,
    "audit": _audit,
    "search": _search,
    "gate": _gate,
}

if __name__ == "__main__":
    main()
