"""Simulates the engine's scheduling on a virtual clock, with a formula for the times of a GPU."""
