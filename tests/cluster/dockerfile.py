"""Parse a Dockerfile into build stages with their base images and instructions."""

from __future__ import annotations

import re
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction, with its continuation lines joined by spaces."""

    name: str
    words: str


@dataclass(frozen=True, slots=True)
class Stage:
    """A build stage: the instructions from one FROM to the next. `base` is an image or the name of another stage."""

    name: str
    base: str
    instructions: list[Instruction] = field(default_factory=list)


def parse(text: str) -> dict[str, Stage]:
    """Returns the build stages by name.

    Raises ValueError for an unnamed stage or an instruction before the first FROM.
    """
    stages: dict[str, Stage] = {}
    stage: Stage | None = None
    lines = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    for line in re.sub(r"\\\n\s*", " ", lines).splitlines():
        if not line.strip():
            continue
        name, _, words = line.strip().partition(" ")
        if name == "FROM":
            found = re.fullmatch(r"(\S+) AS (\S+)", words)
            if found is None:
                raise ValueError(f"a stage without a name: {line}")
            stage = stages[found[2]] = Stage(found[2], found[1])
        elif stage is None:
            raise ValueError(f"before the first stage: {line}")
        else:
            stage.instructions.append(Instruction(name, re.sub(r"\s+", " ", words.strip())))
    return stages


def inherited(stages: dict[str, Stage], name: str) -> list[Instruction]:
    """Returns the instructions of the stages that the stage `name` is based on, and then its own instructions."""
    stage = stages[name]
    return [*(inherited(stages, stage.base) if stage.base in stages else []), *stage.instructions]


def root_image(stages: dict[str, Stage], name: str) -> str:
    """Returns the image on which the stage `name` is based, directly or through other stages of the Dockerfile."""
    base = stages[name].base
    return root_image(stages, base) if base in stages else base
