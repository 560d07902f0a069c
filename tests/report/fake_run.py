"""A run as the pipeline would record it, from simulated predictions and timings."""

from dataclasses import asdict, replace

import numpy as np
from scipy.ndimage import gaussian_filter

from medlite.metrics.evaluate import evaluate, reliability
from medlite.metrics.names import class_keys
from medlite.report.card import build_card
from medlite.report.examples import choose_examples, write_examples
from medlite.report.explanation_section import explanation_measurements
from medlite.report.result import RunResult
from medlite.report.verdict import summarise_verdict
from medlite.safety.agreement import Agreement, compare_maps
from medlite.safety.exemplars import find_exemplars
from medlite.safety.failures import find_failures
from medlite.safety.gate import compare_models
from medlite.safety.operating_point import choose_operating_points
from medlite.safety.robustness import (
    CLEAN,
    compare_robustness,
    robustness_measurements,
    task_statistic,
)
from medlite.safety.shortcuts import (
    compare_shortcuts,
    shortcut_measurements,
    shortcut_statistic,
)
from medlite.safety_settings import SafetyMargins
from medlite.types import DataSpec, Hardware, Measurement, Predictions

GAIN = {"speedup": 1.2, "interval": [1.1, 1.3], "size_ratio": 0.25, "reason": ""}
GRADES = ("No retinopathy", "Mild", "Moderate", "Severe", "Proliferative")


def segmentation_spec():
    return DataSpec(
        name="lidc_nodules", task="segmentation", labels="binary", in_channels=1, num_classes=1,
        image_size=(64, 64), class_names=("background", "nodule"),
        class_counts=(6_102_311, 451_289), num_samples={"train": 1600, "val": 267, "test": 64},
        num_groups={"train": 525, "val": 87, "test": 32}, group_kind="patient", modality="ct",
        provenance="semi-synthetic: real reader-consensus shapes, simulated CT texture",
        origin="LIDC-IDRI annotations (CC BY 3.0)", preprocessing="64 x 64 px at 0.5 mm",
        spacing_mm=(0.5, 0.5), num_skipped=0,
    )  # fmt: skip


def classification_spec():
    return DataSpec(
        name="retinamnist", task="classification", labels="multiclass", in_channels=3,
        num_classes=5, image_size=(28, 28), class_names=GRADES,
        class_counts=(486, 128, 206, 194, 66), num_samples={"train": 1080, "val": 120, "test": 400},
        num_groups={"train": 1080, "val": 120, "test": 400}, group_kind="image",
        modality="fundus", provenance="real", origin="MedMNIST v2 (CC BY 4.0)",
        preprocessing="28 x 28 px, scaled to [0, 1]", num_skipped=2,
    )  # fmt: skip


def make_lineage(spec, metric):
    """Two stages; the second quarters the weights and loses something of the last class."""
    names = [f"sensitivity/{key}" for key in class_keys(spec.class_names)]
    rows = []
    for stage, kib, score, last in (("train", 197, 0.91, 0.84), ("qat", 49.25, 0.9, 0.77)):
        scores = {metric: score, "ece": 0.04, "nll": 0.2, **dict.fromkeys(names, 0.9)}
        rows.append(
            {
                "stage": stage, "key": f"{spec.name}-net+{stage}-91be", "sha256": "cd" * 32,
                "params": 49_457, "macs": 66e6, "weight_bytes": 1024 * kib, "seconds": 88.1,
                "scores": {**scores, names[-1]: last},
                "gains": {} if stage == "train" else {"onnxruntime": dict(GAIN)},
            }
        )  # fmt: skip
    return rows


def nodules(count, seed=0):
    """Images and masks of blobs on texture, (n, 1, 64, 64) and (n, 64, 64)."""
    generator = np.random.default_rng(seed)
    rows, columns = np.mgrid[:64, :64]
    images, masks = [], []
    for _ in range(count):
        centre, radius = generator.uniform(20, 44, 2), generator.uniform(6, 16)
        angle = np.arctan2(rows - centre[0], columns - centre[1])
        wobble = 1 + 0.15 * np.sin(3 * angle + generator.uniform(0, 6))
        mask = np.hypot(rows - centre[0], columns - centre[1]) < radius * wobble
        texture = gaussian_filter(generator.normal(0, 0.5, (64, 64)), 3)
        images.append(0.25 + 0.45 * mask + texture + generator.normal(0, 0.05, (64, 64)))
        masks.append(mask)
    return np.float32(images)[:, None], np.int64(masks)


def fundi(targets, seed=0):
    """Round colour images, (n, 3, 28, 28)."""
    generator = np.random.default_rng(seed)
    rows, columns = np.mgrid[:28, :28] - 13.5
    disc = (np.hypot(rows, columns) < 13)[None, None]
    shade = np.array([0.75, 0.4, 0.2])[None, :, None, None]
    noise = gaussian_filter(generator.normal(0, 0.3, (len(targets), 3, 28, 28)), (0, 0, 2, 2))
    return np.float32(disc * (shade + noise + 0.03 * targets[:, None, None, None]))


