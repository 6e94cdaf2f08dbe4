"""What operators ask and do over HTTP: the state of the server, models kept loaded, a rest, dead letters."""
