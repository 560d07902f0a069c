"""What operators do to channels: which indices of which weights go together."""

import pytest
import timm
import torch
import torch.nn.functional as F
import torch_pruning
from monai.networks.nets import BasicUNet
from torch import nn

from medlite.compression.channel_groups import find_groups
from medlite.compression.channel_removal import remove_units
from medlite.compression.channel_trace import label_channels
from medlite.models.layers.patches import PatchExpanding, PatchMerging

IMAGES = torch.zeros(2, 1, 8, 8)
LARGE_IMAGES = torch.zeros(2, 1, 32, 32)
LAYERS = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear, nn.BatchNorm2d)


class Net(nn.Module):
    """Layers by name, and any function of them and the images."""

    def __init__(self, function, **layers):
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, images):
        return self.function(self, images)


def units_of(net):
    """(place, indices) of all units that can go, in no order; biases are left out."""
    groups = find_groups(label_channels(net.eval(), IMAGES))
    return {
        frozenset(
            (member.name.removesuffix(".weight"), member.axis, *member.indices[unit].tolist())
            for member in group.members
            if not member.name.endswith("bias")
        )
        for group in groups
        for unit in range(group.num_units)
    }


def convolution(in_channels, out_channels, **options):
    return nn.Conv2d(in_channels, out_channels, 1, **options)


def test_a_layer_feeds_the_next_one():
    net = Net(lambda n, x: n.b(n.a(x).relu()), a=convolution(1, 3), b=convolution(3, 2))
    assert units_of(net) == {frozenset({("a", 0, i), ("b", 1, i)}) for i in range(3)}


def test_sums_tie_channels_at_the_same_place():
    net = Net(
        lambda n, x: n.c(n.a(x) + n.b(x)),
        a=convolution(1, 3), b=convolution(1, 3), c=convolution(3, 2),
    )  # fmt: skip
    assert units_of(net) == {frozenset({("a", 0, i), ("b", 0, i), ("c", 1, i)}) for i in range(3)}


def test_columns_of_a_table_that_is_looked_up_in_can_go_and_its_rows_cannot():
    net = Net(
        lambda n, x: n.b(F.embedding(x[:, 0, 0].long(), n.a.weight)),
        a=nn.Linear(3, 4, bias=False), b=nn.Linear(3, 2),
    )  # fmt: skip
    assert units_of(net) == {frozenset({("a", 1, i), ("b", 1, i)}) for i in range(3)}


def test_what_is_added_to_something_without_channels_stays():
    net = Net(
        lambda n, x: n.b(n.a(x) + x.repeat(1, 3, 1, 1)), a=convolution(1, 3), b=convolution(3, 2)
    )
    assert units_of(net) == set()


def test_concatenated_channels_keep_their_own_columns():
    net = Net(
        lambda n, x: n.c(torch.cat([n.a(x), n.b(x)], 1)),
        a=convolution(1, 2), b=convolution(1, 3), c=convolution(5, 2),
    )  # fmt: skip
    first = {frozenset({("a", 0, i), ("c", 1, i)}) for i in range(2)}
    assert units_of(net) == first | {frozenset({("b", 0, i), ("c", 1, 2 + i)}) for i in range(3)}


def test_equal_parts_lose_the_same_places():
    def multiply_halves(n, x):
        gate, values = n.a(x).chunk(2, 1)
        return n.b(gate.sigmoid() * values)

    net = Net(multiply_halves, a=convolution(1, 6), b=convolution(3, 2))
    assert units_of(net) == {frozenset({("a", 0, i, i + 3), ("b", 1, i)}) for i in range(3)}


def test_equal_parts_lose_the_same_places_wherever_they_go():
    def part(n, x):
        first, second = n.a(x).chunk(2, 1)
        return n.b(first) * n.c(second)

    net = Net(part, a=convolution(1, 6), b=convolution(3, 2), c=convolution(3, 2))
    assert units_of(net) == {
        frozenset({("a", 0, i, i + 3), ("b", 1, i), ("c", 1, i)}) for i in range(3)
    }