def fake_predictions(spec, seed=0):
    generator = np.random.default_rng(seed)
    if spec.task == "segmentation":
        images, targets = nodules(64)
        smooth = gaussian_filter(generator.normal(0, 14, images.shape), (0, 0, 4, 4))
        logits = (images - 0.47) * 14 + smooth
        groups = tuple(f"patient {i // 2}" for i in range(64))
    else:
        targets = generator.choice(5, 400, p=np.array(spec.class_counts) / 1080)
        images = fundi(targets)
        logits = generator.normal(0, 1, (400, 5))
        logits[np.arange(400), targets] += 1.4
        groups = tuple(f"image {i}" for i in range(400))
    return images, Predictions(logits=np.float32(logits), targets=targets, groups=groups)


def compressed_from(predictions, spec, seed=1):
    noise = np.random.default_rng(seed).normal(0, 0.35, predictions.logits.shape)
    logits = predictions.logits + noise
    if spec.task == "classification":
        logits[:, -1] -= 1.0
    return Predictions(
        logits=np.float32(logits), targets=predictions.targets, groups=predictions.groups
    )


def fake_latency(candidate, median_ms, seed):
    generator = np.random.default_rng(seed)
    samples = median_ms * (1 + generator.gamma(1.5, 0.04, 200))
    samples[generator.integers(0, 200, 3)] *= 3
    prefix, _, runtime = candidate.rpartition("/")
    base = f"{prefix}/" if prefix else ""
    low, p50, p90 = (float(q) for q in np.quantile(samples, (0.05, 0.5, 0.9)))
    rows = [
        Measurement(
            name=f"{base}latency/{runtime}/p50_ms", value=p50, unit="ms", n=200,
            spread=(low, p50 * 1.02), higher_is_better=False,
            note="40 warm-up queries; stable",
        ),
        Measurement(
            name=f"{base}latency/{runtime}/p90_ms", value=p90, unit="ms", n=200,
            higher_is_better=False,
            note="not exceeded with 99 % confidence (MLPerf early stopping)",
        ),
        Measurement(
            name=f"{base}throughput/{runtime}/images_per_s", value=1300 / p50, unit="images/s",
            n=1280, higher_is_better=True, note="offline, batches of 16",
        ),
        Measurement(
            name=f"{base}size/{runtime}/disk_kib", value=78.4 if not base else 231.0, unit="KiB",
            n=1, higher_is_better=False, note=".onnx files, engine aside",
        ),
        Measurement(
            name=f"{base}memory/{runtime}/peak_mib", value=92.0 if not base else 97.5, unit="MiB",
            n=1, higher_is_better=False, note="peak resident memory of a fresh process",
        ),
        Measurement(
            name=f"{base}operators/{runtime}/int8_count", value=0.0 if base else 31.0,
            unit="operators", n=1, note="of 118 in the graph as the runtime optimised it",
        ),
        Measurement.unavailable(
            f"{base}energy/{runtime}/net_mj_per_image", "mJ",
            "this machine counts no energy: no RAPL, no NVML",
        ),
    ]  # fmt: skip
    return rows, samples.tolist()


def fake_history(metric, num_epochs):
    steps = np.arange(num_epochs)
    wiggle = np.random.default_rng(0).normal(0, 0.01, num_epochs)
    decay = np.exp(-steps / 5)
    return [
        {
            "epoch": int(step), "loss": float(0.15 + 0.7 * d), "learning_rate": 1e-3,
            "val/loss": float(0.2 + 0.65 * d + w), f"val/{metric}": float(0.93 - 0.5 * d + w),
        }
        for step, d, w in zip(steps, decay, wiggle, strict=True)
    ]  # fmt: skip


def fake_robustness(baseline, compressed, spec):
    """Two corruptions that drown what the models say, one of them the compressed model's more."""
    generator, scores = np.random.default_rng(5), []
    for predictions, sd in ((baseline, 1.5), (compressed, 4.0)):
        conditions = {("blur", 1): 0, ("blur", 5): 1, ("gaussian_noise", 1): sd / 4,
                      ("gaussian_noise", 5): sd}  # fmt: skip
        scores.append({CLEAN: task_statistic(predictions, spec)})
        for condition, spread in conditions.items():
            noise = generator.normal(0, spread, predictions.logits.shape)
            worse = replace(predictions, logits=np.float32(predictions.logits + noise))
            scores[-1][condition] = task_statistic(worse, spec)
    report = compare_robustness(
        *scores, groups=baseline.groups, spec=spec, margins=SafetyMargins(num_resamples=600)
    )
    return report.to_json()


