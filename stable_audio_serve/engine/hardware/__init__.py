"""The device: its memory, arenas, captured graphs and threads. Independent of requests."""
