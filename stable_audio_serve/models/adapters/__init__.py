"""Adapters (LoRA and its relatives): find and read their files, fit them to a network, fold chains, apply them."""
