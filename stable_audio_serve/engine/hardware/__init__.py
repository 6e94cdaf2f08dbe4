"""The device itself: its memory, arenas, captured graphs and threads. Knows no requests."""
