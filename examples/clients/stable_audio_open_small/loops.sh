#!/usr/bin/env bash
# The Stable Audio Open Small API with curl: a clip, a drum loop, and a style transfer of the clip.
set -euo pipefail
base=${BASE:-http://localhost:8000}

curl -fsS "$base/generate" -H 'Content-Type: application/json' \
  -d '{"prompt": "lo-fi hip-hop beat with pianos 90bpm", "steps": 8, "cfg_scale": 1.0, "seed": 12345}' -o clip.wav

curl -fsS "$base/generate/loop" -F prompt='aggressive techno drums 140bpm' -F loop_type=drums -F bars=4 -F cfg_scale=1.0 -o drums.wav

curl -fsS "$base/generate/style-transfer" -F audio_file=@clip.wav -F prompt='aggressive techno 140bpm' -F style_strength=0.6 -o style.wav
