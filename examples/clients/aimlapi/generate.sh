#!/usr/bin/env bash
# The AIML API's stable-audio with curl: submit, poll while the status is queued or generating, download.
set -euo pipefail
url=${BASE:-http://localhost:8000}/v2/generate/audio
key="Authorization: Bearer ${AIML_API_KEY:-any}"

value() { sed -E 's/.*"'"$1"'":"([^"]*)".*/\1/'; }

id=$(curl -fsS "$url" -H "$key" -H 'Content-Type: application/json' -d '{
    "model": "stable-audio",
    "prompt": "lo-fi pop hip-hop ambient music",
    "seconds_total": '"${DURATION:-5}"',
    "steps": '"${STEPS:-100}"'
  }' | value id)
while made=$(curl -fsS "$url?generation_id=$id" -H "$key") && grep -qE '"status":"(queued|generating)"' <<<"$made"; do
  sleep "${PAUSE_S:-2}"
done
curl -fsS "$(value url <<<"$made")" -o generated.wav
