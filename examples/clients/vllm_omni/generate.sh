#!/usr/bin/env bash
# vLLM-Omni's /v1/audio/generate with curl.
set -euo pipefail
base=${BASE:-http://localhost:8000}

curl -fsS "$base/v1/audio/generate" -H 'Content-Type: application/json' -d '{
    "input": "The sound of a hammer hitting a wooden surface",
    "audio_length": '"${DURATION:-5}"',
    "negative_prompt": "Low quality",
    "guidance_scale": 7.0,
    "num_inference_steps": '"${STEPS:-100}"',
    "seed": 42
  }' -o hammer.wav
