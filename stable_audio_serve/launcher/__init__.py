"""Run the server on one machine with an embedded Ray, from start to stop. Only `cli` and `doctor` use this package."""
