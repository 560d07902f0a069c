import re
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from medlite.command_line import (
    conf_directory,
    expand_seeds,
    find_options,
    prepare_overrides,
    split_verb,
    user_directories,
)
from medlite.config import build, check, digest, locate, margins_config, model_config
from medlite.errors import ConfigError, MedliteError
from medlite.safety_settings import SafetyMargins

OPTIONS = find_options([conf_directory()])


@pytest.fixture(autouse=True)
def run_name():
    """A name for every job: the resolver of a command line that ran before wants Hydra's job."""
    OmegaConf.register_new_resolver("run_name", lambda: "test", replace=True)


def checked(*overrides, directories=()):
    words = prepare_overrides(overrides, OPTIONS)
    with initialize_config_dir(str(conf_directory()), version_base="1.3"):
        cfg = compose("config", words)
    return check(cfg, choices={}, options=OPTIONS, directories=[conf_directory(), *directories])


def problems_of(*overrides):
    with pytest.raises(ConfigError) as caught:
        checked(*overrides)
    return caught.value.problems


def test_defaults_are_right():
    config = checked()
    assert list(config.compression) == ["qat"]
    assert list(config.runtime) == ["onnxruntime", "openvino"]
    assert config.dataset["_target_"].endswith("lidc_nodules")


@pytest.mark.parametrize(
    ("word", "steps"),
    [("none", []), ("qat", ["qat"]), ("[prune,qat]", ["prune", "qat"]), ("[qat]", ["qat"])],
)
def test_compression_takes_a_word_or_an_ordered_list(word, steps):
    assert list(checked(f"compression={word}").compression) == steps


def test_a_pruned_net_is_trained_by_the_schedule_that_it_was_trained_with():
    config = checked("compression=prune", "train.epochs=7", "train.learning_rate=5e-4")
    step = config.compression["prune"]
    assert (step["epochs"], step["learning_rate"]) == (7, 5e-4)
    chosen = checked("compression=prune", "compression.prune.epochs=2").compression["prune"]
    assert chosen["epochs"] == 2


def test_the_order_of_steps_is_kept():
    assert list(checked("compression=[distill,prune,qat]").compression) == [
        "distill",
        "prune",
        "qat",
    ]


def test_a_step_in_the_list_can_be_tuned():
    config = checked("compression=[prune,qat]", "compression.prune.ratio=0.3")
    assert config.compression["prune"]["ratio"] == 0.3


def test_settings_of_a_step_that_was_not_chosen_fall_away():
    assert list(checked("compression=none", "compression.qat.epochs=1").compression) == []


@pytest.mark.parametrize("name", OPTIONS["experiment"])
def test_every_experiment_composes_and_names_its_command(name):
    text = (conf_directory() / "experiment" / f"{name}.yaml").read_text()
    assert re.match(rf"# python -m medlite (-m )?experiment={name}\b", text.splitlines()[1])
    assert checked(f"experiment={name}").dataset["_target_"]


def test_a_misspelt_group_gets_the_closest():
    with pytest.raises(ConfigError, match="modle: no such group or key, did you mean 'model'"):
        prepare_overrides(["modle=unet"], OPTIONS)


def test_a_misspelt_option_gets_the_closest():
    with pytest.raises(ConfigError, match=r"model=lightm_unett: .* did you mean 'lightm_unet'"):
        prepare_overrides(["model=lightm_unett"], OPTIONS)


def test_no_experiment_may_be_chosen_as_by_default():
    assert prepare_overrides(["experiment=null"], OPTIONS) == ["experiment=null"]


@pytest.mark.parametrize("word", ["dataset=null", "compression=qat,null"])
def test_null_is_no_option(word):
    with pytest.raises(ConfigError, match="=null: no such option, the options are"):
        prepare_overrides([word], OPTIONS)


def test_misspelt_options_in_sweeps_and_lists_are_found():
    with pytest.raises(ConfigError) as caught:
        prepare_overrides(["compression=none,qut,[prune,qta]", "model=unet,unte"], OPTIONS)
    assert len(caught.value.problems) == 3


def test_a_misspelt_key_gets_the_closest():
    assert problems_of("train.epohcs=3") == ("train.epohcs: unknown, did you mean 'epochs'?",)


def test_a_misspelt_constructor_argument_gets_the_closest():
    (problem,) = problems_of("model=lightm_unet", "model.init_filter=8")
    assert problem == (
        "model.init_filter: LightMUNet takes no 'init_filter', did you mean 'init_filters'?"
    )


def test_all_errors_are_told_at_once():
    found = problems_of(
        "train.epochs=0", "train.batch_sise=3", "hardware.device=gpu", "stages=[trian]"
    )
    assert len(found) == 4


@pytest.mark.parametrize("stages", ["[report]", "[train,bench]", "[compress]"])
def test_stages_are_the_first_ones(stages):
    assert "stages: a run stops after one of them: [train" in problems_of(f"stages={stages}")[0]


