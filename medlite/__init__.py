"""medlite: which light model, compressed how, on which runtime, is good enough here."""

import sys

# OpenVINO and NNCF tell Google Analytics of their use wherever this package can be imported: what
# looks at patients' images tells nobody anything.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]

__version__ = "0.3.0"
