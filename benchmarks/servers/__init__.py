"""The servers that are measured, as child processes, and their replicas."""
