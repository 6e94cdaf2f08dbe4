"""vLLM-Omni's audio generation endpoint: `POST /v1/audio/generate`, errors in OpenAI's form."""