def fake_shortcuts(baseline, compressed, spec):
    """Both models still say half of what they said where the finding is hidden."""
    probe = "border_alone" if spec.task == "classification" else "finding_hidden"
    scores = []
    for predictions in (baseline, compressed):
        half = replace(predictions, logits=np.float32(predictions.logits / 2))
        scores.append({"clean": shortcut_statistic(predictions, spec)})
        scores[-1][probe] = shortcut_statistic(half, spec)
    report = compare_shortcuts(*scores, groups=baseline.groups, spec=spec, num_resamples=600)
    return report.to_json()


def fake_explanations(directory, images, spec, where):
    """Maps of noise: the compressed model's are half those of the uncompressed one."""
    generator, count = np.random.default_rng(6), 4
    before, other = generator.random((2, count, *spec.image_size))
    sides = {"before": list(before), "after": list((before + other) / 2)}
    row = compare_maps(
        *sides.values(), [None] * count, method="grad_cam", where=where,
        groups=[f"p{i}" for i in range(count)], randomised_correlation=0.7, num_resamples=600,
    )  # fmt: skip
    nothing = Agreement(method="rollout", where="torch", num_images=0, note="no attention")
    arrays = {f"grad_cam/{where}/{side}": np.stack(maps) for side, maps in sides.items()}
    np.savez(directory / "explanations.npz", images=images[:count], **arrays)
    return {
        "num_images": count, "num_groups": count, "group_kind": spec.group_kind,
        "rows": [asdict(row), asdict(nothing)], "pictures": "explanations.npz",
    }  # fmt: skip


def told(case):
    """What the pipeline adds to a case."""
    truth = f"truth {case['position']}"
    return {**case, "truth": truth, "decisions": {"uncompressed": "said", "openvino": "says"}}


def fake_exemplars(directory, images, before, after, spec):
    report = find_exemplars(before, after, spec).to_json()
    positions = [case["position"] for case in report["exemplars"][:6]]
    write_examples(
        directory / "exemplars.npz",
        images=images[positions],
        targets=before.targets[positions],
        logits={"uncompressed": before.logits[positions], "deployed": after.logits[positions]},
    )
    cases = [told(case) for case in report["exemplars"]]
    return {**report, "exemplars": cases, "pictures": "exemplars.npz"}


def fake_failures(before, after, spec):
    report = find_failures(before, after, spec, num_resamples=600).to_json()
    cases = {k: [told(case) for case in report[k]] for k in ("worst", "changed")}
    return {**report, **cases, "worst_pictures": None, "changed_pictures": None}


