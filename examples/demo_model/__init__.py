"""The demo model: procedural training sounds, training and evaluation. The package contains the checkpoint."""
