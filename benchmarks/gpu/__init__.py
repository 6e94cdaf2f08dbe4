"""The benchmarks of a GPU, in five parts that can be interrupted: `python -m benchmarks gpu --part N --out DIR`.

Needs only torch, numpy, transformers and safetensors. Models have the published shapes and random weights. On a CPU
the same code runs on tiny checkpoints, which tests the code but gives no meaningful figures.
"""
