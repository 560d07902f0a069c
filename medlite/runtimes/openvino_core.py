"""The one `openvino.Core` of a process."""

from __future__ import annotations

import functools
from typing import Any


@functools.cache
def openvino_core() -> Any:
    """The `openvino.Core` that everything here shares, and that lives as long as the process.

    Its CPU plugin gives the thread that loads it another stack for signal handlers, and frees that
    stack when the last core goes, on whichever thread that happens (OpenVINO 2026.4). Where it is
    another thread, the next signal, such as the end of a data loader's process or Ctrl-C, ends the
    whole process with a segmentation fault.
    """
    import openvino

    return openvino.Core()
