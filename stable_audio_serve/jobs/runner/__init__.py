"""The job runner: leases jobs, runs them, reports progress, sweeps old files."""
