"""The Flask API for Stable Audio Open Small: clips of fixed length, loops, style transfer, riffs."""
