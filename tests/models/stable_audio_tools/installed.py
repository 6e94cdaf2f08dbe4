"""Skip tests that need the package stable-audio-tools if it is not installed (`make install-stable-audio-tools`)."""

from __future__ import annotations

import pytest

from stable_audio_serve.models.stable_audio_tools.package import missing_packages

needs_package = pytest.mark.skipif(bool(missing_packages()), reason="stable-audio-tools is not installed")
# Ignores warnings that stable-audio-tools causes with the tested versions of torch.
quiet = pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning", "ignore:.*autocast")
