"""One module or package per foreign dialect. It converts requests and responses and has no generation logic."""
