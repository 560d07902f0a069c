import io
from dataclasses import replace

import pytest
import torch
from torch import nn
from toy_world import (
    TinyClassifier,
    TinyUNet,
    assert_same_but_for_single_codes,
    conv_block,
    make_batch,
    make_context,
    make_spec,
    train,
)

from medlite.compression.fake_quantize import PerTensorFakeQuantize, fake_quantizers
from medlite.compression.quantization import (
    PostTrainingQuantization,
    QuantizationAwareTraining,
    RangeSchedule,
)
from medlite.compression.quantized_graph import (
    DROPOUTS,
    activation_ranges,
    calibrate,
    count_quantized,
    count_scans,
    prepare,
)
from medlite.compression.quantizer import Int8Quantizer
from medlite.errors import ConfigError, ExportError, MedliteError
from medlite.models.layers.mamba import MambaBlock

STEPS = {
    "ptq": PostTrainingQuantization(calibration_samples=16),
    "qat": QuantizationAwareTraining(epochs=2, learning_rate=1e-3, calibration_samples=16),
}


def int8_quantizer(**options):
    defaults = {"keep_first_float": True, "keep_last_float": True, "keep_float": ()}
    return Int8Quantizer(**(defaults | options))


def prepared(net, spec, **options):
    graph = prepare(net, spec.input_shape, int8_quantizer(**options))
    calibrate(graph, make_batch(spec, 16).image, batch_size=8, method="minmax")
    return graph


