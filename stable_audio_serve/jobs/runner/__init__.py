"""The job runner: leases jobs, runs them, reports their progress, and deletes old files."""
