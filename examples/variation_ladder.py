"""One take and its variations, each further from it than the one before.

    python variation_ladder.py "a bell in a church" --to "a bell under water" --out ladder/

Low strengths keep most of the take; the last one, 1, ignores it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from stable_audio_serve.client import Client
from stable_audio_serve.core.errors import StableAudioError


def climb(client: Client, arguments: argparse.Namespace) -> None:
    """Write the take and one file for each strength."""
    take = client.generate(arguments.prompt, duration=arguments.duration, seed=arguments.seed)
    print(take.save(arguments.out / "0.00.wav"), flush=True)
    for number in range(1, arguments.rungs + 1):
        strength = number / arguments.rungs
        variation = client.vary(
            take.clips[0],
            arguments.to or arguments.prompt,
            duration=arguments.duration,
            seed=take.seed,  # the same noise on every rung: only the strength differs
            init_noise_level=strength,
        )
        print(variation.save(arguments.out / f"{strength:.2f}.wav"), flush=True)


def main() -> None:
    """Exit code 0 when all files were written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt")
    parser.add_argument("--to", help="prompt of the variations; without it the same")
    parser.add_argument("--rungs", type=int, default=8)
    parser.add_argument("--duration", type=float, default=4.0, help="seconds")
    parser.add_argument("--seed", type=int, default=-1, help="-1 = any")
    parser.add_argument("--out", type=Path, default=Path("ladder"), help="folder of the files")
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
