"""Stability AI's published times and memory for one H200 GPU, and the operations that each clip needs.

Operations are computed from the networks' dimensions. The ideal time of a clip is the longer one of computing at 790
TFLOP/s, and reading and writing weights and activations at 4.3 TB/s.
"""

from __future__ import annotations

from dataclasses import dataclass

FLOPS = 790e12  # operations per second that an H200 sustains in half precision


@dataclass(frozen=True, slots=True)
class ClipRow:
    """One clip of one model: its operations, its published TensorRT time and peak memory, and our goals.

    The goals are shares of the ideal speed: `alone_share` for one clip at a time, `crowd_share` for eight or more at
    once. None: not published, or no goal.
    """

    model: str  # small, medium or open
    duration_s: float
    step_tflop: float
    clip_tflop: float
    ideal_ms: float
    tensorrt_ms: float | None = None
    peak_gb: float | None = None
    alone_share: float | None = None
    crowd_share: float | None = None

    @property
    def name(self) -> str:
        """The model's name and the duration, such as `small 5 s`."""
        return f"{self.model} {self.duration_s:g} s"


CLIPS = (
    ClipRow("small", 5, 0.118, 1.09, 2.2, tensorrt_ms=17, peak_gb=1.7),
    ClipRow("small", 30, 0.353, 3.48, 4.4, tensorrt_ms=22, peak_gb=1.9, crowd_share=0.35),
    ClipRow("small", 120, 1.295, 12.8, 16.2, tensorrt_ms=44, peak_gb=2.4, alone_share=0.28),
    ClipRow("medium", 5, 0.390, 3.95, 7.1, tensorrt_ms=20, peak_gb=5.1),
    ClipRow("medium", 30, 1.129, 13.8, 17.5, tensorrt_ms=50, peak_gb=5.5, alone_share=0.25, crowd_share=0.42),
    ClipRow("medium", 120, 4.132, 52.0, 65.8, tensorrt_ms=130, peak_gb=6.5, alone_share=0.38),
    ClipRow("medium", 380, 15.93, 187.0, 237.0, tensorrt_ms=430, peak_gb=6.5, alone_share=0.42),
    ClipRow("open", 47, 4.560, 461.0, 584.0, crowd_share=0.45),
)
