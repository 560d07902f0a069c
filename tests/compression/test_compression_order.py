from pathlib import Path

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

from medlite.compression.distillation import Distillation
from medlite.compression.fine_tuning import FineTuning
from medlite.compression.fusion import Fuse
from medlite.compression.half_precision import HalfPrecision
from medlite.compression.low_rank import LowRank
from medlite.compression.nncf_quantization import NncfQuantization
from medlite.compression.order import check_order
from medlite.compression.pruning import StructuredPruning
from medlite.compression.quantization import PostTrainingQuantization, QuantizationAwareTraining
from medlite.compression.selective_precision import SelectivePrecision
from medlite.compression.sparsity import Sparsity
from medlite.compression.temperature import TemperatureScaling
from medlite.compression.token_pruning import TokenPruning

CONFIGS = sorted(Path(__file__).parents[2].glob("conf/compression/*.yaml"))

STEPS = {
    "prune": StructuredPruning,
    "prune_tokens": TokenPruning,
    "distill": Distillation,
    "finetune": FineTuning,
    "fuse": Fuse,
    "low_rank": LowRank,
    "sparsify": Sparsity,
    "qat": QuantizationAwareTraining,
    "ptq": PostTrainingQuantization,
    "selective_ptq": SelectivePrecision,
    "nncf_ptq": NncfQuantization,
    "half": HalfPrecision,
    "temperature": TemperatureScaling,
}


def problems(*names):
    return check_order({name: STEPS[name] for name in names})


@pytest.mark.parametrize(
    "names",
    [
        (),
        ("qat",),
        ("prune", "qat"),
        ("prune", "distill", "ptq"),
        ("distill", "prune"),
        ("prune", "fuse", "qat"),
        ("prune_tokens", "prune", "ptq"),
        ("prune", "qat", "temperature"),
        ("temperature",),
        ("prune", "fuse", "sparsify", "ptq", "temperature"),
    ],
)
def test_sensible_orders_have_no_problem(names):
    assert problems(*names) == []


def test_nothing_follows_an_integer_graph():
    (problem,) = problems("qat", "prune")
    assert problem == (
        "compression: 'prune' cannot follow 'qat', whose result is a fixed graph; put 'qat' last"
    )


@pytest.mark.parametrize("later", ["finetune", "distill", "prune", "low_rank", "fuse"])
def test_zeros_are_not_filled_again(later):
    (problem,) = problems("sparsify", later)
    assert problem == (
        f"compression: '{later}' cannot follow 'sparsify', whose zeros it would fill; put it "
        "before 'sparsify'"
    )
    assert problems(later, "sparsify") == []


def test_zeros_are_not_trained_under_rounding():
    (problem,) = problems("sparsify", "qat")
    assert problem.endswith("whose zeros it would fill; take ptq in its place")
    steps = {"sparsify": Sparsity, "qat": QuantizationAwareTraining(epochs=1, learning_rate=1e-4)}
    assert check_order(steps) == [problem]


def test_nothing_follows_the_temperature():
    assert problems("temperature", "ptq") == [
        "compression: 'ptq' cannot follow 'temperature', which fits the logits of the finished "
        "net; put 'temperature' last"
    ]


def test_a_net_is_quantised_once():
    assert problems("ptq", "qat") == [
        "compression: 'ptq' and 'qat' both choose the arithmetic; give one of them"
    ]


def test_a_step_is_given_once():
    steps = {"prune": STEPS["prune"], "again": STEPS["prune"]}
    assert check_order(steps) == [
        "compression: 'prune' and 'again' are the same step; give it once"
    ]


def test_all_problems_are_listed():
    assert len(problems("qat", "ptq", "prune")) == 3


def test_instances_are_checked_like_classes():
    steps = {
        "qat": QuantizationAwareTraining(epochs=1, learning_rate=1e-4),
        "distill": Distillation(epochs=1, learning_rate=1e-4),
    }
    assert len(check_order(steps)) == 1


def test_the_configurations_are_found():
    assert {path.stem for path in CONFIGS} == {"none", *STEPS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_configuration_holds_one_step_under_its_own_name(path):
    content = OmegaConf.load(path)
    assert list(content) == [path.stem] * (path.stem != "none")
    # Some options are those of the first training unless they are set.
    job = OmegaConf.create({"train": OmegaConf.load(path.parents[1] / "train" / "default.yaml")})
    steps = OmegaConf.merge(job, content)
    for name in content:
        assert isinstance(instantiate(steps[name], _convert_="all"), STEPS[name])
