"""The data of a job as frozen dataclasses, and the names of its states. Independent of how jobs are stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal, NamedTuple
from urllib.parse import urlsplit

from stable_audio_serve.artifacts.store import StoredFile
from stable_audio_serve.audio.recipe import RecipeSource
from stable_audio_serve.core.generation import GenerationRequest, MadeOn, Role, Section
from stable_audio_serve.core.ids import NO_CLIENT, ClientId, JobId
from stable_audio_serve.core.keys import NO_LIMITS, KeyLimits
from stable_audio_serve.core.sound import AS_IS, PLAIN_WAV, Encoding, Finishing, Peaks

Contract = Literal["sa3", "aiml", "fal", "stability", "elevenlabs"]
State = Literal["queued", "running", "succeeded", "failed", "cancelled"]
Mode = Literal["text-to-audio", "audio-to-audio", "inpainting", "long-piece"]


class JobRef(NamedTuple):
    """Identifies a job. The id alone is not unique.

    Clients may choose ids, and each contract (the HTTP API that a job was submitted with) has its own ids.
    """

    contract: Contract
    client: ClientId
    id: JobId


@dataclass(frozen=True, slots=True)
class JobUpload:
    """The client's source audio, stored as the client sent it. The runner decodes it when it runs the job."""

    file: StoredFile
    role: Role
    max_s: float  # how many seconds are decoded: no more than the model can use
    decoded_bytes: int = 0  # how much memory the decoded samples take
    is_start: bool = False  # whether an inpainting request also uses this audio as its `init_audio`


@dataclass(frozen=True, slots=True)
class JobSpec:
    """What an accepted job should do. Its source audio is in `upload`, not in `request`.

    The id is unique among the jobs of one client in one contract (the HTTP API that the job was submitted with). An id
    that the server chose cannot be guessed.
    """

    id: JobId
    contract: Contract
    model: str  # the model's canonical name
    mode: Mode
    request: GenerationRequest
    encoding: Encoding = PLAIN_WAV
    file_stem: str = "audio"  # file name without suffix; several variations are `<stem>-01.wav`, ... in a ZIP file
    peaks: Peaks = "limit"
    finishing: Finishing = AS_IS
    with_manifest: bool = False  # whether the ZIP file contains a manifest
    with_recipe: bool = False  # whether the audio files contain a recipe
    file_prefix: str = ""  # is put before the file name that a download suggests
    upload: JobUpload | None = None
    # The sections of a long piece, in order; () = not a long piece. `request.duration_s` is then the sum of their
    # durations, `request.seed` the seed of the first section, and the mode long-piece.
    sections: tuple[Section, ...] = ()
    overlap_s: float = 0.0  # each section continues this much of the audio before it
    limits: KeyLimits = NO_LIMITS  # limits of the client's key when the job was added; only for long pieces
    start_within_s: float | None = None  # if the job has not started after this time, it fails with `start_timeout`
    webhook_url: str | None = None
    client: ClientId = NO_CLIENT  # the client that the job belongs to
    id_is_chosen: bool = False  # whether the client chose the id
    is_awaited: bool = False  # whether a request waits for the job, and cancels it if the request ends first
    idempotency_key: str | None = None  # unique among the jobs of one client in one contract
    fingerprint: str = ""  # SHA-256 of the request, to detect another request with the same id or idempotency key
    wire: Mapping[str, Any] = field(default_factory=dict)  # JSON that only the job's HTTP API needs, for its responses

    @property
    def sources(self) -> dict[Role, RecipeSource]:
        """Maps each role of the source audio to its checksum, for the recipe. Empty if there is no source audio."""
        if self.upload is None:
            return {}
        roles: tuple[Role, ...] = ("init", "inpaint") if self.upload.is_start else (self.upload.role,)
        return dict.fromkeys(roles, RecipeSource(sha256=self.upload.file.sha256))

    @property
    def ref(self) -> JobRef:
        return JobRef(self.contract, self.client, self.id)


@dataclass(frozen=True, slots=True)
class JobError:
    """Why a job failed. Clients may see `message`. `code` is a kind from `core.errors`, or `start_timeout`."""

    code: str
    message: str
    field: str | None = None


@dataclass(frozen=True, slots=True)
class FinishedSection:
    """A finished section of a long piece. `number` counts from 1.

    `file` has `num_samples` samples as 32-bit floats. From the second section on, `file` begins with a crossfade,
    which lasts 30 ms and replaces the last 30 ms of the previous section's file.
    """

    number: int
    file: StoredFile
    num_samples: int
    sample_rate_hz: int
    inference_s: float


@dataclass(frozen=True, slots=True)
class JobResult:
    """The output of a job. `file_id` is a random id for links with which the file can be downloaded without a key.

    `different` lists the sections of a long piece that were made differently from the first one, for example by another
    version of this package. Each item is the number of a section, and how it was made.
    """

    file: StoredFile
    file_id: str
    sample_rate_hz: int
    seeds: tuple[int, ...]
    inference_s: float
    different: tuple[tuple[int, MadeOn], ...] = ()


@dataclass(frozen=True, slots=True)
class JobEvent:
    """An event of a job. A job's events have the ids 1, 2, ...

    The messages of the events are the job's log, which the client can read.
    """

    id: int
    at: datetime
    stage: str
    fraction: float
    eta_s: float | None = None
    message: str | None = None
    num_sections: int = 0  # number of finished sections of a long piece


@dataclass(frozen=True, slots=True)
class Lease:
    """The lease of a job: the runner `owner` may run it until the lease expires.

    `fence` is the number of the job's leases so far (a fencing token). The store refuses writes with an older number,
    so a runner that has lost its lease cannot change the job.
    """

    owner: str
    fence: int


@dataclass(frozen=True, slots=True)
class Job:
    """A job as it was stored at one moment. Times are aware datetimes in UTC."""

    spec: JobSpec
    state: State
    created_at: datetime
    started_at: datetime | None = None
    completed_at: datetime | None = None
    attempts: int = 0
    cancel_requested: bool = False
    stage: str = "queued"
    fraction: float = 0.0
    eta_s: float | None = None  # predicted seconds until the end, at the time of the last progress report
    engine_position: int | None = None  # while a running job waits in an engine: number of requests before it
    num_sections: int = 0  # number of finished sections of a long piece
    lease: Lease | None = None  # is set while the job runs
    is_dead_letter: bool = False  # whether the job failed because of the server, so that an operator may retry it
    result: JobResult | None = None
    error: JobError | None = None
    # False if this version of the package cannot parse the stored spec. Then `spec` has only values of table columns.
    is_readable: bool = True

    @property
    def is_over(self) -> bool:
        return self.state in ("succeeded", "failed", "cancelled")


def host_of(url: str) -> str:
    """Return the host of a webhook URL in lower case, to count webhooks by host. Returns '' for an invalid URL."""
    try:
        return (urlsplit(url).hostname or "").rstrip(".")
    except ValueError:
        return ""
