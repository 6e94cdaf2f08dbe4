"""Names that operators keep, in the store of a real Ray, as two processes and a head that stops answering see them."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from stable_audio_serve.core.errors import StorageError
from stable_audio_serve.launcher.start_timeouts import load_per_core, start_timeouts
from stable_audio_serve.serving.kept_models import keep
from tests.patience import PATIENCE_S

pytestmark = [pytest.mark.server, pytest.mark.slow]

_SEE = """
import json, os, signal
import psutil, ray
from stable_audio_serve.core.errors import StorageError
from stable_audio_serve.serving.kept_models import keep, kept, read_kept, release
from tests.patience import wait_until

ray.init(address="local", num_cpus=1, include_dashboard=False)

@ray.remote(num_cpus=0)
class Other:
    def kept(self):
        return sorted(kept("audio"))
    def keep(self, model):
        keep(model, application="audio")

def until(expected):
    wait_until(lambda: ray.get(other.kept.remote()) == expected)
    return expected

other = Other.remote()
keep("small/one", application="audio")
keep("tiny", application="audio")
keep("tiny", application="audio")
keep("stranger", application="audio-2")
seen = {"both": until(["small/one", "tiny"])}
release("tiny", application="audio")
release("never", application="audio")
seen["one"] = until(["small/one"])
(head,) = [child for child in psutil.Process().children(recursive=True) if "gcs_server" in child.name()]
head.suspend()
try:
    read_kept("audio")
except StorageError as error:
    seen["away"] = error.message
seen["remembered"] = ray.get(other.kept.remote())
head.resume()
ray.get(other.keep.remote("late"))
seen["again"] = sorted(read_kept("audio"))
print("seen:", json.dumps(seen))
"""


@pytest.mark.chaos  # test_admin.py sees the effect of names every time
def test_names_are_seen_by_every_process_and_remembered_while_the_head_is_away() -> None:
    result = subprocess.run(
        [sys.executable, "-c", _SEE], capture_output=True, text=True, timeout=PATIENCE_S, check=False,
        env=os.environ
        | start_timeouts(load_per_core())
        | {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": os.getcwd()},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    (line,) = (line for line in result.stdout.splitlines() if line.startswith("seen: "))
    assert json.loads(line.removeprefix("seen: ")) == {
        "both": ["small/one", "tiny"],
        "one": ["small/one"],
        "away": "Ray's head does not answer",
        "remembered": ["small/one"],
        "again": ["late", "small/one"],
    }


def test_a_process_without_ray_is_told_so() -> None:
    with pytest.raises(StorageError, match="no connection"):
        keep("tiny", application="audio")
