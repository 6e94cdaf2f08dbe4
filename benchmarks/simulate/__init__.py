"""The engine's own scheduling on a virtual clock, with a formula instead of a GPU."""
