"""Runs the server on one machine with an embedded Ray, from start to stop. Used only by the command line."""
