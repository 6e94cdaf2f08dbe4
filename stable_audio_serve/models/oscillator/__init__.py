"""The demo model's autoencoder parts and conditioner, registered by type."""
