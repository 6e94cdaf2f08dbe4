"""The device: how its memory is divided and addressed, captured CUDA graphs, copies, and CPU threads."""
