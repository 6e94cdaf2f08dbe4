"""How the package stable-audio-tools is found and imported."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec

import pytest

from stable_audio_serve.core.catalog import OPEN_FAMILY, SA3_FAMILY
from stable_audio_serve.core.errors import CheckpointError
from stable_audio_serve.models.stable_audio_tools import package
from tests.models.stable_audio_tools.installed import needs_package

IMPORTS = """
import sys
from importlib.util import find_spec
from stable_audio_serve.models.stable_audio_tools.package import import_package
before = {name: find_spec(name) is None for name in ("torchaudio", "torchvision")}
assert import_package().factory.create_model_from_config
assert not [name for name in sys.modules if name.startswith(("torchaudio", "torchvision"))]
assert before == {name: find_spec(name) is None for name in before}
from transformers import AutoTokenizer, T5EncoderModel
"""


def test_missing_packages_are_reported_with_the_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = {"stable_audio_tools", "torchsde"}
    monkeypatch.setattr(package, "find_spec", lambda name: None if name in absent else find_spec("json"))
    with pytest.raises(CheckpointError) as caught:
        package.require_package()
    message = caught.value.message
    assert message.startswith("backend stable_audio_tools needs stable_audio_tools, torchsde, not installed here: ")
    assert message.endswith(f"pip install --no-deps -r {package.REQUIREMENTS}")
    assert package.REQUIREMENTS.is_file()


def test_the_package_builds_one_family_only() -> None:
    package.require_open_family(OPEN_FAMILY)
    with pytest.raises(CheckpointError, match=f"family {OPEN_FAMILY}, this is {SA3_FAMILY}"):
        package.require_open_family(SA3_FAMILY)


@pytest.mark.server
def test_finding_the_package_imports_no_torch() -> None:
    code = (
        "import sys; from stable_audio_serve.models.stable_audio_tools.package import missing_packages; "
        "missing_packages(); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@needs_package
@pytest.mark.server
@pytest.mark.slow
def test_replacement_modules_are_removed_after_the_import() -> None:
    subprocess.run([sys.executable, "-c", IMPORTS], check=True)
