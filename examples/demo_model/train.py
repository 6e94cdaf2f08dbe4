"""Trains the demo model from scratch: `python -m examples.demo_model.train --out FOLDER`.

If the training is interrupted, run the command again to resume. The three stages train the autoencoder, the denoiser
with the text encoder, and the decoder. The result is `FOLDER/checkpoint` in the Stable Audio 3 format. Runs on a CPU or
a GPU.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from examples.demo_model.package import write_checkpoint
from examples.demo_model.train_autoencoder import AutoencoderConfig, train_autoencoder
from examples.demo_model.train_decoder import DecoderTrainingConfig, train_decoder
from examples.demo_model.train_denoiser import DenoiserTrainingConfig, train_denoiser


def main() -> None:
    """Train all stages and write the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for state and checkpoint")
    parser.add_argument("--seed", type=int, default=0, help="for the world, the weights and the noise")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--autoencoder-steps", type=int, default=AutoencoderConfig().steps)
    parser.add_argument("--denoiser-steps", type=int, default=DenoiserTrainingConfig().steps)
    parser.add_argument("--decoder-steps", type=int, default=DecoderTrainingConfig().steps)
    parser.add_argument("--decay-share", type=float, default=DenoiserTrainingConfig().decay_share)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    first = AutoencoderConfig(steps=options.autoencoder_steps, seed=options.seed)
    autoencoder = train_autoencoder(first, options.out, device=options.device)
    second = DenoiserTrainingConfig(steps=options.denoiser_steps, decay_share=options.decay_share, seed=options.seed)
    trainer = train_denoiser(second, autoencoder, folder=options.out, device=options.device)
    third = DecoderTrainingConfig(steps=options.decoder_steps, seed=options.seed)
    train_decoder(third, trainer, autoencoder=autoencoder, device=options.device)
    write_checkpoint(trainer, autoencoder.cpu(), folder=options.out / "checkpoint")


if __name__ == "__main__":
    main()
