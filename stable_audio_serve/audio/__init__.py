"""Everything that knows what a sample is: decoding uploads, resampling, encoding files. No models, no HTTP."""
