"""Routes that belong to no single dialect: health, models, pages, downloads, and a path that two dialects share."""
