"""What each category of the deployment card says, read from the other parts of a result."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from medlite.metrics.names import class_keys
from medlite.report.card_fields import declared, known, measured, observed, shape, unavailable
from medlite.report.lookup import Lookup, number
from medlite.report.result import CardField, RunResult
from medlite.report.shortcut_section import verdict_of


def task_fields(result: RunResult) -> Iterable[CardField]:
    """What the model is for and what it learnt from."""
    data = result.dataset
    splits = ", ".join(
        f"{split} {count} ({data['num_groups'].get(split, '?')} {data['group_kind']}s)"
        for split, count in data["num_samples"].items()
    )
    counts = list(zip(data["class_names"], data["class_counts"], strict=True))
    total = sum(count for _, count in counts)
    if data["labels"] == "multilabel":  # one image may count for several classes
        total = data["num_samples"]["train"]
    shares = ", ".join(f"{name} {count:,} ({count / max(1, total):.1%})" for name, count in counts)
    kind = "pixels" if data["task"] == "segmentation" else "images"
    yield declared("Clinical task", f"{data['task']}, {data['labels']}")
    yield declared("Dataset", data["name"], data["origin"])
    yield declared("Provenance of the data", data["provenance"])
    yield declared("Modality", data["modality"])
    yield declared("Input resolution", f"{shape(data['image_size'])} pixels")
    yield declared("Input channels", data["in_channels"])
    yield declared("Preprocessing", data["preprocessing"])
    yield observed("Dataset scale", splits, f"no {data['group_kind']} is in two splits")
    yield observed("Class imbalance", shares, f"training {kind}")
    yield observed("Files left out", result.num_skipped)


def hardware_fields(result: RunResult, found: Lookup) -> Iterable[CardField]:
    """What it ran on."""
    hardware, machine = result.config.get("hardware", {}), result.environment
    is_target = hardware.get("is_this_machine", True)
    target = hardware.get("description") or hardware.get("name", "host")
    yield declared(
        "Target", target, "" if is_target else "measured on this host, not on the target"
    )
    yield known("Processor", machine.get("cpu"), "the system does not name it")
    yield known("8-bit sums", _sums(machine.get("cuts_off_int8_sums")), "the system does not tell")
    yield known("Accelerator", machine.get("gpu"), "none was used or found")
    yield known("Cores", machine.get("num_cores"), "the system does not count them")
    threads = hardware.get("num_threads") or f"all usable ({machine.get('num_usable_cores')})"
    yield declared("Threads", threads, "set before the runtime was imported")
    memory = machine.get("memory_mib")
    yield known("Memory capacity", memory and f"{memory:,} MiB", "the system does not tell")
    yield known("Power mode", machine.get("cpu_governor"), "no frequency policy is readable here")
    yield unavailable("Thermal constraints", "no sensor is read; see drift under Latency")
    for runtime in found.runtimes():
        load = found.of("contention", runtime, "load_average")
        yield measured(f"System load, {runtime}", load, "not recorded")


def software_fields(result: RunResult) -> Iterable[CardField]:
    """Engines and versions."""
    deployed = {key: about for key, about in result.engines.items() if "/" not in key}
    for runtime, about in deployed.items():
        rest = {k: v for k, v in about.items() if k not in ("engine", "version", "backend")}
        engine = f"{about.get('engine', runtime)} {about.get('version', '')}".strip()
        yield observed(f"Runtime engine, {runtime}", engine)
        yield known(f"Backend, {runtime}", about.get("backend"), "the engine does not name it")
        options = "; ".join(f"{key}: {value}" for key, value in rest.items())
        yield known(f"Compiler optimisations, {runtime}", options, "the engine does not list them")
    if not deployed:
        yield unavailable("Runtime engine", "no runtime was measured in this run")
    yield known("Operating system", result.environment.get("os"), "not recorded")
    yield known("Python", result.environment.get("python"), "not recorded")
    packages = result.environment.get("packages", {})
    versions = ", ".join(f"{name} {version}" for name, version in packages.items())
    yield known("Framework versions", versions, "not recorded")
    git = result.environment.get("git")
    commit = (
        git and f"{git['commit'][:12]}{', with uncommitted changes' if git['is_dirty'] else ''}"
    )
    yield known("Commit", commit, "medlite was installed, not run from a git checkout")


def precision_fields(result: RunResult, found: Lookup) -> Iterable[CardField]:
    """Which numbers the deployed model computes with."""
    deployed = [artifact for artifact in result.artifacts if not artifact.get("candidate")]
    precisions = ", ".join(f"{each['precision']} ({each['format']})" for each in deployed)
    yield known("Precision of the deployed model", precisions, "no model was exported")
    steps = result.config.get("compression") or {}
    yield declared("Compression", result.choices.get("compression", "none"))
    sizes = ", ".join(
        f"{name}: {min(images, result.dataset['num_samples']['train'])} images"
        for name, options in steps.items()
        if (images := calibration_samples(options or {})) is not None
    )
    calibration = declared("Calibration set", sizes)
    yield (
        calibration
        if sizes
        else unavailable("Calibration set", "no step of this run states a calibration set")
    )
    for topic, text in result.notes.items():
        yield observed(topic[:1].upper() + topic[1:], text)
    if not result.notes:
        yield unavailable("Scales and layers kept in float", "no compression step reported any")
    for runtime in found.runtimes():
        count = found.get(f"operators/{runtime}/int8_count")
        yield measured(f"8-bit operators, {runtime}", count, "the graph was not read")


def _sums(are_cut_off: bool | None) -> str | None:
    """What the processor does to sums of 8-bit products."""
    if are_cut_off is None:
        return None
    what = "cut off where weights have 8 bits (no VNNI)" if are_cut_off else "exact"
    return f"{what}, by the processor's instruction sets"


def calibration_samples(options: Mapping[str, Any]) -> int | None:
    """Images that set the ranges of a step; weights alone, below 7 bits, need none."""
    return options.get("calibration_samples") if options.get("weight_bits", 8) >= 7 else None


def protocol_fields(result: RunResult) -> Iterable[CardField]:
    """How the timing was done."""
    settings: Mapping[str, Any] = result.config.get("benchmark", {})
    yield declared("Batch size", settings.get("batch_size", 1))
    warmup = settings.get("num_warmup", "?")
    yield declared("Warm-up", f"at least {warmup} queries, more until the latency is level")
    yield declared("Timed queries", settings.get("num_queries", "?"), "of each candidate")
    rounds = settings.get("num_rounds", "?")
    yield declared("Order", f"{rounds} rounds in which the candidates take turns")
    yield declared("Synchronisation", "each query blocks until its result is in host memory")
    yield declared("Inside the timing", "the runtime's call on one prepared array, no file reading")
    yield declared("Process", "a fresh child process for each candidate")
    yield declared("Input", "images of the test split")


def latency_fields(result: RunResult, found: Lookup) -> Iterable[CardField]:
    """How fast, and how steadily."""
    for candidate in found.candidates():
        for name, label in {
            "p50_ms": "p50",
            "p90_ms": "p90",
            "sd_ms": "Standard deviation",
        }.items():
            figure = found.of("latency", candidate, name)
            yield measured(f"{label}, {candidate}", figure, "not measured in this run")
        rate = found.of("throughput", candidate, "images_per_s")
        yield measured(f"Throughput, {candidate}", rate, "not measured in this run")
        stability, failure = result.stability.get(candidate), result.failures.get(candidate)
        reason = failure or "not judged in this run"
        yield known(f"Throttling or drift, {candidate}", stability, reason)
    for runtime in found.runtimes():
        ratio = found.get(f"speedup/{runtime}/ratio")
        yield measured(f"Speed-up, {runtime}", ratio, "no uncompressed model was timed beside it")
    if not found.candidates():
        yield unavailable("Latency", "no runtime was measured in this run")


def memory_fields(found: Lookup) -> Iterable[CardField]:
    """How much the target must hold."""
    for candidate in found.candidates():
        labels = {"peak_mib": "Peak memory", "runtime_only_mib": "Runtime alone"}
        disk = found.of("size", candidate, "disk_kib")
        yield measured(f"Size on disk, {candidate}", disk, "not measured in this run")
        for name, label in labels.items():
            figure = found.of("memory", candidate, name)
            yield measured(f"{label}, {candidate}", figure, "not measured in this run")
    if not found.candidates():
        yield unavailable("Memory", "no runtime was measured in this run")


def energy_fields(found: Lookup) -> Iterable[CardField]:
    """What one inference costs, and how that is known."""
    for runtime in found.runtimes():
        net = found.of("energy", runtime, "net_mj_per_image")
        missing = "not measured in this run"
        yield measured(f"Energy per inference, {runtime}", net, missing)
        if net is not None and net.value is not None:
            yield observed(f"Method, {runtime}", net.note)
            idle = found.of("energy", runtime, "idle_w")
            yield measured(f"Idle power subtracted, {runtime}", idle, missing)
        else:
            reason = net.note if net is not None else missing
            yield unavailable(f"Method and idle subtraction, {runtime}", reason)
    if not found.runtimes():
        yield unavailable("Energy", "no runtime was measured in this run")


def safety_fields(result: RunResult, found: Lookup) -> Iterable[CardField]:
    """Whether it can be trusted after optimisation."""
    labels = {
        result.primary_metric: f"Task metric ({result.primary_metric})",
        "ece": "Calibration error",
        "nll": "NLL",
    }
    for candidate in found.candidates():
        for name, label in labels.items():
            score = found.score(name, candidate)
            yield measured(f"{label}, {candidate}", score, "not evaluated in this run")
    for runtime, report in result.safety.items():
        yield observed(f"Safety gate, {runtime}", report["verdict"], gate_note(report))
        flips = report.get("flips")
        for kind, rare in rare_classes(report):
            yield observed(
                f"{kind}, {runtime}",
                rare_text(rare["name"], report, result.dataset["class_names"]),
                f"{rare['prevalence']:.1%} in training, {rare['test_count']} test images",
            )
        if flips:
            changed = f"{flips['changed']:,} of {flips['total']:,} {flips['unit']}"
            note = f"{flips['broken']:,} broken, {flips['mended']:,} mended"
            yield observed(f"Changed decisions, {runtime}", changed, note)
    for runtime, report in result.control.items():
        label = f"Against as much further training in float, {runtime}"
        yield observed(label, report["verdict"], gate_note(report))
    unmeasured = result.verdict.get("unmeasured", ())
    for runtime in unmeasured:
        yield unavailable(f"Deployed model, {runtime}", result.failures[runtime])
    if not result.safety and not unmeasured:
        yield unavailable("Safety gate", "no compressed model to compare with an uncompressed one")
    yield from robustness_fields(result)
    yield from shortcut_fields(result)
    yield from explanation_fields(result)
    yield from failure_fields(result)


SIGNIFICANT = 0.05
NOISE = ("gaussian_noise", "rician_noise", "speckle")
RESOLUTION = ("resolution", "spacing")


def robustness_fields(result: RunResult) -> Iterable[CardField]:
    """What is lost where images are noisy or of another resolution, and in all else."""
    for label, names in {
        "Robustness to noise": NOISE,
        "Robustness to resolution shift": RESOLUTION,
    }.items():
        rows = {
            runtime: [row for row in report["rows"] if row["corruption"] in names]
            for runtime, report in result.robustness.items()
        }
        for runtime, of_runtime in rows.items():
            worst = max(of_runtime, key=lambda row: row["severity"], default=None)
            if worst is not None:
                yield observed(f"{label}, {runtime}", *robustness_text(result, runtime, worst))
        if not any(rows.values()):
            yield unavailable(label, "no such corruption is part of this run")
    for runtime, report in result.robustness.items():
        if report["verdict"] is not None:
            label = f"Degrades no more than uncompressed, {runtime}"
            yield observed(label, report["verdict"], robustness_note(report))


def shortcut_fields(result: RunResult) -> Iterable[CardField]:
    """What is told from images without their finding."""
    for runtime, report in result.shortcuts.items():
        for row in report["rows"]:
            if row["limit"] is not None and row["compressed"] is not None:
                value = f"{verdict_of(row)}: {report['score']} {number(row['compressed'])}"
                note = f"{report['num_images']} test images; suspect above {row['limit']:g}"
                yield observed(f"Shortcuts, {row['what']}, {runtime}", value, note)
    if not result.shortcuts:
        yield unavailable("Shortcuts", "switched off in this run")


def explanation_fields(result: RunResult) -> Iterable[CardField]:
    """Whether both models look at the same."""
    for row in result.explanations.get("rows", ()):
        label = f"Saliency, {row['method'].replace('_', ' ')}, {row['where']}"
        if row["rank_correlation"] is not None:
            value = f"rank correlation {number(row['rank_correlation'])} with the uncompressed one"
            note = f"{row['num_images']} test images"
            yield observed(label, value, f"{note}; {row['note']}" if row["note"] else note)
        elif not row["num_images"]:
            yield unavailable(label, row["note"])
    if not result.explanations:
        yield unavailable("Saliency", "switched off in this run")


def failure_fields(result: RunResult) -> Iterable[CardField]:
    """Which images compression changed most, and which of them fail."""
    for runtime, report in result.exemplars.items():
        found = f"{len(report['exemplars'])} of {report['num_images']} images"
        over = [
            f"{each['class_name']} (odds ratio over {number(each['interval'][0])})"
            for each in report["classes"]
            if each["p_value"] < SIGNIFICANT and (each["interval"][0] or 0) > 1
        ]
        words = f"over-represented: {', '.join(over)}" if over else "no class is over-represented"
        yield observed(f"Changed most by compression, {runtime}", found, words)
    for runtime, report in result.failure_modes.items():
        worst = max(report["groups"], key=lambda group: group["after"], default=None)
        if worst is not None:
            value = f"{worst['kind']} {worst['name']}: mean loss {number(worst['after'])}"
            note = f"{report['loss']}; the group of {worst['num_images']} images with most loss"
            yield observed(f"Failure modes, {runtime}", value, note)
    if not result.failure_modes:
        yield unavailable("Failure modes", "no finite output was recorded in this run")


def robustness_note(report: Mapping[str, Any]) -> str:
    """How many corruptions came out how, and which failed."""
    verdicts = Counter(item["verdict"] for item in report["items"])
    tally = ", ".join(f"{count} {verdict}" for verdict, count in verdicts.most_common())
    names = [item["name"] for item in report["items"] if item["verdict"] == "FAIL"]
    failed = ", ".join(name.removeprefix("robustness/").replace("_", " ") for name in names)
    return f"{tally}; fails: {failed}" if failed else tally


def robustness_text(result: RunResult, runtime: str, row: Mapping[str, Any]) -> tuple[str, str]:
    """The task metric under one condition, before and after compression, and how it was had."""
    report, metric = result.robustness[runtime], result.primary_metric
    before, after = row["baseline"], row["compressed"]
    clean = report["clean_compressed"]
    shown = "not defined" if after is None else number(after)
    from_clean = "" if clean is None else f" ({number(clean)} on clean images)"
    beside = "" if before is None else f"; uncompressed {number(before)}"
    where = f"{row['corruption'].replace('_', ' ')}, severity {row['severity']} of 5"
    note = f"{where}; {report['num_images']} test images"
    return f"{metric} {shown}{from_clean}{beside}", note


def gate_note(report: Mapping[str, Any]) -> str:
    """Which items did not pass."""
    open_items = [item for item in report["items"] if item["verdict"] != "PASS"]
    names = ", ".join(
        f"{item['name'].removeprefix('safety/')} {item['verdict']}" for item in open_items
    )
    return f"{report['num_groups']} {report['group_kind']}s resampled" + (
        f"; {names}" if names else ""
    )


def rare_classes(report: Mapping[str, Any]) -> Iterable[tuple[str, Mapping[str, Any]]]:
    """The rarest class and the other rare ones, each with its label."""
    rarest = report.get("rarest_class")
    if rarest:
        yield "Rarest class", rarest
    for each in report.get("rare_classes", ()):
        if each != rarest:
            yield f"Rare class {each['name']}", each


def rare_text(name: str, report: Mapping[str, Any], class_names: Sequence[str]) -> str:
    """A class's sensitivity before and after where it was judged, and at its operating point."""
    key = class_keys(class_names)[class_names.index(name)]
    items = {item["name"].removeprefix("safety/"): item for item in report["items"]}
    parts = []
    for check, words in {
        "sensitivity_drop": "sensitivity",
        "sensitivity_at_point_drop": "at its operating point",
    }.items():
        item = items.get(f"{check}/{key}")
        if item is not None and item["baseline"] is not None:
            change = f"{number(item['baseline'])} to {number(item['compressed'])}"
            parts.append(f"{words} {change} ({item['verdict']})")
    return f"{name}: {', '.join(parts)}" if parts else name
