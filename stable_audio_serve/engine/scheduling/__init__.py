"""Which rows step together and what that costs. Knows no tensors but those it measures."""
