"""Schedules, samplers as plans, guidance and noise: row-independent tensor maths that can be checked against papers."""
