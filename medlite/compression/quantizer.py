"""Which tensors of an exported graph become integers.

ONNX Runtime and OpenVINO run a convolution in integers where its input, its weight and its
output (after a ReLU, which is then absorbed) are all rounded. Everything here serves that:
uint8 activations with one scale a tensor, int8 weights with one scale a channel,
and rounding on both sides of activations that are no simple clipping (SiLU, Hardswish, PReLU).
Weights of fewer than 7 bits have no integer kernels there: they are rounded alone, for the size of
the file, and every operator that multiplies by a weight may have them.

x86 processors without VNNI add two products of an activation and a weight in 16 bits, which cannot
hold two products of 255 and 127: sums are cut off without a word. With weights of 7 bits (at most
63 in size) no sum of two can be cut off, and every processor computes the same.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, cast

import torch
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e.quantizer import (
    QuantizationAnnotation,
    QuantizationSpec,
    Quantizer,
    SharedQuantizationSpec,
)

from medlite.compression.fake_quantize import PerTensorFakeQuantize
from medlite.compression.graph_search import meets
from medlite.compression.layer_names import check_names, matches
from medlite.compression.weight_rounding import PerChannelFakeQuantize
from medlite.errors import MedliteError

aten = torch.ops.aten

QUANTIZABLE = {
    aten.conv2d.default,
    aten.conv2d.padding,
    aten.conv3d.default,
    aten.conv3d.padding,
    aten.linear.default,
}
"""weighted operators with integer kernels in both runtimes"""

TRANSPOSED = {
    aten.conv_transpose1d.default,
    aten.conv_transpose2d.input,
    aten.conv_transpose3d.input,
}
"""operators whose weight has its output channels on axis 1"""

WEIGHTED = QUANTIZABLE | TRANSPOSED | {aten.conv1d.default, aten.conv1d.padding}
"""all operators that multiply by a weight"""

CLIPPING = {
    aten.relu.default,
    aten.relu_.default,
    aten.relu6.default,
    aten.hardtanh.default,
    aten.hardtanh_.default,
    aten.clamp.default,
    aten.clamp_.default,
    aten.clamp_min.default,
}
"""activations that rounding absorbs, when their lower bound is zero"""

PASSING = {
    aten.max_pool2d.default,
    aten.max_pool3d.default,
    aten.flatten.using_ints,
    aten.view.default,
    aten.reshape.default,
    aten.permute.default,
    aten.transpose.int,
    aten.upsample_nearest2d.vec,
    aten.upsample_nearest3d.vec,
}
"""operators whose output keeps the codes of their input"""

DROPOUTS = {aten.dropout.default, aten.dropout_.default}

ADDITIONS = {aten.add.Tensor, aten.add_.Tensor}

CONCATENATIONS = {aten.cat.default, aten.concat.default}

SENSITIVE = ("x_proj", "dt_proj")
"""projections inside Mamba that set the step sizes of its scan: always in float"""

ANNOTATION = "quantization_annotation"
"""the key of a node's `meta` under which torchao looks for annotations"""

INTEGER_ARITHMETIC_BITS = (8, 7)
"""widths of weights that go through 8-bit kernels, with activations in 8 bits"""

ACTIVATION = QuantizationSpec(
    dtype=torch.uint8,
    quant_min=0,
    quant_max=255,
    qscheme=torch.per_tensor_affine,
    observer_or_fake_quant_ctr=PerTensorFakeQuantize,
)


class Int8Quantizer(Quantizer):
    """Annotates a graph for 8-bit convolutions, linear layers, residual sums and concatenations.

    Selective scans, normalisations, attention products and transposed convolutions stay in
    float. With fewer bits, the weights of all layers are rounded (transposed ones too) and
    nothing else. After `annotate`, `float_layers` and `quantized_layers` name the weighted layers.

    Args:
        keep_first_float: layers that see the image itself, in float.
        keep_last_float: layers behind which there is no other weighted layer, in float.
        keep_float: names of layers or of blocks of layers, in float. A name matches wherever it
            is a run of whole components of a layer's path: "fc" is in "head.fc" and "fc.0".
        keep_layers: whole paths of single layers, in float.
        weight_bits: 8; 7, for processors without VNNI; or fewer for weights alone, of which 2 are
            ternary (-1, 0, 1).
        per_channel: whether each output channel of a weight has a scale of its own.
    """

    def __init__(
        self,
        *,
        keep_first_float: bool,
        keep_last_float: bool,
        keep_float: Sequence[str],
        keep_layers: Collection[str] = (),
        weight_bits: int = 7,
        per_channel: bool = True,
    ) -> None:
        self.keep_first_float = keep_first_float
        self.keep_last_float = keep_last_float
        self.keep_float = tuple(keep_float)
        self.keep_layers = frozenset(keep_layers)
        self.weight_bits = weight_bits
        self.per_channel = per_channel
        self.float_layers: tuple[str, ...] = ()
        self.quantized_layers: tuple[str, ...] = ()

    def annotate(self, model: GraphModule) -> GraphModule:
        """Mark what is rounded.

        Raises:
            MedliteError: a name of `keep_float` matches no layer, or no layer is left.
        """
        layers = [node for node in model.graph.nodes if node.target in WEIGHTED]
        check_names("keep_float", self.keep_float, _names(layers))
        chosen = [node for node in layers if self._is_quantized(node, layers)]
        if not chosen:
            message = (
                f"nothing could be quantised: of {len(layers)} weighted layers none is "
                f"{self._what_is_quantized()} that may leave float; see keep_first_float, "
                "keep_last_float and keep_float"
            )
            raise MedliteError(message)
        self.quantized_layers = _names(chosen)
        self.float_layers = _names([node for node in layers if node not in chosen])
        for node in chosen:
            weight = self._weight_spec(node)
            if self.is_weight_only:
                _annotate(node, inputs={node.args[1]: weight})
            else:
                _annotate_layer(node, weight)
        if not self.is_weight_only:
            for node in model.graph.nodes:
                _annotate_neighbour(node)
        return model

    def validate(self, model: GraphModule) -> None:
        """Nothing is left to check: `annotate` only marks what the runtimes can hold."""

    @property
    def is_weight_only(self) -> bool:
        """Whether activations stay in float."""
        return self.weight_bits not in INTEGER_ARITHMETIC_BITS

    def _weight_spec(self, node: Node) -> QuantizationSpec:
        largest_code = 2 ** (self.weight_bits - 1) - 1
        return QuantizationSpec(
            dtype=torch.int8,
            quant_min=-largest_code,
            quant_max=largest_code,
            qscheme=torch.per_channel_symmetric,
            ch_axis=int(node.target in TRANSPOSED),
            observer_or_fake_quant_ctr=PerChannelFakeQuantize.with_args(
                shares_scale=not self.per_channel
            ),
        )

    def _is_quantized(self, node: Node, layers: Sequence[Node]) -> bool:
        weight: Any = node.args[1]
        allowed = WEIGHTED if self.is_weight_only else QUANTIZABLE
        if node.target not in allowed or weight.op != "get_attr":
            return False
        if self.keep_first_float and not meets(node, layers, "before"):
            return False
        if self.keep_last_float and not meets(node, layers, "behind"):
            return False
        path = layer_name(node)
        if path in self.keep_layers:
            return False
        return not any(matches(name, path) for name in (*SENSITIVE, *self.keep_float))

    def _what_is_quantized(self) -> str:
        if self.is_weight_only:
            return "a convolution or linear layer"
        return "a 2-D or 3-D convolution or linear layer"


