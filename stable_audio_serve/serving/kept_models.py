"""Which models operators keep loaded: at least one replica each, whatever the load, until they let them go.

All ingress replicas write the names and the autoscaling policy reads them. They lie where `notes` are: a server that is
started anew begins with what its configuration says.
"""

from __future__ import annotations

from stable_audio_serve.serving import notes

_HEADING = "kept"


def keep(model: str, *, application: str) -> None:
    """Keep one replica of the model until `release`. Blocking, two seconds at most. Raises StorageError."""
    notes.note(_HEADING, model, application=application)


def release(model: str, *, application: str) -> None:
    """Keep the model no longer. Blocking, two seconds at most. Raises StorageError."""
    notes.erase(_HEADING, model, application=application)


def read_kept(application: str) -> frozenset[str]:
    """Returns the names of the models that are kept. Blocking, two seconds at most. Raises StorageError."""
    return notes.read(_HEADING, application=application)


def kept(application: str) -> frozenset[str]:
    """Returns `read_kept` as it was half a second ago, without waiting; empty at the first call of a process."""
    return notes.watched(_HEADING, application=application) or frozenset()
