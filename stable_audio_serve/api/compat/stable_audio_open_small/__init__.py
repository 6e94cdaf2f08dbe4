"""The dialect of the Flask API for Stable Audio Open Small: clips of one window, loops, style transfer, riffs."""
