"""The code blocks of the documentation pages, for the tests that run them."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.patience import PATIENCE_S

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
_BLOCK = re.compile(r"^[ ]*```([^\n`]*)\n(.*?)^[ ]*```[ ]*$", flags=re.DOTALL | re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Block:
    """A code block. `page` is the page's path in the repository."""

    page: str
    language: str
    text: str


def pages() -> list[str]:
    """Returns the path of every documentation page in docs/, and of four pages in other folders."""
    found = sorted(path.relative_to(ROOT).as_posix() for path in DOCS.rglob("*.md"))
    return ["README.md", "CONTRIBUTING.md", "examples/README.md", "packaging/client/README.md", *found]


def blocks_of(page: Path) -> Iterator[Block]:
    name = page.relative_to(ROOT).as_posix()
    return (Block(name, match[1].strip(), match[2]) for match in _BLOCK.finditer(page.read_text()))


def all_blocks() -> list[Block]:
    return [block for page in pages() for block in blocks_of(ROOT / page)]


def text_of(page: Path, language: str) -> str:
    """Returns all blocks of one language on a page, joined into one program."""
    return "\n".join(block.text for block in blocks_of(page) if block.language == language)


async def run_program(*command: str, folder: Path, env: Mapping[str, str]) -> str:
    """Run a program that must succeed, in the working directory `folder`. Returns its output."""
    process = await asyncio.create_subprocess_exec(
        *command,
        cwd=folder,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), **env},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(PATIENCE_S):
        output, errors = await process.communicate()
    assert process.returncode == 0, errors.decode()
    return output.decode()
