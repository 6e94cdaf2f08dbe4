"""The compared servers: ours, and what people would run instead. All of them run one model with the engine's executor.
They differ in the order of requests and in which requests share device calls.
"""
