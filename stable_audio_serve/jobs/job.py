"""What a job is: frozen value objects and the states it can be in. Knows nothing of stores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal, NamedTuple
from urllib.parse import urlsplit

from stable_audio_serve.artifacts.store import StoredFile
from stable_audio_serve.audio.recipe import RecipeSource
from stable_audio_serve.core.generation import GenerationRequest, Role
from stable_audio_serve.core.ids import NO_CLIENT, ClientId, JobId
from stable_audio_serve.core.sound import Peaks

Contract = Literal["sa3", "aiml", "fal"]
State = Literal["queued", "running", "succeeded", "failed", "cancelled"]
Mode = Literal["text-to-audio", "audio-to-audio", "inpainting"]


class JobRef(NamedTuple):
    """Which job. Its id alone does not say that: several clients may choose the same one, and so may two contracts."""

    contract: Contract
    client: ClientId
    id: JobId


@dataclass(frozen=True, slots=True)
class JobUpload:
    """The client's own file that a job starts from, as it was sent; decoded again when the job runs."""

    file: StoredFile
    role: Role
    max_s: float  # what the model can use of it, seconds
    decoded_bytes: int = 0  # memory its samples take


@dataclass(frozen=True, slots=True)
class JobSpec:
    """What was accepted. `request` carries no audio; `upload` names it.

    Ids are unique per client and contract; unguessable, unless the client chose them.
    """

    id: JobId
    contract: Contract
    model: str  # canonical name
    mode: Mode
    request: GenerationRequest
    file_format: str = "wav"  # of `audio.encode.AudioFormat`
    file_stem: str = "audio"  # several variations become `<stem>-01.<format>`, ... in `<stem>-batch.zip`
    peaks: Peaks = "limit"
    with_manifest: bool = False  # in the ZIP
    with_recipe: bool = False  # in its files
    file_prefix: str = ""  # what the name offered for download has before the stem
    upload: JobUpload | None = None
    start_within_s: float | None = None  # not started by then = failed with code `start_timeout`
    webhook_url: str | None = None
    client: ClientId = NO_CLIENT  # whose it is
    id_is_chosen: bool = False  # by the client
    idempotency_key: str | None = None  # unique per client and contract
    fingerprint: str = ""  # SHA-256 of what was asked: another one for the same id or key is a conflict
    wire: Mapping[str, Any] = field(default_factory=dict)  # what the dialect needs again later; plain JSON

    @property
    def sources(self) -> dict[Role, RecipeSource]:
        """The file it starts from, by what that is for."""
        return {self.upload.role: RecipeSource(sha256=self.upload.file.sha256)} if self.upload else {}

    @property
    def ref(self) -> JobRef:
        """Which job this is."""
        return JobRef(self.contract, self.client, self.id)


@dataclass(frozen=True, slots=True)
class JobError:
    """Why a job failed; `message` is safe to show. `code` is a kind of `core.errors`, or `start_timeout`."""

    code: str
    message: str
    field: str | None = None


@dataclass(frozen=True, slots=True)
class JobResult:
    """What a job made. `file_id` is an unguessable name for links that need no key."""

    file: StoredFile
    file_id: str
    sample_rate_hz: int
    seeds: tuple[int, ...]
    inference_s: float


@dataclass(frozen=True, slots=True)
class JobEvent:
    """Something that happened to a job; `id` counts its events. Those with a `message` are the log its client reads."""

    id: int
    at: datetime
    stage: str
    fraction: float
    eta_s: float | None = None
    message: str | None = None


@dataclass(frozen=True, slots=True)
class Lease:
    """Who runs a job; `fence` counts the leases of the job, and a write with an older one is refused."""

    owner: str
    fence: int


@dataclass(frozen=True, slots=True)
class Job:
    """A job as it is now; times are aware, in UTC."""

    spec: JobSpec
    state: State
    created_at: datetime
    started_at: datetime | None = None
    completed_at: datetime | None = None
    attempts: int = 0
    cancel_requested: bool = False
    stage: str = "queued"
    fraction: float = 0.0
    eta_s: float | None = None  # predicted time to its end, seconds, when last reported
    engine_position: int | None = None  # of a running job that waits in an engine: how many requests are before it
    lease: Lease | None = None  # of a running job
    is_dead_letter: bool = False  # failed through no fault of its own; an operator may retry it
    result: JobResult | None = None
    error: JobError | None = None
    is_readable: bool = True  # if not, another version wrote it, and `spec` holds only what the columns tell

    @property
    def is_over(self) -> bool:
        """Whether it is in a final state."""
        return self.state in ("succeeded", "failed", "cancelled")


def host_of(url: str) -> str:
    """Lower-case host of a webhook for the per-host limit, '' if it cannot be parsed."""
    try:
        return (urlsplit(url).hostname or "").rstrip(".")
    except ValueError:
        return ""
