"""What a step costs the host and how many kernels it starts, counted without a GPU."""
