"""The words that all rooms share: plain dataclasses, without torch at import.

Shapes in docstrings: B batch, C channels, H W D height width depth, K logits.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import numpy as np
    from torch import Tensor, nn

Task = Literal["classification", "segmentation"]
Labels = Literal["binary", "multiclass", "multilabel"]
Source = Literal["measured", "declared", "estimated", "unavailable"]
Split = Literal["train", "val", "test"]


class Batch(NamedTuple):
    """What a data loader yields.

    image: (B, C, H, W[, D]) float32. target: (B,) int64 for binary and multi-class
    classification, (B, K) float32 for multi-label, (B, H, W[, D]) int64 for segmentation.
    position: (B,) int64, the sample's position in its split.
    """

    image: Tensor
    target: Tensor
    position: Tensor


def inverse_frequencies(class_counts: Sequence[int]) -> tuple[float, ...]:
    """Weights of classes with mean 1; classes without a sample count as one.

    >>> inverse_frequencies([30, 10])
    (0.5, 1.5)
    """
    inverse = [1.0 / max(count, 1) for count in class_counts]
    mean = sum(inverse) / len(inverse)
    return tuple(each / mean for each in inverse)


@dataclass(frozen=True, kw_only=True)
class DataSpec:
    """All that models, losses, metrics and the card need to know of a dataset.

    `num_classes` is the number of logits K: 1 for `labels="binary"` (sigmoid, foreground
    against background; `class_names` then has two entries), otherwise one for each class
    name (softmax for "multiclass", sigmoids for "multilabel").
    """

    name: str
    task: Task
    labels: Labels
    in_channels: int
    num_classes: int
    image_size: tuple[int, ...]
    """(H, W) or (H, W, D)"""
    class_names: tuple[str, ...]
    class_counts: tuple[int, ...]
    """training images (classification) or training pixels (segmentation) of each class name"""
    num_samples: Mapping[str, int]
    """images in each split"""
    num_groups: Mapping[str, int]
    """patients (or lesions, or images where no ids exist) in each split"""
    group_kind: str
    """what is resampled and never straddles two splits: "patient", "lesion" or "image" """
    modality: str
    """"ct", "mr", "ultrasound", "fundus", "microscopy", "shape" ...; decides the augmentation"""
    provenance: str
    """"real", or what is simulated, in words that stand wherever results are reported"""
    origin: str
    """where the data come from, and their licence"""
    preprocessing: str
    """what was done between the file and the tensor, in words"""
    spacing_mm: tuple[float, ...] | None = None
    num_skipped: int = 0
    """bad files left out under on_bad_file=skip"""

    @property
    def num_spatial_dims(self) -> int:
        """2 for images, 3 for volumes."""
        return len(self.image_size)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """(C, H, W[, D]) of one sample."""
        return (self.in_channels, *self.image_size)


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One number of a run, with how it came to be.

    `value` is None exactly where `source` is "unavailable"; `note` then gives the reason.
    """

    name: str
    """flat, stable key such as `latency/onnxruntime/p50_ms`; units end it where it has any"""
    value: float | None
    unit: str
    n: int | None = None
    """observations behind the value"""
    spread: tuple[float, float] | None = None
    """an interval (95 % unless the note says otherwise)"""
    source: Source = "measured"
    higher_is_better: bool | None = None
    note: str = ""

    def __post_init__(self) -> None:
        is_missing = self.value is None
        if is_missing != (self.source == "unavailable"):
            message = f"{self.name}: value {self.value} does not go with source {self.source!r}"
            raise ValueError(message)

    @classmethod
    def unavailable(cls, name: str, unit: str, reason: str) -> Measurement:
        """A number that could not be had: recorded as absent, never as 0."""
        return cls(name=name, value=None, unit=unit, source="unavailable", note=reason)


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """An exported model: what a target must carry, and what is known about it."""

    path: Path
    """the file to load; `files` lists all that must stand beside it"""
    files: tuple[Path, ...]
    format: str
    """"onnx", "openvino", "executorch" or "torch" """
    input_shape: tuple[int, ...]
    """(C, H, W[, D]); the batch axis is dynamic, but for "executorch", which takes one image"""
    output_shape: tuple[int, ...]
    """(K,) or (K, H, W[, D])"""
    precision: str
    """"fp32"; "int8"; "w4", "w3" or "w2" (weights alone, in so many bits); "fp16" or "bf16" """
    num_bytes: int
    sha256: str
    imports: tuple[str, ...] = ()
    """Python modules to import before loading (they register custom operators)"""

    def to_json(self) -> dict[str, Any]:
        """Plain values, paths as strings."""
        plain = asdict(self)
        return plain | {"path": str(self.path), "files": [str(file) for file in self.files]}

    def moved(self, move: Callable[[Path], Path]) -> Artifact:
        """The same with other paths."""
        return replace(self, path=move(self.path), files=tuple(move(file) for file in self.files))

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> Artifact:
        """The inverse of `to_json`."""
        tuples = {k: tuple(plain[k]) for k in ("input_shape", "output_shape", "imports")}
        files = tuple(Path(file) for file in plain["files"])
        return cls(**{**plain, **tuples, "path": Path(plain["path"]), "files": files})


