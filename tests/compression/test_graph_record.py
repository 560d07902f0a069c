import io
import operator

import pytest
import torch
from torch import nn
from torch.fx import Graph, GraphModule, symbolic_trace
from toy_world import make_batch, make_context

from medlite.compression.graph_record import rebuild_graph, record_graph
from medlite.compression.quantization import PostTrainingQuantization
from medlite.errors import ExportError

aten = torch.ops.aten


def safely_loaded(content):
    file = io.BytesIO()
    torch.save(content, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def graph_of(build):
    graph = Graph()
    graph.output(build(graph, graph.placeholder("image")))
    return GraphModule(nn.Module(), graph)


def test_a_rebuilt_graph_is_the_same_to_the_last_bit(trained_unet, spec):
    quantised, _ = PostTrainingQuantization(calibration_samples=8).apply(
        trained_unet, make_context(spec)
    )
    record, weights = safely_loaded((record_graph(quantised), quantised.state_dict()))
    rebuilt = rebuild_graph(record)
    rebuilt.load_state_dict(weights, strict=True)
    image = make_batch(spec, 5, seed=3).image
    assert (rebuilt(image) - quantised(image)).abs().max().item() == 0.0


def test_every_kind_of_argument_comes_back():
    def build(graph, image):
        parts = graph.call_function(aten.split_with_sizes.default, (image, [1, 2], 1))
        second = graph.call_function(operator.getitem, (parts, 1))
        cast = graph.call_function(
            aten._to_copy.default,
            (second,),
            {"dtype": torch.float64, "device": torch.device("cpu"), "layout": torch.strided},
        )
        cloned = graph.call_function(
            aten.clone.default, (cast,), {"memory_format": torch.contiguous_format}
        )
        return graph.call_function(aten.clamp.default, (cloned, None, 0.25))

    graph = graph_of(build)
    image = torch.rand(2, 3, 4)
    rebuilt = rebuild_graph(safely_loaded(record_graph(graph)))
    assert torch.equal(rebuilt(image), graph(image))
    assert rebuilt(image).dtype == torch.float64


@pytest.mark.parametrize(
    ("graph", "message"),
    [
        (symbolic_trace(nn.Sequential(nn.ReLU())), "the module '0' in it"),
        (graph_of(lambda graph, image: graph.call_function(len, (image,))), "<built-in function"),
        (
            graph_of(lambda graph, image: graph.call_function(aten.mul.Tensor, (image, 1j))),
            "the value 1j in it",
        ),
    ],
)
def test_what_is_no_operator_and_no_plain_value_is_refused(graph, message):
    with pytest.raises(ExportError, match=rf"cannot be recorded with.*{message}"):
        record_graph(graph)


def test_a_graph_inside_a_graph_is_refused():
    graph = Graph()
    graph.output(graph.get_attr("inner"))
    root = nn.Module()
    root.inner = symbolic_trace(nn.ReLU())
    with pytest.raises(ExportError, match=r"with the graph 'inner' inside it"):
        record_graph(GraphModule(root, graph))


def test_a_record_can_call_operators_only():
    record = record_graph(
        graph_of(lambda graph, image: graph.call_function(aten.neg.default, (image,)))
    )
    record["nodes"][1]["target"] = "os.system"
    with pytest.raises(KeyError, match="os"):
        rebuild_graph(record)
