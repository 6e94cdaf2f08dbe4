#!/usr/bin/env bash
# fal's queue with curl: submit, poll until COMPLETED, get the result, download its file.
set -euo pipefail
queue=${BASE:-http://localhost:8000}/queue/fal-ai/stable-audio
key="Authorization: Key ${FAL_KEY:-any}"

value() { sed -E 's/.*"'"$1"'":"([^"]*)".*/\1/'; }

id=$(curl -fsS "$queue" -H "$key" -H 'Content-Type: application/json' -d '{
    "prompt": "128 BPM tech house drum loop",
    "seconds_total": '"${DURATION:-5}"',
    "steps": '"${STEPS:-100}"'
  }' | value request_id)
while status=$(curl -fsS "$queue/requests/$id/status" -H "$key") && ! grep -q '"status":"COMPLETED"' <<<"$status"; do
  sleep "${PAUSE_S:-2}"
done
result=$(curl -fsS "$queue/requests/$id" -H "$key")
curl -fsS "$(value url <<<"$result")" -o loop.wav
