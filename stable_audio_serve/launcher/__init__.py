"""One machine: an embedded Ray from one command to ready and back to nothing. Used by the command line alone."""
