"""The Stable Audio 3 family: SAME autoencoder, conditioners, diffusion transformer."""
