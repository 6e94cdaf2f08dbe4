"""The benchmarks of a GPU, in five parts that can be interrupted: `python -m benchmarks gpu --part N --out DIR`.

They need only torch, numpy, transformers and safetensors. Models have the published sizes and random weights. On a CPU
the same code runs with tiny checkpoints, which tests the code but gives no meaningful figures.
"""
