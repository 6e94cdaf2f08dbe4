"""Files at rest: finished audio and stored uploads, under unguessable names."""
