"""The demo model: its procedural sound world, training and evaluation. The package has its checkpoint."""