def test_a_wrong_type_is_told():
    (problem,) = problems_of("train.epochs=many")
    assert problem.startswith("train.epochs: ")


def test_a_missing_value_is_told():
    (problem,) = problems_of("dataset=image_folder")
    assert problem.startswith("dataset.root: needs a value")


def test_a_value_outside_its_range_is_told():
    assert "train.learning_rate: -1" in problems_of("train.learning_rate=-1")[0]


def test_a_value_that_a_step_refuses_is_told_with_its_key():
    (problem,) = problems_of("compression=prune", "compression.prune.ratio=1.3")
    assert problem.startswith("compression.prune.ratio: 1.3")


def test_a_word_that_is_no_override_is_told():
    with pytest.raises(ConfigError, match="unet: expected key=value"):
        prepare_overrides(["model=unet", "unet"], OPTIONS)


def test_the_first_word_may_be_a_verb():
    verbs = ("run", "compare")
    assert split_verb(["compare", "outputs"], verbs) == ("compare", ["outputs"])
    assert split_verb(["model=unet"], verbs) == ("run", ["model=unet"])
    assert split_verb(["--help"], verbs) == ("run", ["--help"])
    assert split_verb([], verbs) == ("run", [])


def test_a_misspelt_verb_gets_the_closest():
    with pytest.raises(MedliteError, match=r"'compair' is not a verb .* 'compare'"):
        split_verb(["compair"], ("run", "compare"))


def test_a_users_own_options_are_found(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("_target_: builtins.dict\n")
    directories = [conf_directory(), *user_directories(["--config-dir", str(tmp_path)])]
    options = find_options(directories)
    assert "mine" in options["model"]
    words = prepare_overrides(["--config-dir", str(tmp_path), "model=mine"], options)
    assert words == ["--config-dir", str(tmp_path), "model=mine"]
    assert model_config("mine", directories) == {"_target_": "builtins.dict"}


def test_no_words_name_no_directories():
    assert user_directories([]) == []
    assert user_directories(["--config-dir=mine"]) == [Path("mine")]


def test_an_unknown_teacher_is_refused():
    with pytest.raises(ConfigError, match="no model 'unte', did you mean 'unet'"):
        model_config("unte", [conf_directory()], key="teacher")


def test_a_target_that_does_not_exist_is_told():
    with pytest.raises(ConfigError, match=r"no module 'medlite\.modles\.unet'"):
        locate("medlite.modles.unet.UNet")
    with pytest.raises(ConfigError, match="did you mean 'digest'"):
        locate("medlite.config.digets")


def test_build_passes_only_what_a_constructor_takes():
    node = {"_target_": "fractions.Fraction", "numerator": 3}
    assert build(node, denominator=4, image_size=(1, 2)) == 0.75


def takes_anything(*, width, **arguments):
    return width, arguments


def test_a_constructor_with_free_keywords_is_told_channels_and_classes_only():
    node = {"_target_": f"{__name__}.takes_anything", "width": 8}
    built = build(node, in_channels=1, num_classes=2, image_size=(4, 4), spatial_dims=2)
    assert built == (8, {"in_channels": 1, "num_classes": 2})


def test_the_key_knows_order_and_ignores_where_results_go():
    base = checked("compression=[prune,qat]")
    assert base.key == checked("compression=[prune,qat]", "logger=none", "outputs=elsewhere").key
    assert base.key != checked("compression=[prune,qat]", "seed=1").key
    assert base.key != checked("compression=[distill,prune,qat]").key


def test_margins_are_a_group_of_options_and_default_to_those_of_the_code():
    assert checked().safety == SafetyMargins()
    assert checked("safety=strict").safety.specificity_drop == 0.02
    assert checked("safety=research", "safety.metric_drop=0.03").safety.metric_drop == 0.03
    assert checked("safety=strict").resolved["safety"]["class_score_drop"] == 0.02


def test_enforcing_the_gate_changes_nothing_of_the_key():
    assert checked("safety.enforce=true").safety.enforce
    assert checked("safety.enforce=true").key == checked().key
    assert checked("safety=strict").key != checked().key


def test_margins_come_by_name_or_from_a_file(tmp_path):
    directories = [conf_directory()]
    assert margins_config("default", directories) == SafetyMargins()
    (tmp_path / "mine.yaml").write_text("metric_drop: 0.04\n")
    mine = margins_config(str(tmp_path / "mine.yaml"), directories)
    assert mine == SafetyMargins(metric_drop=0.04)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("strickt", "safety: no safety 'strickt', did you mean 'strict'"),
        ("nowhere.yaml", "safety: no file nowhere.yaml"),
    ],
)
def test_margins_that_do_not_exist_are_told(name, text):
    with pytest.raises(ConfigError, match=re.escape(text)):
        margins_config(name, [conf_directory()])