@dataclass(kw_only=True)
class Hardware:
    """How to run on a device, and the budgets that the device sets (None: no budget)."""

    name: str = "host"
    device: str = "cpu"
    """"cpu" or "cuda" """
    num_threads: int | None = None
    """None: every core that this process may use"""
    cpu_affinity: list[int] | None = None
    memory_limit_mib: float | None = None
    """enforced on the measuring process"""
    is_this_machine: bool = True
    """False: figures are labelled as measured on this host, not on the target"""
    description: str = ""
    max_latency_p90_ms: float | None = None
    max_peak_memory_mib: float | None = None
    max_size_mib: float | None = None
    max_energy_mj: float | None = None


@dataclass(kw_only=True)
class BenchmarkSettings:
    """How latency, throughput and memory are measured (protocol: single stream, batch 1)."""

    num_warmup: int = 20
    """least number of warm-up queries; more are added until the latency is level"""
    num_queries: int = 200
    """timed queries of each candidate"""
    num_rounds: int = 10
    """blocks in which the candidates are interleaved (A B A B ...)"""
    batch_size: int = 1
    throughput_batch_size: int = 16
    throughput_seconds: float = 2.0
    energy_seconds: float = 10.0
    each_step: bool = True
    """time what each of several compression steps leaves beside what came into it"""
    timeout_seconds: float = 600.0


@dataclass(kw_only=True)
class TrainSettings:
    """One fit: optimiser, schedule, budget."""

    epochs: int = 20
    budget_minutes: float | None = None
    """cut the number of steps to what fits, from a timing of a few steps; None: all epochs"""
    batch_size: int = 32
    learning_rate: float = 1e-3
    weight_decay: float = 1e-2
    warmup_ratio: float = 0.05
    """share of all steps with rising learning rate; cosine to zero after it"""
    loss: str = "auto"
    """auto | cross_entropy | focal | dice_ce | dice_focal"""
    class_weights: str = "none"
    """none | balanced (inverse frequency, mean 1)"""
    augment: bool = True
    gradient_clip: float = 1.0
    ema_decay: float | None = None
    early_stopping_patience: int | None = None
    precision: str = "auto"
    """auto (bf16 on CUDA that has it, otherwise 32) | 32 | bf16 | 16"""
    accelerator: str = "auto"
    """auto | cpu | cuda"""
    num_workers: int = 0
    deterministic: bool = True


