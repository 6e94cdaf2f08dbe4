"""The Stable Audio Open family, driven by a checkpoint's own `model_config.json`."""
