"""Whether a loaded model may serve: golden requests, what they sounded like before, reports of it."""
