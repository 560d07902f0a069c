"""What an ExecuTorch program is made of, read from its file."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

OUTSIDE = "outside XNNPACK: "
"""how the names of operators begin that ExecuTorch's own kernels compute"""

_MOVES_DATA = {"Convert", "Copy", "StaticReshape", "StaticSlice", "StaticTranspose"} | {
    f"Concatenate{count}" for count in range(2, 6)
}
"""Nodes that carry 8-bit tensors, or make them, without computing in 8 bits."""

_INFINITE = re.compile(r"(?<=: )-?(inf|nan)\b")
"""numbers that JSON does not have"""


def operators(program: bytes) -> Iterator[str]:
    """The name of every operator of a program; "int8:" before those that compute in 8 bits."""
    from executorch.exir._serialize._program import deserialize_pte_binary

    contents = deserialize_pte_binary(program).program
    for plan in contents.execution_plan:
        for chain in plan.chains:
            for instruction in chain.instructions:
                index = getattr(instruction.instr_args, "op_index", None)
                if index is not None:
                    yield OUTSIDE + plan.operators[index].name.removeprefix("aten::")
        for delegate in plan.delegates:
            blob = contents.backend_delegate_data[delegate.processed.index].data
            yield from _nodes(_read_graph(blob))


def _read_graph(blob: bytes) -> dict[str, Any]:
    """The graph of XNNPACK: a header that says where the flat buffer lies, and that."""
    from executorch.backends.xnnpack import serialization
    from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import XNNHeader
    from executorch.exir._serialize._flatbuffer import _flatc_decompile

    header = XNNHeader.from_bytes(blob[: XNNHeader.EXPECTED_LENGTH])
    start = header.flatbuffer_offset
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "graph.bin"
        path.write_bytes(blob[start : start + header.flatbuffer_size])
        schema = Path(scratch) / "schema.fbs"
        schema.write_text(resources.files(serialization).joinpath("schema.fbs").read_text())
        _flatc_decompile(scratch, str(schema), str(path), ["--strict-json", "--raw-binary"])
        text = (Path(scratch) / "graph.json").read_text()
        return json.loads(_INFINITE.sub("null", text))


def _nodes(graph: dict[str, Any]) -> Iterator[str]:
    rounded = {
        value["xvalue_union"]["tensor_value"]["id_out"]
        for value in graph["xvalues"]
        if value["xvalue_union_type"] == "XNNQuantizedTensorValue"
    }
    for node in graph["xnodes"]:
        kind = node["xnode_union_type"].removeprefix("XNN")
        is_eight_bit = node["xnode_union"].get("output_id") in rounded and kind not in _MOVES_DATA
        yield f"int8:{kind}" if is_eight_bit else kind
