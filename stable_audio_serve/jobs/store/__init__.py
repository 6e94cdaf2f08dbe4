"""The job database: its tables, its state transitions and all SQL statements."""
