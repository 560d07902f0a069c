"""Where a runtime says something else than torch, the record says what may be behind it."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from medlite.data.module import ImageDataModule
from medlite.data.phantom import phantom
from medlite.pipeline import parity
from medlite.pipeline.measuring import predict
from medlite.pipeline.parity import Exported, compare_with_torch
from medlite.types import Artifact, Predictions

NUM_TEST = 12


class OnTheEdge(nn.Module):
    """Two logits that lie apart by less than a ten-thousandth of the brightest pixel."""

    def __init__(self, distance, largest_code=127):
        super().__init__()
        self.register_buffer("codes", torch.tensor([-largest_code, 3], dtype=torch.int8))
        self.distance = distance

    def forward(self, image):
        brightest = image.flatten(1).amax(1)
        return torch.stack([brightest, brightest.round(decimals=4) + self.distance], 1)


@pytest.fixture
def job():
    images = phantom(
        task="classification", labels="multiclass", num_classes=2, image_size=(16, 16),
        num_train=8, num_val=4, num_test=NUM_TEST,
    )  # fmt: skip
    return SimpleNamespace(
        data=ImageDataModule(images, batch_size=4),
        spec=images.spec,
        runtimes={"engine": SimpleNamespace(format="engine")},
    )


def rows_of(job, net, *, precision="int8", num_wrong=NUM_TEST):
    artifact = Artifact(
        path=Path("net"), format="engine", precision=precision, input_shape=job.spec.input_shape,
        output_shape=(2,), files=(), sha256="", num_bytes=0,
    )  # fmt: skip
    said = predict(job, net)
    logits = said.logits.copy()
    logits[:num_wrong] = logits[:num_wrong, ::-1]
    exported = Exported(
        job=job, nets={"": net}, artifacts={"": {"engine": artifact}}, torch_says={"": said}
    )
    wrong = Predictions(logits=logits, targets=said.targets, groups=said.groups)
    return compare_with_torch(exported, {"engine": wrong})


def test_equal_answers_need_no_reason(job):
    (row,) = rows_of(job, OnTheEdge(0.5), num_wrong=0)
    assert (row["passed"], row["reasons"]) == (True, ())


def test_a_net_that_is_sure_keeps_its_decisions_on_slightly_changed_images(job):
    (row,) = rows_of(job, OnTheEdge(0.5))
    assert f"in torch alone, 0 of {NUM_TEST} decisions flip" in " ".join(row["reasons"])


def test_a_net_on_the_edge_is_told(job):
    net = OnTheEdge(0.0)
    with torch.no_grad():
        images = torch.from_numpy(np.stack([image for image, _ in job.data.data.test.samples]))
        expected = (net(images).argmax(1) != net(images * 1.0001).argmax(1)).sum().item()
    assert expected > 0
    (row,) = rows_of(job, net)
    assert f"in torch alone, {expected} of {NUM_TEST} decisions flip" in " ".join(row["reasons"])


@pytest.mark.parametrize(
    ("cuts_off", "largest_code"), [(True, 127), (True, 63), (False, 127), (None, 127)]
)
def test_sums_that_are_cut_off_are_named(job, monkeypatch, cuts_off, largest_code):
    monkeypatch.setattr(parity, "cuts_off_int8_sums", lambda: cuts_off)
    (row,) = rows_of(job, OnTheEdge(0.5, largest_code))
    is_named = "set weight_bits=7" in " ".join(row["reasons"])
    assert is_named is (cuts_off is True and largest_code == 127)


def test_float_graphs_have_no_such_excuse(job):
    (row,) = rows_of(job, OnTheEdge(0.5), precision="fp32")
    assert not row["passed"]
    assert "in torch alone" not in " ".join(row["reasons"])