def test_a_file_of_margins_with_another_key_is_told(tmp_path):
    (tmp_path / "mine.yaml").write_text("metric_dorp: 0.04\n")
    with pytest.raises(ConfigError, match=r"metric_dorp: unknown, did you mean 'metric_drop'"):
        margins_config(str(tmp_path / "mine.yaml"), [conf_directory()])


def test_digest_does_not_depend_on_the_order_of_keys():
    assert digest({"a": 1, "b": [1, 2]}) == digest({"b": [1, 2], "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})


def run_medlite(*arguments):
    return subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "medlite", *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent.parent,
    )


@pytest.mark.parametrize("arguments", [["--help"], ["--cfg", "job"]])
def test_help_and_config_import_nothing_heavy(arguments):
    done = run_medlite(*arguments)
    assert done.returncode == 0, done.stderr[-500:]
    imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines() if "|" in line}
    assert not imported & {"torch", "numpy", "pandas", "wandb", "lightning", "monai", "timm"}


def test_help_lists_groups_options_verbs_and_examples():
    text = run_medlite("--help").stdout
    assert "lightm_unet" in text
    assert "compression:" in text
    assert "compare" in text
    assert text.count("python -m medlite") >= 4


def test_a_mistake_exits_with_2_and_no_traceback():
    done = run_medlite("modle=unet")
    assert done.returncode == 2
    assert "did you mean 'model'?" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["seeds=0"], "seeds=0: expected how many seeds, a whole number from 1 up"),
        (["seeds=many"], "seeds=many: expected how many seeds"),
        (["seeds=3", "seed=0,1"], "seeds=3 and seed=0,1: give the first seed alone"),
        (["seeds=3", "name=mine"], "name=mine: all seeds would share this directory"),
    ],
)
def test_seeds_are_counted(words, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        expand_seeds(words)


def test_seeds_go_with_other_sweeps_and_are_left_alone_without_the_word():
    words = ["--multirun", "compression=none,ptq", "seeds=2", "train.epochs=1"]
    assert expand_seeds(words) == ["-m", "compression=none,ptq", "train.epochs=1", "seed=0,1"]
    assert expand_seeds(["seed=3"]) == ["seed=3"]


@pytest.mark.parametrize(
    ("word", "text"),
    [
        ("benchmark.num_rounds=1", "1 is below 2"),
        ("benchmark.num_warmup=0", "0 is below 1"),
        ("benchmark.timeout_seconds=0", "0 is not above 0"),
        ("train.learning_rate=0", "0 is not above 0"),
        ("train.learning_rate=nan", "nan is not above 0"),
        ("train.warmup_ratio=1.5", "1.5 is above 1"),
        ("train.warmup_ratio=-0.1", "-0.1 is below 0"),
        ("train.ema_decay=1", "1 is not below 1"),
        ("train.ema_decay=-0.5", "-0.5 is below 0"),
        ("train.early_stopping_patience=0", "0 is below 1"),
        ("hardware.memory_limit_mib=0", "0 is not above 0"),
    ],
)
def test_values_out_of_their_range_are_refused(word, text):
    assert problems_of(word) == (f"{word.partition('=')[0]}: {text}",)


@pytest.mark.parametrize("seed", ["abc", "-1", "1.5", "true", "null"])
def test_a_seed_is_a_whole_number_from_0_up(seed):
    (problem,) = problems_of(f"seed={seed}")
    assert re.match(r"seed: .* is not a whole number from 0 up", problem)


@pytest.mark.parametrize(("word", "is_on"), [("no", False), ("false", False), ("yes", True)])
def test_control_is_a_switch(word, is_on):
    assert checked(f"control={word}").control is is_on


def test_a_control_that_is_no_switch_is_refused():
    assert problems_of("control=maybe") == ("control: 'maybe' is neither true nor false",)


def test_one_stage_may_stand_alone():
    assert checked("stages=train").stages == ("train",)


@pytest.mark.parametrize("stages", ["7", "[1,2]", "null"])
def test_stages_that_are_no_names_are_refused_once(stages):
    (problem,) = problems_of(f"stages={stages}")
    assert problem.startswith("stages: expected names such as [train], got")


def test_a_name_of_digits_is_a_text():
    config = checked("name=7")
    assert (config.name, config.directory) == ("7", Path("outputs/runs/7"))


@pytest.mark.parametrize("word", ["name=", "name=null", "outputs="])
def test_an_empty_name_is_refused(word):
    (problem,) = problems_of(word)
    assert re.match(r"(name|outputs): .* is no name", problem)


def test_a_job_without_a_runtime_is_told_the_runtimes():
    (problem,) = problems_of("runtime=[]")
    assert problem.startswith("runtime: name at least one of executorch, onnxruntime")


def test_a_value_in_place_of_a_section_is_refused():
    (problem,) = problems_of("benchmark=5")
    assert problem == "benchmark: expected settings such as benchmark.num_warmup, got 5"
