"""One device's work: which rows step together, the step loop, decode windows, cancellation. No Ray, no HTTP."""