def make_run(directory, task="segmentation", runtimes=("onnxruntime", "openvino")):
    """A finished result with its examples.npz in `directory`."""
    spec = segmentation_spec() if task == "segmentation" else classification_spec()
    metric = "dice" if task == "segmentation" else "auc"
    images, before = fake_predictions(spec)
    after = compressed_from(before, spec)
    points = choose_operating_points(before, spec, sensitivity=0.9)
    measurements, samples, safety, bins = [], {}, {}, {}
    for position, runtime in enumerate(runtimes):
        for candidate, median in ((f"baseline/{runtime}", 5.1), (runtime, 2.9)):
            rows, samples[candidate] = fake_latency(candidate, median + position, position)
            measurements += rows
        ratio = (5.1 + position) / (2.9 + position)
        measurements.append(
            Measurement(
                name=f"speedup/{runtime}/ratio", value=ratio, unit="ratio", n=10,
                spread=(ratio - 0.06, ratio + 0.05), higher_is_better=True,
            )
        )  # fmt: skip
        measurements += evaluate(before, spec, prefix=f"baseline/test/{runtime}")
        measurements += evaluate(after, spec, prefix=f"test/{runtime}")
        margins = SafetyMargins(num_resamples=600)
        report = compare_models(before, after, spec, margins, operating_points=points)
        safety[runtime] = report.to_json()
        bins[f"baseline/{runtime}"] = reliability(before, spec)
        bins[runtime] = reliability(after, spec)
    robustness = dict.fromkeys(runtimes, fake_robustness(before, after, spec))
    shortcuts = dict.fromkeys(runtimes, fake_shortcuts(before, after, spec))
    for runtime, report in shortcuts.items():
        measurements += shortcut_measurements(runtime, report)
    explanations = fake_explanations(directory, images, spec, runtimes[0])
    measurements += explanation_measurements(explanations)
    for runtime, report in robustness.items():
        measurements += robustness_measurements(runtime, report)
    measurements.append(Measurement(name="complexity/params", value=49457.0, unit="", n=1))
    measurements.append(Measurement(name="complexity/gmacs", value=0.061, unit="GMAC", n=1))
    chosen = choose_examples(before)
    write_examples(
        directory / "examples.npz",
        images=images[chosen],
        targets=before.targets[chosen],
        logits={"uncompressed": before.logits[chosen], "deployed": after.logits[chosen]},
    )
    budgets = []
    for runtime in runtimes:
        value = float(np.quantile(samples[runtime], 0.9))
        budgets.append(
            {
                "name": "max_latency_p90_ms", "runtime": runtime, "limit": 4.0, "value": value,
                "unit": "ms", "verdict": "fits" if value <= 4 else "missed",
                "margin": f"{abs(4 - value):.2f} ms {'below' if value <= 4 else 'over'} the limit",
            }
        )  # fmt: skip
    worst = {report["verdict"] for report in safety.values()}
    gate = next((v for v in ("FAIL", "INCONCLUSIVE") if v in worst), "PASS")
    words = "8-bit operators run in " + ", ".join(runtimes)
    result = RunResult(
        name=f"{spec.name}-ultralight_vm_unet-qat",
        created_at="2026-01-31T12:00:00+00:00",
        choices={
            "dataset": spec.name, "model": "ultralight_vm_unet", "compression": "qat",
            "runtime": "+".join(runtimes), "hardware": "laptop_8gb", "train": "quick",
        },
        primary_metric=metric,
        operating_points={"baseline": [asdict(point) for point in points]},
        dataset=asdict(spec),
        config={
            "dataset": {"_target_": "medlite.data.lidc.Nodules", "root": "data/jane_doe"},
            "compression": {"qat": {"calibration_samples": 256}},
            "hardware": asdict(Hardware(name="laptop_8gb", num_threads=2, max_latency_p90_ms=4.0)),
            "benchmark": {
                "batch_size": 1, "num_warmup": 20, "num_queries": 200, "num_rounds": 10,
            },
        },
        environment={
            "seed": 0, "python": "3.11.9", "packages": {"torch": "2.13.0", "monai": "1.6.0"},
            "os": "Linux-6.8", "machine": "x86_64", "cpu": "Example CPU @ 2.6 GHz",
            "num_cores": 8, "num_usable_cores": 8, "memory_mib": 15872, "cpu_governor": None,
            "gpu": None, "git": {"commit": "0" * 40, "is_dirty": False},
        },
        measurements=measurements,
        stages=[
            {"name": "train baseline", "seconds": 231.5, "key": "lidc_nodules-2f60"},
            {"name": "compress qat", "seconds": 88.1, "key": "lidc_nodules+qat-91be"},
            {"name": "export", "seconds": 21.0, "key": "77d0"},
            {"name": "bench", "seconds": 64.2, "key": "e4c1"},
        ],
        lineage=make_lineage(spec, metric),
        verdict={
            "budgets": budgets, "safety": gate, "parity": "PASS", "quantization": words,
            "summary": summarise_verdict(
                budgets=budgets, safety=gate, parity="PASS", quantization=words
            ),
        },
        artifacts=[
            {
                "candidate": name, "path": f"artifacts/{name or 'model'}.onnx",
                "files": [f"artifacts/{name or 'model'}.onnx"], "format": "onnx",
                "input_shape": [spec.in_channels, *spec.image_size], "output_shape": [1, 64, 64],
                "precision": "fp32" if name else "int8", "num_bytes": 236544 if name else 80282,
                "sha256": "ab" * 32, "imports": [],
            }
            for name in ("baseline", "")
        ],
        parity=[
            {
                "candidate": candidate, "precision": "int8", "num_images": 64,
                "max_abs_difference": 0.031, "max_relative_difference": 0.0021,
                "cosine": 0.9999981, "num_decisions": 262144, "num_flips": 12, "dice": 0.9998,
                "metric_difference": None, "tolerance": {"max_flip_ratio": 0.02},
                "passed": True, "reasons": [],
            }
            for candidate in samples
        ],
        safety=safety,
        robustness=robustness,
        shortcuts=shortcuts,
        explanations=explanations,
        exemplars={each: fake_exemplars(directory, images, before, after, spec)
                   for each in runtimes},
        failure_modes={each: fake_failures(before, after, spec) for each in runtimes},
        history={"baseline": fake_history(metric, 20), "qat": fake_history(metric, 3)},
        latency_samples_ms=samples,
        reliability=bins,
        engines={
            runtime: {
                "engine": runtime, "version": "1.22", "backend": "CPU",
                "options": "all graph optimisations",
            }
            for runtime in runtimes
        },
        stability=dict.fromkeys(samples, "stable"),
        notes={
            "quantisation": "INT8 in 31 of 44 weighted layers; one weight scale a channel",
            "kept in float": "stem, head, 6 scans",
        },
        examples="examples.npz",
        num_skipped=spec.num_skipped,
    )  # fmt: skip
    result.card = build_card(result)
    return result
