"""One module per case: what it measures, and nothing about files or the command line."""
