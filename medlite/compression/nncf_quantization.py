"""INT8 after training by Intel's NNCF: its statistics, its bias correction, its SmoothQuant."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e.quantizer import Quantizer

from medlite.compression.checks import check_options
from medlite.compression.graph_record import rebuild_graph, record_graph
from medlite.compression.order import Stage
from medlite.compression.quantized_graph import exported, finished, kept_in_words, prepare
from medlite.compression.quantizer import WEIGHTED, Int8Quantizer, layer_name
from medlite.optional import require
from medlite.types import CompressionContext, DataSpec

BIAS_CORRECTIONS = {"none": None, "fast": True, "full": False}
"""what NNCF calls each of them"""


@dataclass(frozen=True, kw_only=True)
class NncfQuantization:
    """Post-training quantisation by NNCF (https://github.com/openvinotoolkit/nncf).

    Its `quantize_pt2e` for exported graphs rounds where medlite's own quantiser says, so that
    both ONNX Runtime and OpenVINO find the integers; NNCF's own placement suits OpenVINO alone.
    What NNCF adds to `PostTrainingQuantization`: ranges that are the means of each image's
    extremes, and two algorithms. Bias correction shifts each bias by the mean error that rounding
    makes in its layer (Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias
    Correction", arXiv:1906.04721, section 4.2, here from images). SmoothQuant (Xiao et al.,
    arXiv:2211.10438) moves outliers of activations into the weights of linear layers; the factor
    that is left before a layer is a multiplication in float. Its `quantize_pt2e` is experimental.

    Its weights have 7 bits in the first convolutions alone and 8 in the others, whose sums x86
    processors without VNNI cut off; `PostTrainingQuantization` has 7 everywhere.

    Args:
        calibration_samples: training images that set ranges and corrections.
        bias_correction: "none"; "fast" corrects each layer on its own and from the means of its
            input channels, which can do harm where images differ between border and middle (on a
            toy U-Net it made the largest error eight times larger); "full" runs the images through
            the rounded layers and lets each see the corrections before it, which takes longer.
        smooth_quant: smooth the inputs of linear layers; for transformers.
        keep_first_float: leave layers that see the image itself in float.
        keep_last_float: leave layers that give the logits in float.
        keep_float: names of further layers or blocks to leave in float.
    """

    stage: ClassVar[Stage] = "numeric"

    calibration_samples: int = 256
    bias_correction: str = "full"
    smooth_quant: bool = False
    keep_first_float: bool = True
    keep_last_float: bool = True
    keep_float: Sequence[str] = ()

    def __post_init__(self) -> None:
        samples, correction = self.calibration_samples, self.bias_correction
        is_known = correction in BIAS_CORRECTIONS
        check_options(
            [
                ("calibration_samples", samples, samples >= 1, "a whole number from 1 up"),
                ("bias_correction", correction, is_known, f"one of {', '.join(BIAS_CORRECTIONS)}"),
            ]
        )

    def apply(
        self, net: nn.Module, context: CompressionContext
    ) -> tuple[nn.Module, dict[str, Any]]:
        """Return the INT8 graph and a record of it; `net` stays as it is.

        Raises:
            MissingDependency: NNCF is not installed.
        """
        nncf = require("nncf", extra="nncf", needed_by="compression=nncf_ptq")
        quantizer = self._quantizer()
        shape = context.spec.input_shape
        if context.is_dry:
            prepared = prepare(net, shape, quantizer)
            self._report(prepared, quantizer, context, self.calibration_samples)
            return prepared, {}
        graph = exported(net, shape, is_trained_further=False)
        images = context.calibration_images(self.calibration_samples)
        quantized = finished(self._quantized(nncf, graph, quantizer, images), shape)
        self._report(quantized, quantizer, context, len(images))
        state = {"graph": record_graph(quantized)}
        result = rebuild_graph(state["graph"])
        result.load_state_dict(quantized.state_dict())
        return result, state

    def restore(self, net: nn.Module, state: dict[str, Any], spec: DataSpec) -> nn.Module:
        """The recorded graph; its weights are still to be loaded, and NNCF is not needed."""
        return rebuild_graph(state["graph"])

    def _quantizer(self) -> Int8Quantizer:
        return Int8Quantizer(
            keep_first_float=self.keep_first_float,
            keep_last_float=self.keep_last_float,
            keep_float=self.keep_float,
            weight_bits=8,  # NNCF takes no other range
        )

    def _quantized(
        self, nncf: ModuleType, graph: GraphModule, quantizer: Int8Quantizer, images: Tensor
    ) -> GraphModule:
        nncf.set_log_level(logging.ERROR)
        fx = require("nncf.experimental.torch.fx", extra="nncf", needed_by="compression=nncf_ptq")
        quantized = fx.quantize_pt2e(
            graph,
            _WithPaths(quantizer),
            nncf.Dataset(list(images.split(1))),
            subset_size=len(images),
            fast_bias_correction=BIAS_CORRECTIONS[self.bias_correction],
            smooth_quant=self.smooth_quant,
        )
        _write_out_factors(quantized)
        return quantized

    def _report(
        self,
        graph: GraphModule,
        quantizer: Int8Quantizer,
        context: CompressionContext,
        num_images: int,
    ) -> None:
        num_layers = len(quantizer.quantized_layers) + len(quantizer.float_layers)
        smoothing = ", SmoothQuant" if self.smooth_quant else ""
        context.report(
            "quantisation",
            f"INT8 in {len(quantizer.quantized_layers)} of {num_layers} weighted layers by NNCF: "
            "uint8 activations with one scale a tensor, int8 weights with one scale a channel, "
            "of 7 bits in the first convolutions, else of 8 (x86 processors without VNNI cut off "
            "their sums); "
            f"{num_images} training images, bias correction: {self.bias_correction}{smoothing}",
        )
        context.report("kept in float", kept_in_words(quantizer.float_layers, graph))


class _WithPaths(Quantizer):
    """Lets a quantiser know layers by their paths after SmoothQuant has replaced their weights.

    NNCF keeps the new weights under names of its own, which no name in `keep_float` matches. It
    calls `transform_for_annotation` before it changes anything, and `annotate` after it.
    """

    def __init__(self, quantizer: Int8Quantizer) -> None:
        self._quantizer = quantizer
        self._paths: dict[str, str] = {}

    def transform_for_annotation(self, model: GraphModule) -> GraphModule:
        """Remember the path of each layer by the name of its node."""
        self._paths = {n.name: layer_name(n) for n in model.graph.nodes if n.target in WEIGHTED}
        return model

    def annotate(self, model: GraphModule) -> GraphModule:
        """Move replaced weights to the paths of their layers, then mark what is rounded."""
        for node in model.graph.nodes:
            path = self._paths.get(node.name)
            if path is not None and layer_name(node) != path:
                _move_weight(model, node, path)
        return self._quantizer.annotate(model)

    def validate(self, model: GraphModule) -> None:
        """As the quantiser does."""
        self._quantizer.validate(model)


def _move_weight(model: GraphModule, layer: Node, path: str) -> None:
    weight = layer.args[1]
    assert isinstance(weight, Node)
    name = f"{layer.name}_weight"
    model.get_submodule(path).register_buffer(name, getattr(model, str(weight.target)))
    weight.target = f"{path}.{name}"


def _write_out_factors(graph: GraphModule) -> None:
    """Write SmoothQuant's modules, one factor a channel each, as multiplications."""
    for node in list(graph.graph.nodes):
        if node.op == "call_module":
            buffers = dict(graph.get_submodule(str(node.target)).named_buffers())
            ((_, factor),) = buffers.items()
            name = f"{node.name}_factor"
            graph.register_buffer(name, factor)
            with graph.graph.inserting_before(node):
                product = graph.graph.call_function(
                    torch.ops.aten.mul.Tensor, (node.args[0], graph.graph.get_attr(name))
                )
            node.replace_all_uses_with(product)
            graph.graph.erase_node(node)
    graph.recompile()
