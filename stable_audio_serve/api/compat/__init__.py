"""One module or package per dialect, an HTTP API that another server defined. They convert requests and responses."""
