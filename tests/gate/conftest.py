import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "report"))  # fake_run is that of the report's tests