def test_unequal_parts_stay():
    net = Net(lambda n, x: n.b(n.a(x).chunk(2, 1)[0]), a=convolution(1, 5), b=convolution(3, 2))
    assert units_of(net) == set()


def test_stacked_halves_lose_the_same_places():
    def interleave(n, x):
        return n.c(torch.stack([n.a(x), n.b(x)], 2).flatten(1, 2))

    net = Net(interleave, a=convolution(1, 3), b=convolution(1, 3), c=convolution(6, 2))
    assert units_of(net) == {
        frozenset({("a", 0, i), ("b", 0, i), ("c", 1, 2 * i, 2 * i + 1)}) for i in range(3)
    }


def test_shuffled_channels_keep_their_columns():
    def shuffle(n, x):
        return n.b(n.a(x).unflatten(1, (2, 3)).transpose(1, 2).flatten(1, 2))

    net = Net(shuffle, a=convolution(1, 6), b=convolution(6, 2))
    assert units_of(net) == {
        frozenset({("a", 0, i, i + 3), ("b", 1, 2 * i, 2 * i + 1)}) for i in range(3)
    }


def test_flattened_images_have_a_column_for_each_pixel():
    net = Net(
        lambda n, x: n.b(n.a(x[..., :2, :2]).flatten(1)), a=convolution(1, 3), b=nn.Linear(12, 2)
    )
    assert units_of(net) == {
        frozenset({("a", 0, i), ("b", 1, *range(4 * i, 4 * i + 4))}) for i in range(3)
    }


def test_tokens_of_channels_last_pass():
    net = Net(
        lambda n, x: n.b(n.norm(n.a(x).permute(0, 2, 3, 1).flatten(1, 2)).amax(1)),
        a=convolution(1, 3), norm=nn.LayerNorm(3), b=nn.Linear(3, 2),
    )  # fmt: skip
    assert units_of(net) == {
        frozenset({("a", 0, i), ("norm", 0, i), ("b", 1, i)}) for i in range(3)
    }


def test_merged_patches_have_four_columns_for_each_channel():
    net = Net(
        lambda n, x: n.merge(n.a(x).permute(0, 2, 3, 1)), a=convolution(1, 3), merge=PatchMerging(3)
    )
    columns = [(i, i + 3, i + 6, i + 9) for i in range(3)]
    assert units_of(net) == {
        frozenset(
            {("a", 0, i), ("merge.norm", 0, *columns[i]), ("merge.reduction", 1, *columns[i])}
        )
        for i in range(3)
    }


def test_expanded_patches_have_a_row_for_each_new_token():
    net = Net(
        lambda n, x: n.b(n.expand(x.permute(0, 2, 3, 1))),
        expand=PatchExpanding(1, 3, 2),
        b=nn.Linear(3, 2),
    )
    assert units_of(net) == {
        frozenset(
            {("expand.expand", 0, i, i + 3, i + 6, i + 9), ("expand.norm", 0, i), ("b", 1, i)}
        )
        for i in range(3)
    }


def test_normalised_groups_lose_the_same_places():
    net = Net(
        lambda n, x: n.b(n.norm(n.a(x))),
        a=convolution(1, 6),
        norm=nn.GroupNorm(2, 6),
        b=convolution(6, 2),
    )
    assert units_of(net) == {
        frozenset({("a", 0, i, i + 3), ("norm", 0, i, i + 3), ("b", 1, i, i + 3)}) for i in range(3)
    }


def test_groups_of_a_convolution_lose_the_same_places():
    net = Net(
        lambda n, x: n.c(n.b(n.a(x))),
        a=convolution(1, 4), b=convolution(4, 6, groups=2), c=convolution(6, 2),
    )  # fmt: skip
    entering = {frozenset({("a", 0, i, i + 2), ("b", 1, i)}) for i in range(2)}
    leaving = {frozenset({("b", 0, i, i + 3), ("c", 1, i, i + 3)}) for i in range(3)}
    assert units_of(net) == entering | leaving


