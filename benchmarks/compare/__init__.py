"""The `run` case: one list of arrivals to every side in turns, and what became of it. Sides may be in this process, on
one server of ours, or any running server of the five systems.
"""
