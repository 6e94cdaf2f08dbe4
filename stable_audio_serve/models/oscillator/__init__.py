"""The demo model's autoencoder parts and conditioner."""
