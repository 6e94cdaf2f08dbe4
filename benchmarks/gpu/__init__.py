"""A benchmark for the first run on a CUDA device. Needs only torch, numpy, transformers and safetensors."""
