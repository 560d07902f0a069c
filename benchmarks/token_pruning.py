"""A vision transformer that drops tokens beside the whole one, and beside one that masks them.

    python benchmarks/token_pruning.py [--model NAME] [--keep-ratio R] [--rounds N] [--json FILE]

Random weights, one image, one thread, processor time. All variants of a runtime take turns in one
process; the ratio to the whole net is taken round by round. "masked" chooses the same tokens and
sets the others to zero, which is the cheapest mask there is: whatever it saves, masks save.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from medlite.command_line import conf_directory
from medlite.compression.token_blocks import TokenDroppingBlock
from medlite.compression.token_pruning import TokenPruning
from medlite.config import build, model_config
from medlite.data.phantom import phantom
from medlite.export.export import export
from medlite.export.layer_costs import count_layers, total
from medlite.runtimes.onnxruntime import OnnxRuntime
from medlite.runtimes.openvino import OpenVinoRuntime
from medlite.runtimes.torch import TorchRuntime
from medlite.types import CompressionContext, DataSpec, Hardware, InferenceSession, Runtime

RUNTIMES: dict[str, Runtime] = {
    "torch": TorchRuntime(),
    "onnxruntime": OnnxRuntime(),
    "openvino": OpenVinoRuntime(),
}
ONE_THREAD = Hardware(num_threads=1)
QUERIES_A_ROUND = 5


class MaskingBlock(TokenDroppingBlock):
    """Chooses as its parent does, and computes everything all the same."""

    def select(self, tokens: Tensor, importance: Tensor) -> Tensor:
        """(B, L, C) -> (B, L, C), zero where a token would go."""
        chosen = importance.topk(self.num_kept, dim=1).indices
        keep = torch.zeros_like(importance).scatter(1, chosen, 1.0)
        prefix = tokens[:, : self.num_prefix]
        return torch.cat([prefix, keep[..., None] * tokens[:, self.num_prefix :]], dim=1)


def build_variants(model: str, spec: DataSpec, keep_ratio: float) -> dict[str, nn.Module]:
    """The whole net, and three that use fewer tokens."""
    torch.manual_seed(0)
    whole = build(
        model_config(model, [conf_directory()]),
        in_channels=spec.in_channels,
        num_classes=spec.num_classes,
        image_size=spec.image_size,
        spatial_dims=spec.num_spatial_dims,
    ).eval()
    step = TokenPruning(epochs=1, learning_rate=1e-4, keep_ratio=keep_ratio)
    variants = {"whole": whole, "masked": drop_tokens(whole, replace(step, fuse=False), spec)}
    for module in variants["masked"].modules():
        if isinstance(module, TokenDroppingBlock):
            module.__class__ = MaskingBlock
    variants["dropped"] = drop_tokens(whole, replace(step, fuse=False), spec)
    variants["dropped, merged"] = drop_tokens(whole, step, spec)
    return variants


def drop_tokens(net: nn.Module, step: TokenPruning, spec: DataSpec) -> nn.Module:
    """What the step makes of a net, without training."""
    context = CompressionContext(
        spec=spec,
        fit=lambda net, **_: net,
        calibration_images=lambda n: torch.zeros(n, *spec.input_shape),
        calibration_batches=lambda _: [],
        validation_batches=lambda _: [],
        build_teacher=nn.Identity,
        report=lambda topic, text: print(f"{topic}: {text}"),
    )
    return step.apply(net, context)[0]


def take_turns(
    sessions: dict[str, InferenceSession], images: np.ndarray, num_rounds: int
) -> dict[str, list[float]]:
    """Milliseconds of processor time a query, one number a round."""
    times: dict[str, list[float]] = {name: [] for name in sessions}
    for number in range(-1, num_rounds):
        for name, session in sessions.items():
            start = time.process_time_ns()
            for image in images:
                session(image[None])
            elapsed = (time.process_time_ns() - start) / 1e6 / len(images)
            if number >= 0:  # the first round warms up
                times[name].append(elapsed)
    return times


def describe(
    runtime: str, variant: str, times: list[float], whole: list[float], gmacs: float
) -> dict[str, Any]:
    """One row of the table."""
    ratios = sorted(a / b for a, b in zip(times, whole, strict=True))
    return {
        "runtime": runtime,
        "variant": variant,
        "gmacs": gmacs,
        "median_ms": statistics.median(times),
        "ratio_median": statistics.median(ratios),
        "ratio_min": ratios[0],
        "ratio_max": ratios[-1],
        "n": len(ratios),
    }


def measure_runtime(
    name: str, nets: dict[str, nn.Module], spec: DataSpec, num_rounds: int
) -> dict[str, list[float]]:
    """The times of every variant on one runtime."""
    runtime, shape = RUNTIMES[name], (QUERIES_A_ROUND, *spec.input_shape)
    images = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    with tempfile.TemporaryDirectory() as scratch:
        sessions = {}
        for number, (variant, net) in enumerate(nets.items()):
            artifact = export(
                net, format=runtime.format, input_shape=spec.input_shape, directory=Path(scratch),
                stem=f"variant_{number}",
            )  # fmt: skip
            sessions[variant] = runtime.load(artifact, ONE_THREAD)
        return take_turns(sessions, images, num_rounds)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit_tiny")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--keep-ratio", type=float, default=0.7)
    parser.add_argument("--runtimes", nargs="+", choices=RUNTIMES, default=list(RUNTIMES))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    """Measure, print, and write."""
    arguments = parse_arguments()
    torch.set_num_threads(1)
    sides = (arguments.image_size, arguments.image_size)
    spec = phantom(task="classification", image_size=sides, in_channels=3).spec
    nets = build_variants(arguments.model, spec, arguments.keep_ratio)
    gmacs = {
        variant: total(count_layers(net, spec.input_shape)).macs / 1e9
        for variant, net in nets.items()
    }
    print(
        f"{arguments.model}, 3x{sides[0]}x{sides[1]}, torch {torch.__version__}, "
        f"{platform.platform()}, one thread, n={arguments.rounds} rounds of {QUERIES_A_ROUND}"
    )
    print(f"{'runtime':13}{'variant':17}{'GMACs':>7}{'median':>12}  ratio to whole (spread)")
    rows = []
    for name in arguments.runtimes:
        times = measure_runtime(name, nets, spec, arguments.rounds)
        for variant, some in times.items():
            row = describe(name, variant, some, times["whole"], gmacs[variant])
            rows.append(row)
            print(
                f"{name:13}{variant:17}{row['gmacs']:7.3f}{row['median_ms']:9.2f} ms"
                f"{row['ratio_median']:8.3f} ({row['ratio_min']:.3f}..{row['ratio_max']:.3f})",
                flush=True,
            )
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
