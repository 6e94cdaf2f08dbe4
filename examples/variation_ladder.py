"""Generate a clip and variations of it with rising strength.

    python variation_ladder.py "a bell in a church" --to "a bell under water" --out ladder/

A low strength keeps most of the clip. The last variation has strength 1, which ignores the clip.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from stable_audio_serve.client import Client
from stable_audio_serve.core.errors import StableAudioError


def climb(client: Client, arguments: argparse.Namespace) -> None:
    """Write the first clip, then one variation for each strength."""
    result = client.generate(arguments.prompt, duration=arguments.duration, seed=arguments.seed)
    print(result.save(arguments.out / "0.00.wav"), flush=True)
    for number in range(1, arguments.rungs + 1):
        strength = number / arguments.rungs
        variation = client.vary(
            result.clips[0],
            arguments.to or arguments.prompt,
            duration=arguments.duration,
            seed=result.seed,  # each variation has the same noise, so that only the strength differs
            init_noise_level=strength,
        )
        print(variation.save(arguments.out / f"{strength:.2f}.wav"), flush=True)


def main() -> None:
    """Run the program. The exit code is 0 if all files were written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt")
    parser.add_argument("--to", help="prompt of the variations; default: the same prompt")
    parser.add_argument("--rungs", type=int, default=8, help="number of variations")
    parser.add_argument("--duration", type=float, default=4.0, help="seconds")
    parser.add_argument("--seed", type=int, default=-1, help="-1 = any")
    parser.add_argument("--out", type=Path, default=Path("ladder"), help="output folder")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    with Client() as client:
        climb(client, arguments)


if __name__ == "__main__":
    try:
        main()
    except (StableAudioError, OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
