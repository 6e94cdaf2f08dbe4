"""The benchmarks of a GPU, in five parts that can be interrupted: `python -m benchmarks gpu --part N --out DIR`.

Needs torch, numpy, transformers and safetensors only. Models have the published shapes and random weights; on a CPU
the same code runs on tiny checkpoints, which proves the code and measures nothing.
"""
