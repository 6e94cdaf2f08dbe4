"""vLLM-Omni's audio generation endpoint: `POST /v1/audio/generate`, with errors in OpenAI's format."""
