"""Adapters (LoRA and its relatives): reading files, fitting them to a network, folding chains, and applying them."""
