"""Loads models by name as callable networks. Only this folder knows checkpoint formats."""
