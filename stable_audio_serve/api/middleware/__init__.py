"""What every request passes before its route: limits, origins, keys, its log line, and a server that stops."""
