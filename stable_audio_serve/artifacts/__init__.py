"""Stored files: finished audio and uploads, under unguessable names."""
