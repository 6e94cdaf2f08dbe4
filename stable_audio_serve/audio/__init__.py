"""Processing of audio samples: decoding uploads, resampling, treating peaks, encoding files. No models, no HTTP."""