class InferenceSession(Protocol):
    """A loaded model: (B, C, H, W[, D]) float32 in, logits (B, K[, H, W, D]) float32 out."""

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Run one batch, blocking until the result is there."""
        ...


class Runtime(Protocol):
    """One inference engine. Implementations are frozen dataclasses of plain options."""

    @property
    def name(self) -> str:
        """As its yaml is called."""
        ...

    @property
    def format(self) -> str:
        """The artifact format that it loads."""
        ...

    def refuses(self, hardware: Hardware) -> str:
        """Why nothing can be run on `hardware` here, in words; "" where it can."""
        ...

    def load(self, artifact: Artifact, hardware: Hardware) -> InferenceSession:
        """Open the artifact for `hardware`; heavy imports happen here."""
        ...

    def describe(self, hardware: Hardware) -> dict[str, str]:
        """Engine, version and backend configuration, for the card."""
        ...

    def count_operators(self, artifact: Artifact, hardware: Hardware) -> dict[str, int]:
        """Operators of the graph as the runtime optimised it, e.g. {"QLinearConv": 5, "Scan": 1}.

        Keys of operators that compute in 8-bit integers start with "int8:".
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """What one model said about one split, aligned by sample.

    logits: (N, K) or (N, K, H, W[, D]) float32. targets: as `Batch.target`.
    groups: the patient (lesion, image) of each sample, the unit of resampling.
    """

    logits: np.ndarray
    targets: np.ndarray
    groups: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class FitHooks:
    """How a compression step changes a fit; every part is optional."""

    loss: Callable[[Tensor, Batch, Callable[[Tensor], Tensor]], Tensor] | None = None
    """(logits, batch, task_loss) -> the loss to minimise; task_loss(logits) is the run's own"""
    auxiliary: nn.Module | None = None
    """trained beside the net (e.g. feature adapters), left out of the result"""
    set_mode: Callable[[nn.Module, bool], None] | None = None
    """(net, is_training) -> None, in place of net.train(is_training)"""
    on_epoch_start: Callable[[nn.Module, float], None] | None = None
    """(net, share of the epochs that are done, in [0, 1)), before each training epoch"""


class Fit(Protocol):
    """Train `net` in place by the run's own task, loss and data; resumes after a kill."""

    def __call__(
        self,
        net: nn.Module,
        *,
        name: str,
        epochs: int,
        learning_rate: float,
        hooks: FitHooks = ...,
    ) -> nn.Module:
        """Return the trained net, in evaluation mode."""
        ...


class LatencyMeter(Protocol):
    """Exports a net, and times it in a fresh process on one runtime."""

    @property
    def where(self) -> str:
        """The runtime and the hardware, in words."""
        ...

    def __call__(self, net: nn.Module) -> float:
        """The median time of one image in milliseconds; the same again for equal shapes."""
        ...


@dataclass(kw_only=True)
class CompressionContext:
    """What a compression step may use; made by the pipeline."""

    spec: DataSpec
    fit: Fit
    calibration_images: Callable[[int], Tensor]
    """n training images without augmentation, (n, C, H, W[, D])"""
    calibration_batches: Callable[[int], Sequence[Batch]]
    """n training batches without augmentation, with targets"""
    validation_batches: Callable[[int], Sequence[Batch]]
    """n validation batches, with targets: to choose by, never to learn from"""
    build_teacher: Callable[[], nn.Module]
    """the trained teacher that the step names (evaluation mode, no gradients)"""
    report: Callable[[str, str], None]
    """(topic, text) for the card, e.g. ("kept in float", "stem, head, 6 selective scans")"""
    latency_ms: LatencyMeter | None = None
    """for a step whose `num_latencies` is above 0; None where nothing may be measured"""
    is_dry: bool = False
    """nothing is trained, on fresh weights: only the structure and the reports count"""


class CompressionStep(Protocol):
    """One way to make a trained net smaller or faster. Implementations are frozen dataclasses.

    `apply` gives the compressed net and the state (tensors and plain values only) from which
    `restore` rebuilds the same structure around a net that entered `apply` with any weights;
    the caller then loads the weights strictly.
    """

    def apply(
        self, net: nn.Module, context: CompressionContext
    ) -> tuple[nn.Module, dict[str, Any]]:
        """Compress `net`, fine-tuning through `context.fit` where the step needs it."""
        ...

    def restore(self, net: nn.Module, state: dict[str, Any], spec: DataSpec) -> nn.Module:
        """Give `net` the structure that `apply` made."""
        ...


@runtime_checkable
class TrainingStep(CompressionStep, Protocol):
    """A step that trains."""

    epochs: int
    learning_rate: float
