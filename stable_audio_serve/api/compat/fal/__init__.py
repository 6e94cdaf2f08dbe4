"""fal's APIs for its model `fal-ai/stable-audio`: queue, synchronous calls, storage and client proxy."""

from stable_audio_serve.api.compat.fal.answers import webhook_body
from stable_audio_serve.api.compat.fal.routes import TAG, build_router
from stable_audio_serve.api.compat.fal.wire import EXPOSED_HEADERS

__all__ = ["EXPOSED_HEADERS", "TAG", "build_router", "webhook_body"]
