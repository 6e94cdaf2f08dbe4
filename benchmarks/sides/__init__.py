"""The compared servers: our engine and its alternatives.

All of them run the model with the engine's executor. They differ in the order of requests, and in which requests share
device calls.
"""
