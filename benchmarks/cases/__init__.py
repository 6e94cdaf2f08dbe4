"""One module per case. None of them writes files or reads the command line."""
