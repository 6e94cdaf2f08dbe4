"""Decides which clips are denoised together, and predicts times and memory. Runs the model only to measure memory."""
