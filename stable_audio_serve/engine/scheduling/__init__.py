"""Decides which rows step together and predicts what that costs. Pure bookkeeping, except for memory measurements."""
