"""Batch normalisations as training leaves them."""

import torch
from torch.nn.modules.batchnorm import _BatchNorm


@torch.no_grad()
def with_statistics(net, seed=0):
    """Batch normalisations as training leaves them, far from the identity."""
    torch.manual_seed(seed)
    for norm in norms_of(net):
        if norm.running_mean is not None:
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 3)
        if norm.affine:
            norm.weight.uniform_(0.5, 2).mul_(torch.randn(norm.weight.shape).sign())
            norm.bias.normal_()
    return net.eval()


def norms_of(net):
    return [module for module in net.modules() if isinstance(module, _BatchNorm)]
