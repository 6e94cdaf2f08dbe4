"""Dialects: HTTP APIs that other servers defined. Each has a module or package that converts requests and responses."""
