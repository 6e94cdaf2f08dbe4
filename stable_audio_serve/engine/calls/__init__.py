"""The state of requests and clips on the engine thread, and the device calls that generate the clips."""
