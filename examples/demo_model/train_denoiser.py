"""Stage 2 of training the demo model: trains the denoiser and the text encoder together, on captions and latents of the
trained autoencoder. Uses the network classes of the server.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from examples.demo_model import architecture
from examples.demo_model.architecture import COND_DIM, LONGEST_TRAINED_S
from examples.demo_model.clips import Batch, ClipConfig, ClipSource, prefetched
from examples.demo_model.optim import MixedOptimizer
from examples.demo_model.train_autoencoder import Autoencoder
from stable_audio_serve.models.blocks.fourier import ExpoFourier
from stable_audio_serve.models.config_reader import ConfigReader
from stable_audio_serve.models.sa3.config import parse_denoiser
from stable_audio_serve.models.sa3.denoiser import Denoiser

# Highest diffusion time for clips without a caption. At higher times, noise hides the clip, and the empty prompt has to
# mean near silence.
HIGHEST_UNNAMED_T = 0.8


@dataclass(frozen=True, slots=True)
class DenoiserTrainingConfig:
    """The schedule for training the denoiser and the text encoder."""

    steps: int = 6600
    clips: ClipConfig = field(default_factory=ClipConfig)
    ema: float = 0.998
    muon_lr: float = 0.015
    adam_lr: float = 2e-3
    warmup_steps: int = 100
    decay_share: float = 0.5
    seed: int = 0


class Network(nn.Module):
    """The networks that are trained together: text encoder, padding embedding, duration embedding and denoiser."""

    def __init__(self) -> None:
        super().__init__()
        config = architecture.model_config()["model"]["diffusion"]["config"]
        self.text = architecture.build_text_encoder()
        self.padding_embedding = nn.Parameter(0.02 * torch.randn(COND_DIM))
        self.seconds = nn.Sequential(ExpoFourier(256), nn.Linear(256, COND_DIM))
        self.denoiser = Denoiser(parse_denoiser(ConfigReader(config)))
        self._start_near_identity()

    def _start_near_identity(self) -> None:
        """Initialise residual branches with small weights and the outer convolutions with zeros."""
        with torch.no_grad():
            for name, parameter in self.denoiser.named_parameters():
                if name.endswith(("to_out.weight", "ff.ff.2.weight", "to_local_embed.2.weight")):
                    parameter.mul_(0.3)
            self.denoiser.preprocess_conv.weight.zero_()
            self.denoiser.postprocess_conv.weight.zero_()
            self.denoiser.transformer.project_out.weight.mul_(0.3)

    def context(
        self, tokens: Tensor, mask: Tensor, *, seconds: Tensor, bare: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Returns the context (clips, tokens + 1, channels) and the global vector (clips, channels) for the denoiser.

        `tokens` and `mask` (clips, tokens) are captions, and `seconds` (clips,) the durations. Clips marked in `bare`
        (clips,) have zeros at padded positions, like a negative prompt.
        """
        padding: Tensor = self.padding_embedding
        if bare is not None:
            padding = padding * ~bare[:, None, None]
        encoded = self.text(input_ids=tokens, attention_mask=mask.long()).last_hidden_state
        prompt = torch.where(mask[:, :, None], encoded.float(), padding)
        duration = self.seconds((seconds / LONGEST_TRAINED_S).clamp(0.0, 1.0)).float()
        return torch.cat([prompt, duration[:, None]], dim=1), duration


def draw_times(count: int) -> Tensor:
    """Draw diffusion times (count,) for training: half uniform, half from the sampler's schedule, some exactly 1."""
    uniform = torch.rand(count)
    along = torch.sigmoid(8.2 * torch.rand(count) - 2.0)
    times = torch.where(torch.rand(count) < 0.5, uniform, along)
    return torch.where(torch.rand(count) < 0.06, torch.ones(count), times)


