"""One job runner's life: lease, run, report, sweep."""
