"""Gradients go through the roundings of a quantised graph."""

import numpy as np
import torch
from toy_world import TinyUNet, make_batch, make_context, make_spec, train

from medlite.compression.quantization import PostTrainingQuantization
from medlite.safety.agreement import map_correlation
from medlite.safety.saliency import grad_cam, integrated_gradients, score_weights, scored
from medlite.safety.saliency_graph import as_graph, redrawn


def test_a_quantised_net_is_explained_as_its_float_self_is():
    spec = make_spec()
    net = train(TinyUNet(), spec, epochs=3).eval()
    quantised, _ = PostTrainingQuantization(calibration_samples=16).apply(net, make_context(spec))
    batch = make_batch(spec, 1, seed=3)
    with torch.no_grad():
        weights = score_weights(net(batch.image)[0], batch.target[0].numpy(), spec)
    float_graph, graph = (as_graph(each, spec.input_shape) for each in (net, quantised))
    with torch.no_grad():
        torch.testing.assert_close(graph(batch.image), quantised(batch.image), atol=1e-4, rtol=0)
    found = [integrated_gradients(scored(g, weights), batch.image) for g in (float_graph, graph)]
    assert found[1].max() > 0
    assert map_correlation(*found) > 0.9
    found = [grad_cam(g, weights, batch.image) for g in (float_graph, graph)]
    assert found[0].shape == spec.image_size
    assert map_correlation(*found) > 0.8
    assert np.isfinite(found[1]).all()


def test_the_integers_of_a_quantised_net_are_redrawn_too():
    spec = make_spec()
    step = PostTrainingQuantization(calibration_samples=16)
    quantised, _ = step.apply(train(TinyUNet(), spec), make_context(spec))
    graph = as_graph(quantised, spec.input_shape)
    drawn = dict(redrawn(graph, seed=0).named_buffers())
    integers = {name: each for name, each in graph.named_buffers() if each.dtype == torch.int8}
    assert len(integers) == 3
    for name, before in integers.items():
        assert not torch.equal(before, drawn[name])
        assert torch.equal(before.flatten().sort().values, drawn[name].flatten().sort().values)
