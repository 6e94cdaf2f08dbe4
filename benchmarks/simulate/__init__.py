"""The engine's own scheduling on a virtual clock, with a formula in place of the GPU."""
