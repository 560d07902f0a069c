"""An engine without a model, for processes that must start quickly and misbehave on demand."""

import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from medlite.errors import MissingDependency

REFUSAL = "this engine is not installed here"
TROUBLE = "engine trouble"


@dataclass(frozen=True, kw_only=True)
class FakeRuntime:
    name: str = "fake"
    delay_ms: float = 0.0
    ballast_mib: int = 0
    misbehaviour: str = ""
    """"", "refuses", "crashes", "hangs", "crashes late" or "crashes on batches" """
    answer: str = "mean"
    """what the logits hold: "mean", "threads", "cores" or "has torch" """
    log: str = ""
    """a file that gets a line for every query"""
    format: str = field(default="fake", init=False)

    def load(self, artifact, hardware):
        if self.misbehaviour == "refuses":
            raise MissingDependency(REFUSAL)
        if self.misbehaviour == "crashes":
            raise ZeroDivisionError(TROUBLE)
        if self.misbehaviour == "hangs":
            time.sleep(60)
        return FakeSession(self, np.ones(self.ballast_mib * 2**17))

    def describe(self, hardware):
        return {"engine": "fake"}

    def count_operators(self, artifact, hardware):
        return {"int8:Conv": 2, "Add": 3}


class FakeSession:
    def __init__(self, runtime, ballast):
        self.runtime = runtime
        self.ballast = ballast
        self.num_queries = 0

    def __call__(self, images):
        self.num_queries += 1
        os.write(1, b"engines talk on standard output\n")
        if self.runtime.misbehaviour == "crashes late" and self.num_queries > 5:
            raise ZeroDivisionError(TROUBLE)
        if self.runtime.misbehaviour == "crashes on batches" and len(images) > 1:
            raise ZeroDivisionError(TROUBLE)
        if self.runtime.log:
            with Path(self.runtime.log).open("a") as stream:
                stream.write(f"{self.runtime.name}\n")
        time.sleep(self.runtime.delay_ms / 1e3)
        answers = {
            "mean": images.mean(axis=(1, 2, 3)),
            "threads": int(os.environ["OMP_NUM_THREADS"]),
            "cores": len(os.sched_getaffinity(0)),
            "has torch": "torch" in sys.modules,
        }
        return np.full((len(images), 1), 1.0, np.float32) * np.reshape(
            answers[self.runtime.answer], (-1, 1)
        )
