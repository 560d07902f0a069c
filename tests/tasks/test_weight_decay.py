"""What weight decay leaves alone: norms, biases and state matrices, in modules and in graphs."""

import torch
from torch import nn

from medlite.compression.batch_norm import replace_batch_norms
from medlite.models.layers.mamba import MambaBlock
from medlite.models.layers.mamba2d import Mamba2D
from medlite.models.layers.ss2d import SS2D
from medlite.tasks.supervised import _parameter_groups


def decayed_of(net):
    decayed, free = _parameter_groups(net, 0.1)
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.1, 0.0)
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    assert len(names) == len(decayed["params"]) + len(free["params"])
    return {names[id(parameter)] for parameter in decayed["params"]}


def test_state_matrices_are_not_decayed():
    blocks = nn.ModuleDict({"mamba": MambaBlock(8), "ss2d": SS2D(8), "wave": Mamba2D(8)})
    names = {name for name, _ in blocks.named_parameters()}
    assert {"mamba.A_log", "ss2d.A_logs", "ss2d.dt_projs_bias", "wave.A_logs"} <= names
    assert all("weight" in name for name in decayed_of(blocks))
    assert {"ss2d.x_proj_weight", "ss2d.dt_projs_weight"} <= decayed_of(blocks)


def test_norms_of_a_graph_are_not_decayed():
    net = nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.ReLU(), nn.BatchNorm2d(4)).eval()
    graph = torch.export.export(net, (torch.zeros(2, 4, 3, 3),)).module(check_guards=False)
    replace_batch_norms(graph)
    written_out = {name for name, _ in graph.named_parameters() if name.startswith("batch_norm")}
    assert len(written_out) == 4
    assert decayed_of(graph) == {"1.weight"}
