"""Network blocks shared by model families: norms, rotary positions, attention, Fourier features."""
