"""The path prefix of each dialect."""

NAMES = ("sa3", "saos", "vllm", "aiml", "fal", "stability", "elevenlabs")
PREFIXES = tuple(f"/{name}" for name in NAMES)
PATTERN = f"(?:{'|'.join(PREFIXES)})"  # a regular expression that matches a prefix
