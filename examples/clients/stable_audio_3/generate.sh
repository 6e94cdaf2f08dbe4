#!/usr/bin/env bash
# The Stable Audio 3 server's API with curl: generate a clip, a variation of it, and a clip by a job.
set -euo pipefail
base=${BASE:-http://localhost:8000}
seconds=${DURATION:-5}

curl -fsS "$base/v1/audio/generations" -H 'Content-Type: application/json' \
  -d '{"prompt": "a 440 Hz sine tone", "duration": '"$seconds"', "seed": 7}' -o tone.wav

curl -fsS "$base/v1/audio/variations" -F audio=@tone.wav -F prompt='an organ playing a 4' -F duration="$seconds" \
  -F init_noise_level=0.7 -o organ.wav

job=$(curl -fsS "$base/jobs" -H 'Content-Type: application/json' -d '{"prompt": "a kick drum", "duration": '"$seconds"'}' |
  sed -E 's/.*"id":"([0-9a-f]+)".*/\1/')
while status=$(curl -fsS "$base/jobs/$job") && grep -qE '"status":"(queued|running)"' <<<"$status"; do
  sleep "${PAUSE_S:-1}"
done
curl -fsS "$base/jobs/$job/audio" -o kick.wav
