"""Run the server on one machine with an embedded Ray, from start to stop. Only the command line uses this package."""