def test_a_depthwise_convolution_passes_each_channel_on():
    net = Net(
        lambda n, x: n.c(n.b(n.a(x))),
        a=convolution(1, 3), b=convolution(3, 6, groups=3), c=convolution(6, 2),
    )  # fmt: skip
    assert units_of(net) == {
        frozenset({("a", 0, i), ("b", 0, 2 * i, 2 * i + 1), ("c", 1, 2 * i, 2 * i + 1)})
        for i in range(3)
    }


def test_a_transposed_convolution_has_its_axes_swapped():
    net = Net(
        lambda n, x: n.c(n.b(n.a(x))),
        a=convolution(1, 3), b=nn.ConvTranspose2d(3, 4, 2, stride=2), c=convolution(4, 2),
    )  # fmt: skip
    entering = {frozenset({("a", 0, i), ("b", 0, i)}) for i in range(3)}
    assert units_of(net) == entering | {frozenset({("b", 1, i), ("c", 1, i)}) for i in range(4)}


def test_factors_of_a_product_share_the_summed_axis():
    def multiply(n, x):
        rows, columns = n.a(x).flatten(2), n.b(x).flatten(2)
        return torch.matmul(rows.mT, columns)

    net = Net(multiply, a=convolution(1, 3), b=convolution(1, 3))
    assert units_of(net) == {frozenset({("a", 0, i), ("b", 0, i)}) for i in range(3)}


def test_einsum_reads_its_letters():
    def multiply(n, x):
        return n.c(torch.einsum("bchw,bdhw->bcd", n.a(x), n.b(x)).sum(2))

    net = Net(multiply, a=convolution(1, 3), b=convolution(1, 4), c=nn.Linear(3, 2))
    kept = {frozenset({("a", 0, i), ("c", 1, i)}) for i in range(3)}
    assert units_of(net) == kept | {frozenset({("b", 0, i)}) for i in range(4)}


def test_of_two_axes_that_become_one_the_inner_channels_can_go():
    def outer_product(n, x):
        return n.c(torch.einsum("bchw,bdhw->bcd", n.a(x), n.b(x)).flatten(1))

    net = Net(outer_product, a=convolution(1, 3), b=convolution(1, 4), c=nn.Linear(12, 2))
    assert units_of(net) == {frozenset({("b", 0, i), ("c", 1, i, i + 4, i + 8)}) for i in range(4)}


def test_kernels_keep_their_size():
    def add_weights(n, x):
        return n.c(F.conv2d(x, n.a.weight + n.b.weight))

    net = Net(add_weights, a=nn.Conv2d(1, 3, 3), b=nn.Conv2d(1, 3, 3), c=convolution(3, 2))
    assert units_of(net) == {frozenset({("a", 0, i), ("b", 0, i), ("c", 1, i)}) for i in range(3)}


def test_attention_passes_the_channels_of_values_only():
    def attend(n, x):
        query, key, value = (layer(x).flatten(2).mT for layer in (n.q, n.k, n.v))
        return n.out(F.scaled_dot_product_attention(query, key, value))

    net = Net(
        attend, q=convolution(1, 4), k=convolution(1, 4), v=convolution(1, 3), out=nn.Linear(3, 2)
    )
    assert units_of(net) == {frozenset({("v", 0, i), ("out", 1, i)}) for i in range(3)}


def test_a_shared_layer_has_one_set_of_channels():
    shared = convolution(3, 3)
    net = Net(
        lambda n, x: n.c(n.again(n.b(n.a(x)))),
        a=convolution(1, 3),
        b=shared,
        again=shared,
        c=convolution(3, 2),
    )
    assert units_of(net) == {
        frozenset({("a", 0, i), ("b", 0, i), ("b", 1, i), ("c", 1, i)}) for i in range(3)
    }


@pytest.mark.parametrize(
    "operation",
    [
        lambda features: features.cumsum(1),
        lambda features: features.flip(1),
        lambda features: features.roll(1, 1),
        lambda features: features[:, :2],
        lambda features: F.pad(features, (0, 0, 0, 0, 0, 1)),
        lambda features: features.sort(1).values,
    ],
    ids=["cumsum", "flip", "roll", "slice", "pad", "sort"],
)
def test_channels_stay_where_their_order_or_number_counts(operation):
    net = Net(
        lambda n, x: n.b(operation(n.a(x)).mean(1, keepdim=True)),
        a=convolution(1, 3),
        b=convolution(1, 2),
    )
    assert units_of(net) == set()


