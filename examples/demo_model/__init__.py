"""Trains and evaluates the demo model on synthesised sounds. The trained checkpoint is in stable_audio_serve/demo."""
