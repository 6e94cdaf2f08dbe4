"""Work accepted now and done later: what a job is, where it is kept, who runs it. Knows neither GPUs nor HTTP."""
