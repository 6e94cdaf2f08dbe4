"""The servers that are measured: how they are started, and engines that stand in for real ones."""
