from __future__ import annotations

import torch

from stable_audio_serve.models.config_reader import ConfigReader
from stable_audio_serve.models.oscillator.bank import FRAME_SAMPLES, NUM_CHANNELS
from stable_audio_serve.models.parts import WindowNoise
from stable_audio_serve.models.sa3.autoencoder import AudioAutoencoder
from stable_audio_serve.sampling.noise import SeededNoise


def make_autoencoder() -> AudioAutoencoder:
    torch.manual_seed(3)
    sizes = {"patch_frames": 8, "width": 16, "depth": 1, "latent_dim": 4}
    return AudioAutoencoder(
        ConfigReader(
            {
                "encoder": {"type": "patch_mlp", "config": {"in_channels": NUM_CHANNELS, **sizes}},
                "decoder": {"type": "patch_mlp", "config": {"out_channels": NUM_CHANNELS, **sizes}},
                "bottleneck": {"type": "softnorm", "config": {"dim": 4}},
                "pretransform": {"type": "oscillator_bank", "config": {"frames_per_latent": 8}},
                "latent_dim": 4,
                "downsampling_ratio": 8 * FRAME_SAMPLES,
            }
        )
    ).requires_grad_(False)


def test_decoding_in_windows_equals_decoding_at_once() -> None:
    autoencoder = make_autoencoder()
    halo, hop = autoencoder.decoder_halo_latents, autoencoder.hop
    latents = torch.randn(1, 4, 50, generator=torch.Generator().manual_seed(2))
    noise = SeededNoise(7)
    whole = autoencoder.decode(latents, [WindowNoise(noise, "decode", 0)])
    for start, stop in ((0, 21), (17, 40), (33, 50)):
        part = autoencoder.decode(latents[..., start:stop], [WindowNoise(noise, "decode", start)])
        first = 0 if start == 0 else halo * hop
        last = part.shape[-1] - (0 if stop == 50 else halo * hop)
        expected = whole[..., start * hop + first : start * hop + last]
        torch.testing.assert_close(part[..., first:last], expected, atol=1e-5, rtol=0)
