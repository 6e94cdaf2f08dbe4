"""Tests against the package itself, which `make install-stable-audio-tools` installs."""

from __future__ import annotations

import pytest

from stable_audio_serve.models.stable_audio_tools.package import missing_packages

needs_package = pytest.mark.skipif(bool(missing_packages()), reason="stable-audio-tools is not installed")
# Of the package, with the versions of torch that we use.
quiet = pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning", "ignore:.*autocast")
