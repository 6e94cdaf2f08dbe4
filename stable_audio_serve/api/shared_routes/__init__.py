"""Routes that belong to no single dialect: health and models, pages, downloads, the path that two dialects share."""
