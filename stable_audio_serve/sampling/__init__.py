"""Noise schedules, samplers, guidance and random noise. A clip's result does not depend on the rest of its batch."""
