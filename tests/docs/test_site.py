"""The website builds from docs/ without warnings, links every page, and loads nothing from other hosts."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from bs4 import BeautifulSoup

from tests.docs.blocks import DOCS, ROOT, pages

pytestmark = [pytest.mark.server, pytest.mark.slow]

PAGES = {path.relative_to(DOCS).with_suffix("").as_posix() for path in DOCS.rglob("*.md")}

# HTML element -> the attribute with an address that browsers load without a click.
LOADS = {
    "script": "src",
    "img": "src",
    "link": "href",
    "iframe": "src",
    "source": "src",
    "audio": "src",
    "video": "src",
}


def build(source: Path, target: Path) -> subprocess.CompletedProcess[str]:
    """Build the site as `make site` does."""
    command = [sys.executable, "-m", "sphinx", "--quiet", "--fail-on-warning", "--keep-going", "-b", "html"]
    return subprocess.run(
        [*command, "-d", str(target / "read"), str(source), str(target / "site")],
        capture_output=True,
        text=True,
        check=False,
    )


@dataclass(frozen=True, slots=True)
class Site:
    """The built website. By page: `loads` are addresses that a browser loads, `links` link targets, `anchors` ids."""

    folder: Path
    loads: dict[Path, set[str]]
    links: dict[Path, set[str]]
    anchors: dict[Path, set[str]]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    target = tmp_path_factory.mktemp("docs")
    built = build(DOCS, target)
    assert built.returncode == 0, built.stderr
    site = Site(target / "site", {}, {}, {})
    for path in site.folder.rglob("*.html"):
        page = BeautifulSoup(path.read_text(), "html.parser")
        site.loads[path] = {str(tag[key]) for name, key in LOADS.items() for tag in page.find_all(name, {key: True})}
        site.links[path] = {str(link["href"]) for link in page.find_all("a", href=True)}
        site.anchors[path] = {str(tag["id"]) for tag in page.find_all(id=True)}
    return site


def broken(site: Site, page: Path, addresses: set[str]) -> list[str]:
    """Returns the addresses on a page that point to a file or an anchor that the site does not have."""
    found = []
    for address in addresses:
        parts = urlsplit(address)
        target = Path(os.path.normpath(page.parent / unquote(parts.path))) if parts.path else page
        anchor = unquote(parts.fragment)
        if not parts.scheme and not (
            target.is_file() and (not anchor or target.suffix != ".html" or anchor in site.anchors[target])
        ):
            found.append(address)
    return found


def test_menu_leads_to_every_page(site: Site) -> None:
    assert {f"{page}.html" for page in PAGES - {"index"}} <= site.links[site.folder / "index.html"]


def test_links_and_anchors_exist(site: Site) -> None:
    assert sum(len(links) for links in site.links.values()) > 500
    assert {page.name: links for page in site.links if (links := broken(site, page, site.links[page]))} == {}


@pytest.mark.parametrize("page", [page for page in pages() if not page.startswith("docs/")])
def test_links_of_other_pages_lead_to_files(page: str) -> None:
    addresses = [urlsplit(link) for link in re.findall(r"\]\(([^)\s]+)\)", (ROOT / page).read_text())]
    paths = [address.path for address in addresses if not address.scheme]
    assert [path for path in paths if not ((ROOT / page).parent / path).exists()] == []


def test_nothing_is_loaded_from_other_hosts(site: Site) -> None:
    assert all(site.loads.values())
    for page, addresses in site.loads.items():
        assert [address for address in addresses if urlsplit(address).netloc] == []
        assert broken(site, page, addresses) == []
    styles = [path.read_text() for path in site.folder.rglob("*.css")]
    fetched = [url for style in styles for url in re.findall(r"url\(\s*[\"']?([^)\"']+)|@import", style)]
    assert [url for url in fetched if not url.startswith(("data:", "#"))] == []


@pytest.mark.parametrize(("stem", "page"), [("presign", "settings"), ("backlog", "operations"), ("inpaint", "clients")])
def test_search_finds_words_of_the_pages(site: Site, stem: str, page: str) -> None:
    text = (site.folder / "searchindex.js").read_text()  # the index is a script, so that search works without a server
    index = json.loads(text.removeprefix("Search.setIndex(").rstrip(");\n"))
    found = index["terms"][stem]
    assert page in {index["docnames"][number] for number in (found if isinstance(found, list) else [found])}


def test_broken_link_fails_the_build(tmp_path: Path) -> None:
    source = tmp_path / "docs"
    source.mkdir()
    (source / "conf.py").write_text((DOCS / "conf.py").read_text())
    (source / "index.md").write_text(
        "# Index\n\n[a](no-page.md) [b](#no-anchor) ![c](no-image.png)\n\n```{toctree}\nno-entry\n```\n"
    )
    (source / "forgotten.md").write_text("# Forgotten\n")
    built = build(source, tmp_path)
    assert built.returncode != 0
    for wrong in ("no-page", "no-anchor", "no-image.png", "no-entry", "forgotten.md: WARNING: document isn't included"):
        assert wrong in built.stderr
