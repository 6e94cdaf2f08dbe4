"""The limits of keys as processes that answer requests keep them."""
