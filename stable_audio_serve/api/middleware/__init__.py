"""Checks that every request passes before its route: limits, origins, keys, logging, draining."""
