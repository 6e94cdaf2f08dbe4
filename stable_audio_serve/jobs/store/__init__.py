"""The job database: its tables, the state transitions of jobs, and all SQL statements of this package."""
