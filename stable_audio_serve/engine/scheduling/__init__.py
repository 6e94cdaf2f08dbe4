"""Decides which rows step together, and predicts times and memory. Runs no model, except to measure its memory."""
