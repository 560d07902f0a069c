import copy

import pytest
from fake_run import make_run

from medlite.report.result import write_result


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """Task -> (result, directory) of a finished run; not to be changed."""
    runs = {}
    for task in ("segmentation", "classification"):
        directory = tmp_path_factory.mktemp(task)
        result = make_run(directory, task)
        for artifact in result.artifacts:
            for file in artifact["files"]:
                (directory / file).parent.mkdir(exist_ok=True)
                (directory / file).write_bytes(b"model")
        write_result(result, directory)
        runs[task] = (result, directory)
    return runs


@pytest.fixture
def run(finished):
    """A copy of a finished segmentation run and its directory."""
    result, directory = finished["segmentation"]
    return copy.deepcopy(result), directory