def layer_name(node: Node) -> str:
    """The path of the module that owns a layer's weight, such as "encoder.0.conv"."""
    weight = node.args[1]
    if isinstance(weight, Node) and weight.op == "get_attr":
        return str(weight.target).rpartition(".")[0]
    modules = list(node.meta.get("nn_module_stack", {"": (node.name, None)}).values())
    return str(modules[-1][0])


def _names(nodes: Sequence[Node]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(layer_name(node) for node in nodes))


def _annotate_layer(node: Node, weight_spec: QuantizationSpec) -> None:
    source, weight = cast("tuple[Node, Node]", node.args[:2])
    inputs = {weight: weight_spec}
    if source.target in DROPOUTS:
        # Rounded before it is thinned out and scaled, or training would see another range.
        _annotate(source, inputs={source.args[0]: ACTIVATION})
    else:
        inputs[source] = ACTIVATION
    _annotate_sum(node, inputs)


def _annotate_neighbour(node: Node) -> None:
    """Extend rounding to operators that then run on integers, or that vanish."""
    if ANNOTATION in node.meta:
        return
    if node.target in PASSING and _is_rounded(node.args[0]):
        source = node.args[0]
        shared = SharedQuantizationSpec((source, node))
        _annotate(node, inputs={source: ACTIVATION}, output=shared)
    elif node.target in ADDITIONS and _is_residual(node):
        _annotate_sum(node, dict.fromkeys(node.args[:2], ACTIVATION))
    elif node.target in CONCATENATIONS and _is_read_rounded(node):
        terms = cast("list[Node]", node.args[0])
        _annotate(node, inputs=dict.fromkeys(terms, ACTIVATION), output=ACTIVATION)


def _annotate_sum(node: Node, inputs: dict[Any, Any]) -> None:
    """Round the inputs, and the output behind the clipping that may follow."""
    clipping = _clipping_after(node)
    _annotate(node, inputs=inputs, output=None if clipping else ACTIVATION)
    if clipping:
        _annotate(clipping, inputs={}, output=ACTIVATION)


def _annotate(node: Node, *, inputs: dict[Any, Any], output: Any = None) -> None:
    node.meta[ANNOTATION] = QuantizationAnnotation(
        input_qspec_map=inputs, output_qspec=output, _annotated=True
    )


def _clipping_after(node: Node) -> Node | None:
    """The clipping at zero that alone reads `node`, if there is one."""
    users = list(node.users)
    while len(users) == 1 and users[0].target in DROPOUTS:
        users = list(users[0].users)
    return users[0] if len(users) == 1 and _clips_at_zero(users[0]) else None


def _clips_at_zero(node: Node) -> bool:
    if node.target not in CLIPPING:
        return False
    has_bounds = len(node.args) > 1
    return bool(node.args[1] == 0) if has_bounds else "relu" in str(node.target)


def _is_rounded(node: object) -> bool:
    if not isinstance(node, Node):
        return False
    annotation = node.meta.get(ANNOTATION)
    return annotation is not None and annotation.output_qspec is not None


def _is_read_rounded(node: Node) -> bool:
    annotations = [user.meta.get(ANNOTATION) for user in node.users]
    return any(each is not None and node in each.input_qspec_map for each in annotations)


def _is_residual(node: Node) -> bool:
    """Whether `node` adds two images of one shape, one of them rounded already.

    Token streams (B, L, C) of transformers and Mambas are left alone: their residual sums need
    more than 8 bits.
    """
    terms = [term for term in node.args if isinstance(term, Node)]
    if node.kwargs or len(terms) != 2:
        return False
    shape, other_shape = (term.meta["val"].shape for term in terms)
    are_images = shape == other_shape and len(shape) > 3
    return are_images and any(_is_rounded(term) for term in terms)
