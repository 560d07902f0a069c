"""A toy world for compression steps: two tasks, small nets, and a fit that honours hooks."""

from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from medlite.types import Batch, CompressionContext, DataSpec, FitHooks

torch.set_num_threads(1)

IMAGE_SIZE = (32, 32)
NUM_VALIDATION_BATCHES = 16


def make_spec(task="segmentation", labels="binary", image_size=IMAGE_SIZE, num_classes=1):
    names = ("background", "disc") if labels == "binary" else tuple("abc"[:num_classes])
    return DataSpec(
        name="toy",
        task=task,
        labels=labels,
        in_channels=1,
        num_classes=num_classes,
        image_size=image_size,
        class_names=names,
        class_counts=(1,) * len(names),
        num_samples={"train": 32, "val": 8, "test": 8},
        num_groups={"train": 32, "val": 8, "test": 8},
        group_kind="image",
        modality="shape",
        provenance="simulated",
        origin="tests",
        preprocessing="none",
    )


def discs(count, image_size=IMAGE_SIZE, seed=0):
    """Noisy images (N, 1, *sides) of one bright ball each, and its mask (N, *sides)."""
    generator = torch.Generator().manual_seed(seed)
    axes = [torch.linspace(-1, 1, side) for side in image_size]
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij"))
    centres = torch.rand(count, len(image_size), *[1] * len(image_size), generator=generator) - 0.5
    masks = ((grid - centres).square().sum(1) < 0.16).float()
    noise = torch.randn(count, *image_size, generator=generator)
    return (masks + 0.3 * noise)[:, None], masks.long()


@dataclass
class ToyFit:
    """Adam on a fixed toy set, `steps` steps an epoch, and a validation after each epoch."""

    spec: DataSpec
    steps: int = 4
    calls: list[dict] = field(default_factory=list)
    hooks: FitHooks | None = None
    nets: list[nn.Module] = field(default_factory=list)

    def __call__(self, net, *, name, epochs, learning_rate, hooks=None):
        self.hooks = hooks or FitHooks()
        self.calls.append({"name": name, "epochs": epochs, "learning_rate": learning_rate})
        self.nets.append(net)
        auxiliary = self.hooks.auxiliary or nn.Identity()
        parameters = [*net.parameters(), *auxiliary.parameters()]
        optimizer = torch.optim.Adam(parameters, lr=learning_rate)
        for epoch in range(epochs):
            self.set_mode(net, True)
            if self.hooks.on_epoch_start is not None:
                self.hooks.on_epoch_start(net, epoch / epochs)
            for step in range(self.steps):
                batch = make_batch(self.spec, 8, seed=step)
                logits = net(batch.image)
                own_loss = partial(task_loss, self.spec, batch=batch)
                loss = (self.hooks.loss or keep_loss)(logits, batch, own_loss)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            self.set_mode(net, False)
            with torch.no_grad():
                net(10 * make_batch(self.spec, 8, seed=99).image)  # out of the training range
        return net

    def set_mode(self, net, is_training):
        if self.hooks.set_mode is None:
            net.train(is_training)
        else:
            self.hooks.set_mode(net, is_training)


def keep_loss(logits, batch, own_loss):
    return own_loss(logits)


def assert_same_but_for_single_codes(logits, reference):
    """Kernels of integers may differ by one code here and there, where a value lies between two.

    A few logits around it move, and none of them far; those of another net would all differ.
    """
    error = abs(logits - reference) / abs(reference).max()
    assert (error < 1e-3).sum() > 0.97 * (error >= 0).sum()
    assert error.max() < 0.1


def make_batch(spec, count, seed=0):
    images, masks = discs(count, spec.image_size, seed)
    target = masks
    if spec.task == "classification":
        right = masks.flatten(2).float().mean(1)
        target = (right.argmax(1) * spec.num_classes // right.shape[1]).long()
    return Batch(images, target, torch.arange(count))


def task_loss(spec, logits, batch):
    if spec.labels == "binary":
        return F.binary_cross_entropy_with_logits(logits[:, 0], batch.target.float())
    return F.cross_entropy(logits, batch.target)


@dataclass
class Reports:
    lines: dict[str, str] = field(default_factory=dict)

    def __call__(self, topic, text):
        self.lines[topic] = text


def make_context(spec, *, teacher=None, steps=4):
    def no_teacher():
        raise AssertionError

    return CompressionContext(
        spec=spec,
        fit=ToyFit(spec, steps=steps),
        calibration_images=lambda count: make_batch(spec, count, seed=7).image,
        calibration_batches=lambda count: [make_batch(spec, 4, seed=i) for i in range(count)],
        validation_batches=lambda count: [
            make_batch(spec, 8, seed=40 + i) for i in range(min(count, NUM_VALIDATION_BATCHES))
        ],
        build_teacher=(lambda: teacher) if teacher is not None else no_teacher,
        report=Reports(),
    )


def conv_block(in_channels, out_channels, activation):
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(out_channels, eps=1e-3),
        activation(),
    )


class TinyUNet(nn.Module):
    """Convolutions, pooling, a concatenation, a residual sum and dropout, in 9,000 parameters."""

    def __init__(self, activation=nn.ReLU, dropout=0.2, width=16):
        super().__init__()
        self.stem = conv_block(1, width, activation)
        self.down = nn.Sequential(
            nn.MaxPool2d(2), conv_block(width, 2 * width, activation), nn.Dropout(dropout)
        )
        self.merge = conv_block(3 * width, width, activation)
        self.refine = conv_block(width, width, activation)
        self.head = nn.Conv2d(width, 1, 1)

    def forward(self, image):
        fine = self.stem(image)
        coarse = F.interpolate(self.down(fine), scale_factor=2.0, mode="bilinear")
        features = self.merge(torch.cat([fine, coarse], 1))
        return self.head(features + self.refine(features))


class TinyClassifier(nn.Module):
    def __init__(self, width=16, num_classes=3):
        super().__init__()
        self.features = nn.Sequential(
            conv_block(1, width, nn.ReLU),
            nn.MaxPool2d(2),
            conv_block(width, 2 * width, nn.ReLU),
            nn.MaxPool2d(2),
            conv_block(2 * width, 2 * width, nn.ReLU),
        )
        self.head = nn.Linear(2 * width, num_classes)

    def forward(self, image):
        return self.head(self.features(image).mean((2, 3)))


def train(net, spec, epochs=6):
    torch.manual_seed(0)
    return ToyFit(spec)(net, name="train", epochs=epochs, learning_rate=1e-2)
