"""Half precision: weights and layers in 16-bit floating point, inputs and logits in 32."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from medlite.compression.checks import check_options
from medlite.compression.copies import evaluation_copy
from medlite.compression.half_graph import cast_to_half
from medlite.compression.norm_folding import find_folds, fold_norms, fold_structure
from medlite.compression.order import Stage
from medlite.compression.quantizer import WEIGHTED
from medlite.errors import MedliteError
from medlite.export.trace import deployable, trace
from medlite.types import CompressionContext, DataSpec

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}

NUM_CHECKED_IMAGES = 16
"""training images on which the result is compared with the net that was given"""


@dataclass(frozen=True, kw_only=True)
class HalfPrecision:
    """Convolutions, linear layers and matrix products in half precision; no weight is trained.

    Micikevicius et al., "Mixed Precision Training", arXiv:1710.03740, section 3.3, for which
    operators stay in float32: normalisations, softmax, sums, exponentials, and selective scans,
    which add up over thousands of tokens. Unlike there this is for inference, and batch
    normalisation is first folded into the layers before it, where it can be.

    Args:
        dtype: "float16" (11 significant bits, up to 65504) or "bfloat16" (8 bits, the range of
            float32, but ONNX Runtime's CPU kernels lack it).
    """

    stage: ClassVar[Stage] = "numeric"

    dtype: str = "float16"

    def __post_init__(self) -> None:
        known = ", ".join(DTYPES)
        check_options([("dtype", self.dtype, self.dtype in DTYPES, f"one of {known}")])

    @property
    def refused_formats(self) -> dict[str, str]:
        """Formats of artifacts that cannot hold it, and what to do about that."""
        if self.dtype == "float16":
            return {}
        remedy = "ONNX Runtime's CPU kernels lack bfloat16; take dtype=float16 or runtime=openvino"
        return {"onnx": remedy}

    def apply(
        self, net: nn.Module, context: CompressionContext
    ) -> tuple[nn.Module, dict[str, Any]]:
        """Return the graph with half-precision layers; `net` stays as it is.

        Raises:
            MedliteError: numbers of this net are too large for `dtype`.
        """
        deployed = deployable(evaluation_copy(net))
        folds, _ = find_folds(deployed, context.spec.input_shape)
        fold_norms(deployed, folds)
        graph = self._cast(deployed, context.spec)
        context.report("half precision", self._describe(graph, deployed))
        if not context.is_dry:
            images = context.calibration_images(NUM_CHECKED_IMAGES)
            context.report("beside float32", self._compare(graph, deployed, images))
        return graph, {"folds": dict(folds)}

    def restore(self, net: nn.Module, state: dict[str, Any], spec: DataSpec) -> nn.Module:
        """Rebuild the graph around `net`; its weights are still to be loaded."""
        deployed = deployable(evaluation_copy(net))
        fold_structure(deployed, state["folds"])
        return self._cast(deployed, spec)

    def _cast(self, deployed: nn.Module, spec: DataSpec) -> GraphModule:
        graph = trace(deployed, spec.input_shape).module(check_guards=False)
        assert isinstance(graph, GraphModule)
        return cast_to_half(graph, spec.input_shape, DTYPES[self.dtype])

    def _describe(self, graph: GraphModule, deployed: nn.Module) -> str:
        num_layers = sum(node.target in WEIGHTED for node in graph.graph.nodes)
        where = "" if self.dtype == "float16" else ", and not at all on ONNX Runtime's CPU"
        return (
            f"{self.dtype} in {num_layers} weighted layers and in what lies between them; "
            "normalisations, softmax, sums, exponentials and scans in float32, as inputs and "
            f"logits; weights {_size_kib(deployed):,.0f} KiB -> {_size_kib(graph):,.0f} KiB "
            "(ExecuTorch keeps float32 copies in its files). CPUs rarely compute in it, and "
            f"convert instead: seldom faster there{where}"
        )

    @torch.no_grad()
    def _compare(self, graph: GraphModule, deployed: nn.Module, images: Tensor) -> str:
        expected, logits = deployed(images), graph(images)
        if not torch.isfinite(logits).all():
            remedy = "take compression.half.dtype=bfloat16, whose range is that of float32"
            if self.dtype == "bfloat16":
                remedy = "look at what the net itself gives for training images"
            message = (
                f"half: {self.dtype} gives logits that are not finite on {len(images)} training "
                f"images; {remedy}"
            )
            raise MedliteError(message)
        difference = (logits - expected).abs().max() / expected.abs().max()
        return f"logits differ by at most {difference:.2g} of the largest ({len(images)} images)"


def _size_kib(net: nn.Module) -> float:
    tensors = net.state_dict().values()
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 1024
