import json
import subprocess
import sys

import pytest
import torch

from medlite.errors import RecordError
from medlite.store import Store, exclusive


def test_an_entry_gives_back_what_was_saved(tmp_path):
    entry = Store(tmp_path).entry("unet", {"seed": 0})
    entry.save({"weight": torch.arange(3)}, {"kept": [1, 2]}, {"seconds": 1.5})
    weights, state = Store(tmp_path).entry("unet", {"seed": 0}).load()
    assert torch.equal(weights["weight"], torch.arange(3))
    assert state == {"kept": [1, 2]}
    assert entry.record() == {"seconds": 1.5}


def test_what_is_made_of_other_things_has_another_entry(tmp_path):
    store = Store(tmp_path)
    assert store.entry("unet", {"seed": 0}).key != store.entry("unet", {"seed": 1}).key


def test_an_entry_without_its_record_is_not_done(tmp_path):
    entry = Store(tmp_path).entry("unet", {})
    entry.save({"weight": torch.zeros(1)}, None, {})
    assert entry.is_done
    (entry.directory / "entry.json").unlink()
    assert not entry.is_done


def test_an_entry_whose_weights_were_deleted_is_made_anew(tmp_path):
    entry = Store(tmp_path).entry("unet", {})
    entry.save({"weight": torch.zeros(1)}, None, {"seconds": 1})
    entry.weights_file.unlink()
    assert not entry.is_done
    entry.save({"weight": torch.ones(1)}, None, {"seconds": 2})
    assert entry.is_done
    assert (entry.load()[0]["weight"], entry.record()) == (torch.ones(1), {"seconds": 2})


def test_weights_are_never_beside_the_record_of_others(tmp_path, monkeypatch):
    entry = Store(tmp_path).entry("unet", {})
    entry.save({}, None, {"seconds": 1})

    def fail(text, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("medlite.store.save_text", fail)
    with pytest.raises(OSError, match="No space left"):
        entry.save({}, None, {"seconds": 2})
    assert not entry.is_done


def test_checkpoints_go_when_the_entry_is_done(tmp_path):
    entry = Store(tmp_path).entry("unet", {})
    entry.fit_directory.mkdir(parents=True)
    (entry.fit_directory / "last.ckpt").write_text("x")
    entry.save({}, None, {})
    assert not entry.fit_directory.exists()


def test_weights_that_hold_code_are_refused(tmp_path):
    entry = Store(tmp_path).entry("unet", {})
    entry.save({}, None, {})
    torch.save({"weights": {}, "state": json.JSONEncoder()}, entry.directory / "weights.pt")
    with pytest.raises(RecordError, match=r"weights\.pt was not loaded"):
        entry.load()


HOLD = """
import sys, time
from pathlib import Path
from medlite.store import exclusive
with exclusive(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_process_in_a_run_directory_is_refused(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout.readline() == "held\n"
        with (
            pytest.raises(RecordError, match=r"another process is working in .* name="),
            exclusive(tmp_path),
        ):
            pass
        holder.kill()
    with exclusive(tmp_path):
        pass
