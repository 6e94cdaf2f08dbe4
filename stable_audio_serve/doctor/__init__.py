"""Checks whether this machine can serve a configuration. Nothing here starts Ray or leaves anything behind."""
