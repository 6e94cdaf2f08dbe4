"""The Stable Audio Open family, built from a checkpoint's `model_config.json`."""
