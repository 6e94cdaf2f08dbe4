"""Our own routes: the contract of the Stable Audio 3 FastAPI server, extended."""
