from __future__ import annotations

import functools

import typer.testing

# Build the tree of all commands once per process. Typer's `CliRunner` builds it for each call, in 50 ms of CPU time.
typer.testing._get_command = functools.cache(typer.testing._get_command)
