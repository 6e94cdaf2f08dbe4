"""The servers that are compared: ours, and what people would run instead. All of them run one model through the
engine's own executor; they differ in which requests share its device calls, and when.
"""