def saved_and_loaded(content):
    """Through a file that may hold tensors and plain values only."""
    file = io.BytesIO()
    torch.save(content, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def is_rounding(graph, node):
    return node.op == "call_module" and isinstance(
        graph.get_submodule(node.target), PerTensorFakeQuantize
    )


def dice(logits, mask):
    is_inside = logits[:, 0] > 0
    return 2 * (is_inside & (mask > 0)).sum() / (is_inside.sum() + mask.sum())


@pytest.mark.parametrize("method", ["minmax", "mse", "percentile"])
def test_post_training_quantisation_stays_close_to_float(trained_unet, spec, method):
    batch = make_batch(spec, 16, seed=50)
    step = PostTrainingQuantization(calibration_samples=32, method=method)
    quantised, _ = step.apply(trained_unet, make_context(spec))
    reference = trained_unet(batch.image)
    error = (quantised(batch.image) - reference).square().mean().sqrt()
    assert error < 0.05 * reference.std()


@pytest.mark.parametrize("name", STEPS)
def test_restored_net_is_the_same_to_the_last_bit(trained_unet, spec, name):
    quantised, state = STEPS[name].apply(trained_unet, make_context(spec))
    state, weights = saved_and_loaded((state, quantised.state_dict()))
    torch.manual_seed(5)
    restored = STEPS[name].restore(TinyUNet(), state, spec)
    restored.load_state_dict(weights, strict=True)
    image = make_batch(spec, 4, seed=3).image
    assert (restored(image) - quantised(image)).abs().max().item() == 0.0


def test_the_trained_net_is_the_exported_net(trained_unet, spec):
    context = make_context(spec)
    quantised, _ = STEPS["qat"].apply(trained_unet, context)
    image = make_batch(spec, 8, seed=3).image
    assert torch.allclose(context.fit.nets[0](image), quantised(image), atol=1e-6)


def test_the_net_that_was_given_stays_as_it_was(trained_unet, spec):
    before = {name: tensor.clone() for name, tensor in trained_unet.state_dict().items()}
    STEPS["qat"].apply(trained_unet, make_context(spec))
    after = trained_unet.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_every_batch_size_gives_each_image_its_own_logits(trained_unet, spec, batch_size):
    quantised, _ = STEPS["ptq"].apply(trained_unet, make_context(spec))
    image = make_batch(spec, 16, seed=4).image
    logits = quantised(image[:batch_size])
    assert logits.shape == (batch_size, 1, 32, 32)
    assert_same_but_for_single_codes(logits, quantised(image)[:batch_size])


def test_training_under_rounding_recovers_what_coarse_weights_lost(spec):
    net = train(TinyUNet(), spec)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(1 + 0.5 * torch.randn(parameter.shape))
    batch = make_batch(spec, 32, seed=60)
    step = QuantizationAwareTraining(epochs=6, learning_rate=1e-2, calibration_samples=16)
    quantised, _ = step.apply(net, make_context(spec))
    assert dice(quantised(batch.image), batch.target) > 0.9


def test_evaluation_teaches_the_ranges_nothing(trained_unet, spec):
    graph = prepared(trained_unet, spec)
    schedule = RangeSchedule(freeze_at=0.5)
    schedule.set_mode(graph, False)
    before = activation_ranges(graph)
    graph(100 * make_batch(spec, 4).image)
    assert all(torch.equal(before[name], r) for name, r in activation_ranges(graph).items())


def test_ranges_follow_training_until_they_freeze(trained_unet, spec):
    graph = prepared(trained_unet, spec)
    schedule = RangeSchedule(freeze_at=0.5)
    image = 100 * make_batch(spec, 4).image

    def moves(done):
        schedule.set_mode(graph, True)
        schedule.on_epoch_start(graph, done)
        before = activation_ranges(graph)
        graph(image)
        after = activation_ranges(graph)
        return any(not torch.equal(before[name], after[name]) for name in before)

    assert moves(0.0)
    assert not moves(0.5)


def test_prepared_net_reloads_in_the_middle_of_a_fit(trained_unet, spec):
    graph = prepared(trained_unet, spec)
    RangeSchedule(freeze_at=1.0).set_mode(graph, True)
    graph(3 * make_batch(spec, 4).image)
    state = saved_and_loaded(graph.state_dict())
    fresh = prepared(trained_unet, spec)
    fresh.load_state_dict(state, strict=True)
    for net in (graph, fresh):
        RangeSchedule(freeze_at=1.0).set_mode(net, False)
    image = make_batch(spec, 4).image
    assert torch.equal(graph(image), fresh(image))


def test_dropout_keeps_its_probability_and_works_in_training_only(trained_unet, spec):
    graph = prepared(trained_unet, spec)
    schedule = RangeSchedule(freeze_at=1.0)
    image = make_batch(spec, 4).image

    def literals():
        return [node.args[1:] for node in graph.graph.nodes if node.target in DROPOUTS]

    for _ in range(2):
        schedule.set_mode(graph, True)
        assert literals() == [(0.2, True)]
        assert not torch.equal(graph(image), graph(image))
        schedule.set_mode(graph, False)
        assert literals() == [(0.2, False)]
        assert torch.equal(graph(image), graph(image))


def test_flags_that_a_trainer_assigns_change_nothing(trained_unet, spec):
    graph = prepared(trained_unet, spec)
    schedule = RangeSchedule(freeze_at=1.0)
    schedule.set_mode(graph, True)
    graph.eval()
    for module in graph.modules():
        module.training = False
    image = make_batch(spec, 4).image
    assert not torch.equal(graph(image), graph(image))


def test_batch_normalisation_with_its_own_epsilon_is_folded(trained_unet, spec):
    graph = prepared(trained_unet, spec)
    targets = {node.target for node in graph.graph.nodes}
    assert torch.ops.aten.batch_norm.default not in targets
    for part in fake_quantizers(graph).values():
        part.mode = "measure"
    image = make_batch(spec, 4).image
    assert torch.allclose(graph(image), trained_unet(image), atol=1e-4)


def test_batch_normalisation_that_follows_no_layer_is_kept_as_arithmetic():
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(8, eps=1e-2)
    pool = nn.MaxPool2d(2)
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3), pool, norm, nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 1, 1)
    ).eval()
    for tensor in (norm.running_mean, norm.running_var, norm.weight.data, norm.bias.data):
        tensor.uniform_(0.5, 2.0)
    graph = prepare(net, (1, 16, 16), int8_quantizer())
    targets = {node.target for node in graph.graph.nodes}
    assert torch.ops.aten.batch_norm.default not in targets
    image = torch.randn(2, 1, 16, 16)
    assert torch.allclose(graph(image), net(image), atol=1e-5)


