"""Routes outside a single dialect: health, models, pages, downloads, and the path that two dialects share."""
