"""Routes for operators: server state, models kept loaded, draining, dead letters."""
