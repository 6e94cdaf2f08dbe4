"""The values of a job, as frozen dataclasses, and its states. Independent of stores."""

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
    """Identifies a job. An id alone does not, because clients may choose ids, and each contract has its own ids."""

    contract: Contract
    client: ClientId
    id: JobId


@dataclass(frozen=True, slots=True)
class JobUpload:
    """The client's source audio, stored as it was sent. The runner decodes it again."""

    file: StoredFile
    role: Role
    max_s: float  # only this many seconds are decoded, as many as the model can use
    decoded_bytes: int = 0  # memory of the decoded samples


@dataclass(frozen=True, slots=True)
class JobSpec:
    """An accepted job. Its source audio is in `upload`, not in `request`.

    Ids are unique per client and contract. Ids that the client did not choose are unguessable.
    """

    id: JobId
    contract: Contract
    model: str  # canonical name
    mode: Mode
    request: GenerationRequest
    file_format: str = "wav"  # an `audio.encode.AudioFormat`
    file_stem: str = "audio"  # several variations become `<stem>-01.<format>`, ... in `<stem>-batch.zip`
    peaks: Peaks = "limit"
    with_manifest: bool = False  # add a manifest to the ZIP
    with_recipe: bool = False  # add a recipe to the files
    file_prefix: str = ""  # prefix of the stem in the name offered for download
    upload: JobUpload | None = None
    start_within_s: float | None = None  # if not started by then, the job fails with code `start_timeout`
    webhook_url: str | None = None
    client: ClientId = NO_CLIENT  # the owner
    id_is_chosen: bool = False  # the client chose the id
    idempotency_key: str | None = None  # unique per client and contract
    fingerprint: str = ""  # SHA-256 of the request; the same id or key with another fingerprint is a conflict
    wire: Mapping[str, Any] = field(default_factory=dict)  # fields that the dialect needs for its answers; plain JSON

    @property
    def sources(self) -> dict[Role, RecipeSource]:
        """The upload's checksum by its role, empty without an upload."""
        return {self.upload.role: RecipeSource(sha256=self.upload.file.sha256)} if self.upload else {}

    @property
    def ref(self) -> JobRef:
        return JobRef(self.contract, self.client, self.id)


@dataclass(frozen=True, slots=True)
class JobError:
    """Why a job failed. `message` is safe to show. `code` is a kind from `core.errors`, or `start_timeout`."""

    code: str
    message: str
    field: str | None = None


@dataclass(frozen=True, slots=True)
class JobResult:
    """The output of a job. `file_id` is an unguessable name for links that need no key."""

    file: StoredFile
    file_id: str
    sample_rate_hz: int
    seeds: tuple[int, ...]
    inference_s: float


@dataclass(frozen=True, slots=True)
class JobEvent:
    """An event of a job. `id` counts the job's events. Events with a `message` form the log that the client reads."""

    id: int
    at: datetime
    stage: str
    fraction: float
    eta_s: float | None = None
    message: str | None = None


@dataclass(frozen=True, slots=True)
class Lease:
    """The lease of a job by a runner. `fence` counts the job's leases; the store refuses writes with an older fence."""

    owner: str
    fence: int


@dataclass(frozen=True, slots=True)
class Job:
    """A snapshot of a job. Times are in UTC and carry the time zone."""

    spec: JobSpec
    state: State
    created_at: datetime
    started_at: datetime | None = None
    completed_at: datetime | None = None
    attempts: int = 0
    cancel_requested: bool = False
    stage: str = "queued"
    fraction: float = 0.0
    eta_s: float | None = None  # predicted time left, seconds, at the last report
    engine_position: int | None = None  # number of requests before this one, while a running job waits in an engine
    lease: Lease | None = None  # set while the job runs
    is_dead_letter: bool = False  # failed through no fault of its own; an operator may retry it
    result: JobResult | None = None
    error: JobError | None = None
    is_readable: bool = True  # False if this version cannot parse the stored spec: `spec` then has only column values

    @property
    def is_over(self) -> bool:
        return self.state in ("succeeded", "failed", "cancelled")


def host_of(url: str) -> str:
    """Return the host of a webhook URL in lower case, for the limit per host. Returns '' if it cannot be parsed."""
    try:
        return (urlsplit(url).hostname or "").rstrip(".")
    except ValueError:
        return ""
