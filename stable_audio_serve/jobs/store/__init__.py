"""The job database: tables, transitions and every statement."""
