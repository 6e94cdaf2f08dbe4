"""One module or package per foreign dialect: its request to ours, our result to its reply. No generation logic."""
