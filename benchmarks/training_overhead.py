"""A training step of medlite beside a bare PyTorch loop, on the same net and the same batches.

    python benchmarks/training_overhead.py [--model NAME] [--rounds N] [--json FILE]

Both train the same net on the same data loader, one epoch in turns; the ratio of their times is
taken round by round. Wall time, one process. Validation and checkpoints are left out on both
sides, the loss, its check for NaN, clipping, schedule and progress bar are medlite's own.
"""

import argparse
import json
import logging
import statistics
import time
import warnings
from pathlib import Path

import lightning
import torch

from medlite.command_line import conf_directory
from medlite.config import build, model_config
from medlite.data.module import ImageDataModule
from medlite.data.phantom import phantom
from medlite.tasks.losses import build_loss
from medlite.tasks.supervised import SupervisedTask, warmup_cosine
from medlite.types import TrainSettings

SETTINGS = TrainSettings(epochs=1, batch_size=16)


def build_data() -> ImageDataModule:
    """A segmentation set of 64x64 images, augmented as in every run."""
    images = phantom(
        task="segmentation", labels="binary", image_size=(64, 64), num_train=320, num_val=8,
        num_test=8,
    )  # fmt: skip
    return ImageDataModule(images, batch_size=SETTINGS.batch_size)


def train_bare(net: torch.nn.Module, data: ImageDataModule) -> float:
    """The loop that anyone would write; seconds of one epoch."""
    loader, loss_function = data.train_dataloader(), build_loss(data.spec)
    optimizer = torch.optim.AdamW(net.parameters(), lr=SETTINGS.learning_rate)
    total = len(loader)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: warmup_cosine(step, warmup=1, total=total)
    )
    net.train()
    start = time.perf_counter()
    for image, target, _ in loader:
        optimizer.zero_grad()
        loss_function(net(image), target).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), SETTINGS.gradient_clip)
        optimizer.step()
        schedule.step()
    return time.perf_counter() - start


class EpochTimer(lightning.Callback):
    """Seconds between the start and the end of a training epoch."""

    seconds = 0.0

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: object) -> None:
        """Start."""
        self.seconds = time.perf_counter()

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: object) -> None:
        """Stop."""
        self.seconds = time.perf_counter() - self.seconds


def train_medlite(net: torch.nn.Module, data: ImageDataModule) -> float:
    """The same epoch through SupervisedTask and Lightning's Trainer."""
    total = len(data.train_dataloader())
    task = SupervisedTask(net, spec=data.spec, settings=SETTINGS, total_steps=total)
    timer = EpochTimer()
    trainer = lightning.Trainer(
        accelerator="cpu", max_epochs=1, limit_val_batches=0, logger=False, callbacks=[timer],
        enable_checkpointing=False, enable_model_summary=False,
        gradient_clip_val=SETTINGS.gradient_clip, deterministic="warn",
    )  # fmt: skip
    trainer.fit(task, datamodule=data)
    return timer.seconds


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="ultralight_vm_unet")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore")
    data = build_data()
    spec = data.spec
    net = build(
        model_config(arguments.model, [conf_directory()]),
        in_channels=spec.in_channels,
        num_classes=spec.num_classes,
        image_size=spec.image_size,
        spatial_dims=spec.num_spatial_dims,
    )
    train_bare(net, data)
    train_medlite(net, data)
    pairs = [(train_bare(net, data), train_medlite(net, data)) for _ in range(arguments.rounds)]
    ratios = sorted(medlite / bare for bare, medlite in pairs)
    row = {
        "model": arguments.model,
        "batches": len(data.train_dataloader()),
        "bare_seconds": statistics.median(bare for bare, _ in pairs),
        "medlite_seconds": statistics.median(medlite for _, medlite in pairs),
        "ratio_median": statistics.median(ratios),
        "ratio_min": ratios[0],
        "ratio_max": ratios[-1],
        "n": len(ratios),
    }
    threads = torch.get_num_threads()
    print(f"torch {torch.__version__}, lightning {lightning.__version__}, {threads} threads")
    for name, value in row.items():
        print(f"{name:16} {value if isinstance(value, str | int) else round(value, 4)}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"rows": [row]}, indent=1))


if __name__ == "__main__":
    main()