def test_every_parameter_learns(trained_unet, spec):
    graph = prepared(trained_unet, spec)
    RangeSchedule(freeze_at=1.0).set_mode(graph, True)
    graph(make_batch(spec, 4).image).square().mean().backward()
    parameters = dict(graph.named_parameters())
    assert "merge.0.bias" in parameters
    assert all(parameter.grad is not None for parameter in parameters.values())


def test_mixed_precision_trains(trained_unet, spec):
    graph = prepared(trained_unet, spec)
    RangeSchedule(freeze_at=1.0).set_mode(graph, True)
    image = make_batch(spec, 4).image
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = graph(image)
    logits.float().square().mean().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in graph.parameters())


def test_a_layer_with_batch_normalisation_can_stay_in_float(trained_unet, spec):
    step = replace(STEPS["qat"], keep_float=("merge",))
    context = make_context(spec)
    quantised, _ = step.apply(trained_unet, context)
    assert count_quantized(quantised) == 2
    assert context.report.lines["kept in float"] == "stem.0, merge.0, head"


def test_first_and_last_layers_stay_in_float_unless_told(trained_unet, spec):
    count = {}
    for keep in (True, False):
        step = replace(STEPS["ptq"], keep_first_float=keep, keep_last_float=keep)
        count[keep] = count_quantized(step.apply(trained_unet, make_context(spec))[0])
    assert count == {True: 3, False: 5}


def test_the_card_says_how_it_was_quantised(trained_unet, spec):
    context = make_context(spec)
    STEPS["ptq"].apply(trained_unet, context)
    text = context.report.lines["quantisation"]
    assert "INT8 in 3 of 5 weighted layers" in text
    assert "16 training images" in text


def test_the_card_counts_the_images_that_there_are(trained_unet, spec):
    context = make_context(spec)
    replace(STEPS["ptq"], calibration_samples=256).apply(trained_unet, context)
    assert "from 32 training images" in context.report.lines["quantisation"]


@pytest.mark.parametrize(("weight_bits", "largest_code"), [(8, 127), (7, 63)])
def test_converted_weights_are_integers_and_no_float_copy_is_left(
    trained_unet, spec, weight_bits, largest_code
):
    step = replace(STEPS["ptq"], weight_bits=weight_bits)
    quantised, _ = step.apply(trained_unet, make_context(spec))
    state = quantised.state_dict()
    integers = [tensor for tensor in state.values() if tensor.dtype == torch.int8]
    assert len(integers) == 3
    assert all(tensor.abs().max() == largest_code for tensor in integers)
    assert not {"down.1.0.weight", "merge.0.weight", "refine.0.weight"} & state.keys()


@pytest.mark.parametrize("activation", [nn.SiLU, nn.Hardswish, nn.GELU, nn.PReLU])
def test_activations_that_do_not_clip_are_rounded_on_both_sides(spec, activation):
    blocks = [conv_block(width, 8, activation) for width in (1, 8, 8)]
    net = nn.Sequential(*blocks, nn.Conv2d(8, 1, 1)).eval()
    graph = prepare(net, spec.input_shape, int8_quantizer())
    convolutions = [
        node for node in graph.graph.nodes if node.target is torch.ops.aten.conv2d.default
    ]
    for convolution in convolutions[1:3]:
        (behind,) = convolution.users
        assert is_rounding(graph, behind)
        (activated,) = behind.users
        assert not is_rounding(graph, activated)
        assert is_rounding(graph, convolution.args[0])


def test_a_relu_is_absorbed_into_the_rounding_behind_it(trained_unet, spec):
    graph = prepared(trained_unet, spec)
    relus = [node for node in graph.graph.nodes if "relu" in str(node.target)]
    assert len(relus) == 4
    for relu in relus[1:]:
        assert relu.args[0].target is torch.ops.aten.conv2d.default
        assert all(is_rounding(graph, user) for user in relu.users)


def test_a_classifier_of_several_classes_is_quantised(classes):
    net = train(TinyClassifier(), classes)
    batch = make_batch(classes, 32, seed=70)
    quantised, _ = STEPS["ptq"].apply(net, make_context(classes))
    agreement = (quantised(batch.image).argmax(1) == net(batch.image).argmax(1)).float().mean()
    assert agreement > 0.9


