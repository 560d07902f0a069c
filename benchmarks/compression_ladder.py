"""The compression ladder on real data: recipes, seeds, and what each costs and loses.

    python benchmarks/compression_ladder.py [--data FOLDER] [--cases NAME ...] [--recipes WORD ...]
                                            [--options WORD ...] [--seeds N ...]
                                            [--outputs FOLDER] [--only-table] [--markdown FILE]

FOLDER holds retinamnist/retinamnist.npz (MedMNIST v2) and wbc_seg (300 white blood cells with
masks, and a csv of classes, Zheng et al. 2018); lidc_nodules comes with a package. Each case is
`experiment=compression_ladder` on one data set and model, by the commands that are printed; jobs
that are done are not done again, so a run can be stopped and shared out. All on one thread; each
speed-up is that of queries of both models in turns. At the end a table of means over the seeds for
each case.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from medlite.errors import RecordError
from medlite.report import compare

CELLS = (
    *("dataset=image_folder", "dataset.root={data}/wbc_seg/dataset1", "dataset.in_channels=3"),
    *("dataset.modality=microscopy", "dataset.group_kind=image", "train.epochs=12"),
)
CELL_CLASSES = (
    *("dataset.csv=../Class_Labels_of_Dataset_1.csv", "dataset.path_column='image ID'"),
    *("dataset.label_column='class label'", "dataset.image_size=[64,64]"),
    "dataset.class_names={1:neutrophil,2:lymphocyte,3:monocyte,4:eosinophil,5:basophil}",
)
CELL_MASKS = (
    *("dataset.task=segmentation", "dataset.image_size=[64,64]"),
    "dataset.mask_classes={0:background,128:cytoplasm,255:nucleus}",
)
RETINA = (
    *("dataset=medmnist", "dataset.flag=retinamnist", "dataset.root={data}/retinamnist"),
    *("dataset.download=false", "train.epochs=12"),
)
NODULES = ("dataset=lidc_nodules", "train.epochs=6")

CASES = {
    "retina-mobilenetv3_small": (*RETINA, "model=mobilenetv3_small"),
    "retina-medmamba_lite": (*RETINA, "model=medmamba_lite"),
    "cells-mobileone_s0": (*CELLS, *CELL_CLASSES, "model=mobileone_s0"),
    "cell_masks-unet": (*CELLS, *CELL_MASKS, "model=unet"),
    "nodules-unet": (*NODULES, "model=unet"),
    "nodules-unet_wide": (*NODULES, "model=unet", "model.features=[32,32,64,128,256,32]"),
    "nodules-ultralight_vm_unet": (*NODULES, "model=ultralight_vm_unet"),
}
COLUMNS = (
    *("metric", "over_control", "rare_sensitivity", "ece"),
    *("p50_ms", "levelled_p50_ms", "speedup", "size_kib", "peak_mib", "safety", "failed"),
)
RECIPES = ("none", "ptq", "qat", "prune", "[prune,qat]", "[distill,prune,qat]")
SHARED = (
    *("hardware=cpu_1_thread", "logger=none", "benchmark.num_queries=100"),
    *("benchmark.throughput_seconds=.2", "benchmark.energy_seconds=0", "robustness.enabled=false"),
    *("shortcuts.enabled=false", "explainability.enabled=false"),
)


def command(case: str, arguments: argparse.Namespace) -> list[str]:
    """The words that run one case."""
    words = [word.format(data=arguments.data) if "{data}" in word else word for word in CASES[case]]
    return [
        *("experiment=compression_ladder", *words, *SHARED),
        f"compression={','.join(arguments.recipes)}",
        *arguments.options,
        f"seed={','.join(map(str, arguments.seeds))}",
        f"outputs={arguments.outputs / case}",
    ]


def main() -> None:
    """Run what is missing, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_data(parser)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES))
    parser.add_argument(
        "--options",
        nargs="+",
        default=[],
        help="further words of the command line, such as compression.prune.ratio=.25,.5,.75",
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--outputs", type=Path, default=Path("outputs/ladder"))
    parser.add_argument("--only-table", action="store_true", help="of the jobs that are done")
    parser.add_argument("--markdown", type=Path)
    arguments = parser.parse_args()
    codes = [
        run_job(command(case, arguments))
        for case in (() if arguments.only_table else arguments.cases)
    ]
    parts = []
    for case in arguments.cases:
        table = arguments.outputs / case / "ladder.md"
        words = (str(arguments.outputs / case), "--over-seeds", "--sort", "compression")
        try:
            compare.main([*words, "--columns", *COLUMNS, "--markdown", str(table)])
        except RecordError as error:
            print(f"{case}: {error}", file=sys.stderr)
        else:
            parts.append(f"## {case}\n\n{table.read_text()}")
    if arguments.markdown:
        arguments.markdown.write_text("\n".join(parts))
    if any(codes) or not parts:
        sys.exit(1)


def add_data(parser: argparse.ArgumentParser) -> None:
    """The folder of real data, by default that of the tests."""
    folder = os.environ.get("MEDLITE_DATA")
    is_needed = not folder and "--only-table" not in sys.argv
    parser.add_argument(
        "--data", type=Path, default=folder, required=is_needed, help="default: $MEDLITE_DATA"
    )


def run_job(words: Sequence[str]) -> int:
    """Run `medlite` with these words, in another process, and return its exit code."""
    print("python -m medlite", shlex.join(words), flush=True)
    return subprocess.run([sys.executable, "-m", "medlite", *words], check=False).returncode


if __name__ == "__main__":
    main()