def test_moves_of_pixels_leave_channels_alone():
    def move(n, x):
        return n.b(F.pad(n.a(x).roll(1, 2).flip(3), (1, 0))[..., 1:])

    net = Net(move, a=convolution(1, 3), b=convolution(3, 2))
    assert units_of(net) == {frozenset({("a", 0, i), ("b", 1, i)}) for i in range(3)}


def test_a_net_that_would_mix_its_parts_anew_is_not_pruned():
    """Heads of a size that is written in the code: fewer channels would make fewer heads."""

    def by_heads(n, x):
        heads = n.a(x).unflatten(1, (-1, 4))
        return n.b(heads.softmax(1).flatten(1, 2))

    net = Net(by_heads, a=convolution(1, 16), b=convolution(16, 2)).eval()
    classes = label_channels(net, IMAGES)
    (group,) = find_groups(classes)
    pruned, done = remove_units(net, IMAGES, classes, [(group, [0, 1])])
    assert pruned(IMAGES).shape == net(IMAGES).shape
    assert done == []
    assert pruned.a.out_channels == 16


def test_only_what_a_net_cannot_follow_is_left_out():
    def fixed_view(n, x):
        return n.d(n.c(n.b(n.a(x)).view(-1, 8, 8, 8)))

    net = Net(
        fixed_view,
        a=convolution(1, 8), b=convolution(8, 8), c=convolution(8, 8), d=convolution(8, 2),
    ).eval()  # fmt: skip
    classes = label_channels(net, IMAGES)
    plans = [(group, [0, 3, 5]) for group in find_groups(classes)]
    pruned, done = remove_units(net, IMAGES, classes, plans)
    assert (len(plans), len(done)) == (3, 2)
    assert [layer.out_channels for layer in (pruned.a, pruned.b, pruned.c)] == [5, 8, 5]


def depgraph(net, head):
    """The groups that torch-pruning finds: (weight, axis, indices) of their layers."""
    graph = torch_pruning.DependencyGraph().build_dependency(net, LARGE_IMAGES)
    names = {module: name for name, module in net.named_modules() if isinstance(module, LAYERS)}
    reads = (torch_pruning.prune_conv_in_channels, torch_pruning.prune_linear_in_channels)
    return {
        frozenset(
            (names[dep.target.module], axis_of(dep.target.module, dep.handler in reads), *sorted(i))
            for dep, i in group
            if dep.target.module in names
        )
        for group in graph.get_all_groups(ignored_layers=[head], root_module_types=list(LAYERS[:3]))
    }


def axis_of(layer, is_input):
    if getattr(layer, "groups", 1) > 1:
        return 0
    return int(is_input) ^ int(isinstance(layer, nn.ConvTranspose2d))


@pytest.mark.parametrize(
    ("build", "num_groups"),
    [
        (lambda: timm.create_model("resnet18", num_classes=3, in_chans=1), 12),
        (lambda: timm.create_model("mobilenetv3_small_100", num_classes=3, in_chans=1), 27),
        (lambda: BasicUNet(2, 1, 1, features=(8,) * 6, act="RELU", norm="BATCH"), 22),
    ],
    ids=["resnet18", "mobilenetv3_small", "basic_unet"],
)
def test_groups_are_those_of_torch_pruning(build, num_groups):
    net = build().eval()
    for module in net.modules():
        if hasattr(module, "inplace"):
            module.inplace = False
    *_, head = (module for module in net.modules() if isinstance(module, nn.Conv2d | nn.Linear))
    layers = {n for n, module in net.named_modules() if isinstance(module, LAYERS)}
    groups = find_groups(label_channels(net, LARGE_IMAGES))
    ours = {
        frozenset(
            (m.name.removesuffix(".weight"), m.axis, *sorted(m.indices.flatten().tolist()))
            for m in group.members
            if m.name.endswith(".weight") and m.name.removesuffix(".weight") in layers
        )
        for group in groups
    }
    assert len(ours) == num_groups
    assert ours == depgraph(net, head)
