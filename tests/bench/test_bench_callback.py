"""Anybody's LightningModule in anybody's Trainer."""

import lightning
import numpy as np
import pytest
import torch
from fake_runtime import FakeRuntime
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, default_collate

from medlite.bench.callback import BenchmarkCallback, gather_images
from medlite.errors import BenchmarkError
from medlite.runtimes.onnxruntime import OnnxRuntime
from medlite.types import Batch, BenchmarkSettings, Hardware

IMAGES = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
BRIEF = BenchmarkSettings(
    num_warmup=2, num_queries=8, num_rounds=2, throughput_seconds=0.01, energy_seconds=0
)


class PlainModule(lightning.LightningModule):
    """What a stranger writes: layers on the module itself."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))

    def forward(self, images):
        return self.layers(images)

    def training_step(self, batch):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch):
        self.training_step(batch)

    def test_step(self, batch):
        self.training_step(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class NestedModule(PlainModule):
    """The network under the name `net`, as in medlite."""

    def __init__(self):
        super().__init__()
        self.net = self.layers

    def forward(self, images):
        raise NotImplementedError

    def test_step(self, batch):
        pass


def loader():
    return DataLoader(TensorDataset(IMAGES, torch.zeros(6, dtype=torch.long)), batch_size=4)


def trainer_with(callback, directory, **options):
    return lightning.Trainer(
        accelerator="cpu", max_epochs=1, callbacks=[callback], default_root_dir=directory,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        **{"logger": False, **options},
    )  # fmt: skip


def callback_for(runtimes, **options):
    return BenchmarkCallback(
        runtimes=runtimes, hardware=Hardware(num_threads=1), settings=BRIEF, **options
    )


def test_plain_module_is_measured_after_its_test_and_logged(tmp_path):
    callback = callback_for([OnnxRuntime()])
    logger = CSVLogger(tmp_path)
    module = PlainModule()
    trainer_with(callback, tmp_path, logger=logger).test(module, loader(), verbose=False)
    assert callback.result.failures == {}
    with torch.no_grad():
        expected = module(IMAGES).numpy()
    np.testing.assert_allclose(callback.result.predictions["onnxruntime"], expected, atol=1e-5)
    logger.save()
    logged = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text()
    assert "latency/onnxruntime/p50_ms" in logged
    assert (tmp_path / "benchmark" / "model.onnx").exists()


def test_network_under_a_name_is_measured_after_the_fit_beside_a_baseline(tmp_path):
    callback = callback_for([OnnxRuntime()], when="fit", baseline=PlainModule().layers)
    trainer_with(callback, tmp_path).fit(NestedModuleForFit(), loader(), loader())
    assert set(callback.result.predictions) == {"onnxruntime", "baseline/onnxruntime"}
    names = {row.name for row in callback.result.measurements}
    assert "speedup/onnxruntime/ratio" in names


class NestedModuleForFit(NestedModule):
    def forward(self, images):
        return self.net(images)


def test_given_artifacts_are_measured_as_they_are(artifact, tmp_path):
    callback = callback_for([FakeRuntime()], artifacts={"fake": artifact}, max_images=3)
    trainer_with(callback, tmp_path).test(NestedModule(), loader(), verbose=False)
    assert len(callback.result.predictions["fake"]) == 3
    assert not list((tmp_path / "benchmark").glob("model.*"))


def test_runtime_whose_format_is_missing_is_refused(artifact, tmp_path):
    callback = callback_for([OnnxRuntime()], artifacts={"fake": artifact})
    with pytest.raises(BenchmarkError, match="format 'onnx', but model was exported as fake"):
        trainer_with(callback, tmp_path).test(NestedModule(), loader(), verbose=False)


def test_callback_for_the_fit_leaves_the_test_alone(artifact, tmp_path):
    callback = callback_for([FakeRuntime()], when="fit", artifacts={"fake": artifact})
    trainer_with(callback, tmp_path).test(NestedModule(), loader(), verbose=False)
    assert callback.result is None


BATCHES = {
    "tensor": lambda images: images,
    "tuple": lambda images: (images, torch.zeros(len(images))),
    "Batch": lambda images: Batch(images, torch.zeros(len(images)), torch.arange(len(images))),
    "dictionary": lambda images: {"label": torch.zeros(len(images)), "image": images},
}


@pytest.mark.parametrize("form", BATCHES)
@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: [x], lambda x: {"a": x}])
def test_images_are_found_in_every_usual_form_of_batch(form, wrap):
    def collate(samples):
        return BATCHES[form](default_collate(samples))

    gathered = gather_images(wrap(DataLoader(IMAGES, batch_size=4, collate_fn=collate)))
    np.testing.assert_array_equal(gathered, IMAGES.numpy())


def test_no_more_images_than_asked_are_gathered():
    assert len(gather_images(DataLoader(IMAGES, batch_size=4), max_images=5)) == 5


def test_batch_without_images_is_refused():
    batches = DataLoader(IMAGES, collate_fn=lambda samples: {"mask": samples[0]})
    with pytest.raises(
        BenchmarkError, match=r'cannot find the images in a batch of type dict.*"image"'
    ):
        gather_images(batches)


def test_trainer_without_a_loader_is_refused():
    with pytest.raises(BenchmarkError, match="found no images"):
        gather_images(None)


class Stream(IterableDataset):
    """Images without a length."""

    def __iter__(self):
        yield from IMAGES


def test_a_loader_without_a_length_is_taken():
    assert len(gather_images(DataLoader(Stream(), batch_size=4))) == len(IMAGES)