def flow_loss(network: Network, batch: Batch) -> Tensor:
    """Returns the rectified-flow loss without padding: the mean squared error to the velocity `noise - data`."""
    bare = torch.rand(len(batch.tokens), device=batch.tokens.device) < 0.06
    context, duration = network.context(batch.tokens, batch.mask, seconds=batch.seconds, bare=bare)
    dropped = torch.rand(len(context), 1, 1, device=context.device) < 0.1
    context = context.masked_fill(dropped, 0.0)
    conditioning = network.denoiser.condition(context, duration, local=batch.local)
    noise = torch.randn_like(batch.latents)
    t = draw_times(len(noise)).to(noise.device)
    t = torch.where(batch.unnamed, HIGHEST_UNNAMED_T * t, t)
    mix = t[:, None, None]
    velocity = network.denoiser(
        (1 - mix) * batch.latents + mix * noise, t, conditioning=conditioning, valid=batch.valid
    )
    error = (velocity.float() - (noise - batch.latents)).square().mean(dim=1)
    return (error * batch.valid).sum() / batch.valid.sum()


class Trainer:
    """Trains a Network, averages its weights, and saves and loads the state of the training."""

    def __init__(self, config: DenoiserTrainingConfig, *, device: str = "cpu") -> None:
        torch.manual_seed(config.seed)
        self.config = config
        self.device = device
        self.network = Network().to(device)
        self.average = {name: value.detach().clone() for name, value in self.network.state_dict().items()}
        self.optimizer = MixedOptimizer(
            [(n, p) for n, p in self.network.named_parameters() if p.requires_grad],
            total_steps=config.steps,
            muon_lr=config.muon_lr,
            adam_lr=config.adam_lr,
            adam_only=("embed_tokens", "project_in", "project_out", "memory_tokens", "global", "timestep", "seconds"),
            warmup_steps=config.warmup_steps,
            decay_share=config.decay_share,
        )
        self.step = 0

    def train_step(self, batch: Batch) -> float:
        """Make one update with a batch. Returns the loss."""
        batch = batch.to(self.device)
        with torch.autocast(self.device, dtype=torch.bfloat16):
            loss = flow_loss(self.network, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step(self.step)
        self.step += 1
        weight = 1.0 - min(self.config.ema, (1.0 + self.step) / (10.0 + self.step))
        with torch.no_grad():
            for name, value in self.network.state_dict().items():
                if value.is_floating_point():
                    self.average[name].lerp_(value, weight)
        return float(loss.detach())

    def save(self, path: Path) -> None:
        """Write the state of the training to a file, atomically."""
        state = {
            "network": self.network.state_dict(),
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
        }
        torch.save(state, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)

    def load(self, path: Path) -> None:
        """Read the state of the training that `save` wrote."""
        state = torch.load(path, weights_only=True, map_location=self.device)
        self.network.load_state_dict(state["network"])
        self.average = state["average"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = int(state["step"])


def train_denoiser(
    config: DenoiserTrainingConfig, autoencoder: Autoencoder, *, folder: Path, device: str = "cpu"
) -> Trainer:
    """Train the denoiser and the text encoder, or resume from `folder/denoiser.pt`. Returns the trainer."""
    trainer = Trainer(config, device=device)
    path = folder / "denoiser.pt"
    if path.exists():
        trainer.load(path)
    source = ClipSource(autoencoder, config.clips, rng=np.random.default_rng((config.seed, 2, trainer.step)))
    torch.manual_seed(config.seed + 17 * trainer.step)
    stop = threading.Event()
    batches = prefetched(source, stop)
    began, start, total = time.monotonic(), trainer.step, 0.0
    while trainer.step < config.steps:
        total += trainer.train_step(next(batches))
        if trainer.step % 100 == 0:
            speed = (time.monotonic() - began) / (trainer.step - start)
            print(f"denoiser step {trainer.step}/{config.steps} loss {total / 100:.4f} {speed:.3f} s/step", flush=True)
            total = 0.0
        if trainer.step % 250 == 0 or trainer.step == config.steps:
            trainer.save(path)
    stop.set()
    return trainer
