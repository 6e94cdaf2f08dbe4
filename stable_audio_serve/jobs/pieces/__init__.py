"""Long pieces: jobs whose audio is made of sections, which continue each other."""
