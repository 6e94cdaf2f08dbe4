"""Bytes at rest: finished audio and stored uploads, under names nobody can guess."""