def test_volumes_are_quantised():
    spec = make_spec(image_size=(8, 8, 8))
    net = nn.Sequential(
        nn.Conv3d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv3d(8, 8, 3, padding=1), nn.ReLU(),
        nn.Conv3d(8, 1, 1),
    )  # fmt: skip
    quantised, _ = STEPS["ptq"].apply(net, make_context(spec))
    assert count_quantized(quantised) == 1


def test_the_deployed_form_is_quantised(spec):
    class TwoBranches(TinyUNet):
        def deploy(self):
            deployed = TinyUNet()
            deployed.load_state_dict(self.state_dict())
            deployed.refine = nn.Identity()
            return deployed.eval()

    quantised, _ = STEPS["ptq"].apply(TwoBranches(), make_context(spec))
    assert count_quantized(quantised) == 2


def test_a_misspelt_layer_is_refused_with_the_right_name(trained_unet, spec):
    step = replace(STEPS["ptq"], keep_float=("merg.0",))
    with pytest.raises(MedliteError, match=r"no layer is called 'merg.0', did you mean 'merge.0'"):
        step.apply(trained_unet, make_context(spec))


def test_a_net_without_a_layer_to_quantise_is_refused(spec):
    with pytest.raises(MedliteError, match=r"nothing could be quantised: of 1 weighted layers"):
        STEPS["ptq"].apply(nn.Conv2d(1, 1, 1), make_context(spec))


def test_a_net_that_branches_on_its_data_is_refused(spec):
    class Branching(nn.Module):
        def forward(self, image):
            return image if image.sum() > 0 else -image

    with pytest.raises(ExportError, match=r"cannot trace the network"):
        STEPS["ptq"].apply(Branching(), make_context(spec))


def test_a_net_that_mixes_its_batch_is_refused(spec):
    class Mean(nn.Sequential):
        def forward(self, image):
            return super().forward(image).mean(0, keepdim=True)

    net = Mean(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 1, 1))
    with pytest.raises(ExportError, match=r"gives 1 outputs for 3 images"):
        STEPS["ptq"].apply(net, make_context(spec))


@pytest.mark.parametrize("num_heads", [None, 2])
def test_a_scan_stays_one_float_operator(spec, num_heads):
    class TokenMixer(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(1, 8, 4, stride=4)
            self.mamba = MambaBlock(8, d_state=4, num_heads=num_heads)
            self.head = nn.Conv2d(8, 1, 1)

        def forward(self, image):
            features = self.stem(image)
            tokens = self.mamba(features.flatten(2).transpose(1, 2))
            coarse = self.head(tokens.transpose(1, 2).unflatten(2, features.shape[2:]))
            return nn.functional.interpolate(coarse, scale_factor=4.0)

    context = make_context(spec)
    quantised, _ = STEPS["qat"].apply(TokenMixer(), context)
    assert count_scans(quantised) == 1
    assert count_quantized(quantised) == 2  # in_proj and out_proj
    kept = context.report.lines["kept in float"]
    assert kept.startswith("stem, mamba.conv1d, ")
    assert kept.endswith(", head, 1 scan")


def test_ranges_of_another_structure_are_refused(trained_unet, spec):
    _, state = STEPS["ptq"].apply(trained_unet, make_context(spec))
    with pytest.raises(ValueError, match="belong to another structure"):
        replace(STEPS["ptq"], keep_float=("merge",)).restore(trained_unet, state, spec)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs: 0 is not a whole number from 1 up"),
        ({"learning_rate": -1.0}, "learning_rate: -1.0 is not above 0"),
        ({"calibration_samples": 0}, "calibration_samples: 0 is not a whole number"),
        ({"method": "median"}, "method: 'median' is not one of minmax, mse, percentile"),
        ({"percentile": 100.0}, r"percentile: 100.0 is not in \(50, 100\)"),
        ({"weight_bits": 5}, "weight_bits: 5 is not one of 8, 7, 4, 3, 2"),
        ({"freeze_observers_at": 1.5}, r"freeze_observers_at: 1.5 is not in \[0, 1\]"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        QuantizationAwareTraining(**({"epochs": 1, "learning_rate": 1e-3} | options))
