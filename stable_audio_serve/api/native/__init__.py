"""The native API: the contract of the Stable Audio 3 FastAPI server, with extensions."""
