"""A table of hostile requests, each sent to every route that it applies to.

Every response has the form of its dialect and arrives soon, and none is a 500. No prompt appears in a log or header.
test_hostile_uploads.py covers hostile audio, and test_fuzz.py generated requests.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import logging
import re
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
import structlog
from fastapi import FastAPI

from tests.audio_files import make_audio_file
from tests.backends import ToneBackend
from tests.patience import PATIENCE_S
from tests.sockets import listening

pytestmark = [pytest.mark.server, pytest.mark.usefixtures("low_rate")]

JSON = {"content-type": "application/json"}
MULTIPART = {"content-type": "multipart/form-data; boundary=B"}
URLENCODED = {"content-type": "application/x-www-form-urlencoded"}
WAV = make_audio_file(duration_s=0.2)
MARK = "zyxwv"  # part of every prompt; must not appear in any log line, header or path
HANG_S = 60.0  # limit for each response


def check_sa3(body: Any) -> None:
    detail = body["detail"]
    assert detail
    if not isinstance(detail, str):
        assert all({"type", "loc", "msg", "input"} <= set(item) for item in detail)


def check_vllm(body: Any) -> None:
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"]
    assert body["error"]["param"]


def check_saos(body: Any) -> None:
    assert body["error"]
    assert isinstance(body["error"], str)


def check_merged(body: Any) -> None:
    check_saos(body)
    assert body["detail"]


def check_aiml(body: Any) -> None:
    assert {"statusCode", "message", "error", "path", "meta"} <= set(body)
    assert body["message"]
    assert all({"path", "message", "code"} <= set(fault) for fault in body["meta"])


def check_stability(body: Any) -> None:
    assert set(body) == {"id", "name", "errors"}
    assert body["errors"]


def check_elevenlabs(body: Any) -> None:
    detail = body["detail"]
    assert detail
    if isinstance(detail, dict):
        assert detail.keys() == {"status", "message"}
    else:
        assert all({"loc", "msg", "type"} == set(item) for item in detail)


def check_fal(body: Any) -> None:
    detail = body["detail"]
    assert detail
    if not isinstance(detail, str):
        assert all({"loc", "msg", "type"} <= set(item) for item in detail)


@dataclass(frozen=True)
class Route:
    """A route with a valid request (`good`) and a check for the body of its error responses."""

    path: str
    check_error: Callable[[Any], None]
    good: dict[str, Any]
    prompt: str = "prompt"
    numbers: tuple[str, ...] = ("duration", "steps", "seed", "cfg_scale")
    file: str | None = None  # form field of the upload; None for JSON routes
    queued: bool = False  # the route only queues the generation
    prompt_end: str = ""  # text without which the route refuses a prompt
    may_be_blank: frozenset[str] = frozenset()  # number fields for which an empty value means unset
    again: bool = False  # reads its body, and answers errors, like an earlier route
    refused: frozenset[int] = field(default=frozenset({400, 413, 422}))

    def json(self, **changes: Any) -> bytes:
        return json.dumps(self.good | changes).encode()

    def raw(self, name: str, literal: bytes) -> bytes:
        """Returns a JSON body in which the text `literal` replaces the value of the field `name`."""
        rest = {key: value for key, value in self.good.items() if key != name}
        return json.dumps(rest).encode().removesuffix(b"}") + b', "' + name.encode() + b'": ' + literal + b"}"

    def expect_refusal(self, reply: httpx.Response) -> None:
        assert reply.status_code in self.refused, (reply.status_code, reply.text[:500])
        assert reply.headers["content-type"] == "application/json"
        assert "Traceback" not in reply.text
        assert "site-packages" not in reply.text
        assert len(reply.content) < 20_000
        self.check_error(reply.json())

    def expect_answer(self, reply: httpx.Response) -> None:
        if reply.status_code not in (200, 202):
            self.expect_refusal(reply)


_SA3 = {"prompt": "rain", "duration": 0.1}
_SA3_INPAINT = {"prompt": "rain", "duration": 1, "inpaint_start_seconds": 0, "inpaint_end_seconds": 0.5}
_SAOS = {"prompt": "rain", "seconds_total": 1}
_SAOS_NUMBERS = ("seconds_total", "steps", "cfg_scale", "seed")
_SAOS_REFUSED = frozenset({400, 413})
_LOOP = {"prompt": "rain 300bpm", "bars": 1}
_LOOP_NUMBERS = ("bars", "steps", "cfg_scale", "seed", "style_strength")
_STABILITY_NUMBERS = ("duration", "seed", "steps", "cfg_scale")
_FAL = {"prompt": "rain", "seconds_total": 1}
_FAL_NUMBERS = ("seconds_total", "seconds_start", "steps")
ROUTES = [
    Route("/v1/audio/generations", check_sa3, _SA3),
    Route("/sa3/generate", check_sa3, _SA3, again=True),
    Route("/v1/audio/variations", check_sa3, _SA3, file="audio"),
    Route("/v1/audio/inpaint", check_sa3, _SA3_INPAINT, file="audio"),
    Route("/jobs", check_sa3, _SA3, queued=True),
    Route("/jobs/variations", check_sa3, _SA3, file="audio", queued=True, again=True),
    Route("/jobs/inpaint", check_sa3, _SA3_INPAINT, file="audio", queued=True, again=True),
    Route(
        "/v1/audio/generate",
        check_vllm,
        {"input": "rain", "audio_length": 0.1},
        prompt="input",
        numbers=("audio_length", "audio_start", "speed", "guidance_scale", "num_inference_steps", "seed"),
        refused=frozenset({400, 413}),
    ),
    Route("/saos/generate", check_saos, _SAOS, numbers=_SAOS_NUMBERS, refused=_SAOS_REFUSED),
    Route("/generate", check_merged, _SAOS, numbers=_SAOS_NUMBERS, refused=_SAOS_REFUSED),
    Route(
        "/saos/generate/loop",
        check_saos,
        _LOOP,
        numbers=_LOOP_NUMBERS,
        refused=_SAOS_REFUSED,
        prompt_end=" 300bpm",
        may_be_blank=frozenset({"bars"}),
    ),
    Route(
        "/generate/loop",
        check_saos,
        _LOOP,
        numbers=_LOOP_NUMBERS,
        refused=_SAOS_REFUSED,
        file="audio_file",
        prompt_end=" 300bpm",
    ),
    Route(
        "/generate/style-transfer",
        check_saos,
        {"prompt": "rain"},
        numbers=("steps", "cfg_scale", "seed", "style_strength"),
        refused=_SAOS_REFUSED,
        file="audio_file",
    ),
    Route(
        "/v2/generate/audio",
        check_aiml,
        {"model": "stable-audio", "prompt": "rain", "seconds_total": 1},
        numbers=("seconds_total", "seconds_start", "steps"),
        refused=frozenset({400, 413}),
        queued=True,
    ),
    Route(
        "/v2beta/audio/stable-audio-2/audio-to-audio",
        check_stability,
        {"prompt": "rain", "duration": 1},
        numbers=_STABILITY_NUMBERS,
        may_be_blank=frozenset(_STABILITY_NUMBERS),
        refused=frozenset({400, 413}),
        file="audio",
    ),
    Route(
        "/v1/sound-generation",
        check_elevenlabs,
        {"text": "rain", "duration_seconds": 0.5},
        prompt="text",
        numbers=("duration_seconds", "prompt_influence"),
        refused=frozenset({413, 422}),
    ),
    Route(
        "/v1/music",
        check_elevenlabs,
        {"prompt": "rain", "music_length_ms": 3000},
        numbers=("music_length_ms", "seed"),
        refused=frozenset({413, 422}),
    ),
    Route("/fal-ai/stable-audio", check_fal, _FAL, numbers=_FAL_NUMBERS, refused=frozenset({413, 422})),
    Route(
        "/queue/fal-ai/stable-audio",
        check_fal,
        _FAL,
        numbers=_FAL_NUMBERS,
        refused=frozenset({413, 422}),
        queued=True,
        again=True,
    ),
]

Request = dict[str, Any]  # arguments of httpx's `post` without the path
Sent = tuple[str, Request]  # a label for the failure message, and the request


def good(route: Route, changes: dict[str, Any] | None = None, *, upload: Any = ("a.wav", WAV)) -> Request:
    """Returns a valid request to the route, with `changes` to its fields."""
    if route.file is None:
        return {"content": route.json(**(changes or {})), "headers": JSON}
    return {"data": route.good | (changes or {}), "files": {route.file: upload}}


def json_bodies(*bodies: bytes) -> Callable[[Route], Iterator[Sent]]:
    def requests(route: Route) -> Iterator[Sent]:
        if route.file is None:
            yield from ((repr(body[:40]), {"content": body, "headers": JSON}) for body in bodies)

    return requests


def prompts(*literals: bytes) -> Callable[[Route], Iterator[Sent]]:
    return lambda route: json_bodies(*(route.raw(route.prompt, literal) for literal in literals))(route)


def numbers(*literals: bytes, most: int | None = None) -> Callable[[Route], Iterator[Sent]]:
    """Returns a function that yields a request for each literal and each number field of the route.

    In the request, the literal replaces the value of the field. `most` is the largest number of fields; None: all.
    """

    def requests(route: Route) -> Iterator[Sent]:
        for name in route.numbers[:most]:
            for literal in literals:
                label = f"{name}={literal[:20]!r}"
                if route.file is None:
                    yield label, {"content": route.raw(name, literal), "headers": JSON}
                elif literal != b'""':  # in a form, an empty field is valid and means unset
                    yield label, good(route, {name: literal.decode().strip('"')})

    return requests


def blank_numbers(route: Route) -> Iterator[Sent]:
    for label, request in numbers(b'""')(route):
        if label.partition("=")[0] not in route.may_be_blank:
            yield label, request


def forms(*bodies: bytes, headers: dict[str, str] = MULTIPART) -> Callable[[Route], Iterator[Sent]]:
    def requests(route: Route) -> Iterator[Sent]:
        if route.file is not None:
            yield from ((repr(body[:60]), {"content": body, "headers": headers}) for body in bodies)

    return requests


def uploads(*contents: bytes) -> Callable[[Route], Iterator[Sent]]:
    def requests(route: Route) -> Iterator[Sent]:
        if route.file is not None:
            yield from ((repr(content[:20]), good(route, upload=("a.wav", content))) for content in contents)

    return requests


def what_json_allows(route: Route) -> Iterator[Sent]:
    body, prompt = route.json(), f'"{route.prompt}": '.encode()
    odd_text = b'"\\ud83c\\udfa7 \xf0\x9f\x8e\xa7 \\u0000 \\u202e' + route.prompt_end.encode() + b'"'
    yield from json_bodies(
        b"\xef\xbb\xbf" + body,
        b" \r\n\t" + body + b"\n ",
        body.replace(prompt, prompt + b'"first", ' + prompt),
        body.removesuffix(b"}") + b', "unknown": {"a": [1, null, {"b": NaN}]}}',
        body.removesuffix(b"}") + b', "": 1, "__proto__": {}, "__class__": 2, "self": 3}',
        route.raw(route.prompt, odd_text),
    )(route)


def many_values(route: Route) -> Iterator[Sent]:
    body = route.json().removesuffix(b"}")
    keys = b",".join(b'"k%d": 1' % number for number in range(12_000))
    yield from json_bodies(
        body + b', "unknown": [' + b"[], " * 12_000 + b"[]]}",
        body + b', "unknown": "\\\\", "loudness": {' + keys + b"}}",
        body + b", " + keys + b"}",
    )(route)


async def _stream(num_bytes: int) -> AsyncIterator[bytes]:
    for _ in range(0, num_bytes, 65536):
        yield bytes(65536)


def too_large(route: Route) -> Iterator[Sent]:
    headers = JSON if route.file is None else URLENCODED
    yield "declared", {"content": bytes(2_000_000), "headers": headers}
    yield "streamed", {"content": _stream(2_000_000), "headers": headers}


def lying_lengths(route: Route) -> Iterator[Sent]:
    content, headers = (route.json(), JSON) if route.file is None else (b"--B--\r\n", MULTIPART)
    for length in ("-1", "1e3", "0x10", "99999999999999999999999", "", "+5", "ten"):
        yield length, {"content": content, "headers": headers | {"content-length": length}}


CONTENT_TYPES = [
    "",
    "text/plain",
    "application/x-www-form-urlencoded",
    "multipart/form-data",
    "multipart/form-data; boundary=",
    "multipart/form-data; boundary=" + "b" * 5000,
    "multipart/form-data; boundary=\xff",
    "multipart/mixed; boundary=B",
    "application/json; charset=utf-16",
    "application/json;" * 500,
    ";;;",
    "é",
    *(f"multipart/form-data; boundary=B; charset={charset}" for charset in ("utf-7", "hex", "idna", "nope")),
]


def other_types(route: Route) -> Iterator[Sent]:
    """Yields each content type with JSON or a form, each type with both on some routes."""
    for number, content_type in enumerate(CONTENT_TYPES, ROUTES.index(route) % 2):
        content = route.json() if number % 2 else part(b"prompt", b"+2AA-\xff") + END
        headers = [(b"content-type", content_type.encode("latin-1"))]
        yield f"{content_type[:60]} {content[:20]!r}", {"content": content, "headers": headers}


def compressed(route: Route) -> Iterator[Sent]:
    request = httpx.Request("POST", "http://server", **good(route))
    for encoding in ("gzip", "identity, BR"):
        headers = {"content-type": request.headers["content-type"], "content-encoding": encoding}
        yield encoding, {"content": gzip.compress(request.read()), "headers": headers}


def text_for_a_file(route: Route) -> Iterator[Sent]:
    if route.file is not None:
        fields = {name: (None, str(value)) for name, value in route.good.items()}
        yield route.file, {"files": fields | {route.file: (None, b"RIFF....WAVE")}}


def a_file_for_text(route: Route) -> Iterator[Sent]:
    if route.file is not None:
        files = {name: ("f.txt", str(value).encode()) for name, value in route.good.items()}
        yield route.prompt, {"files": files | {route.file: ("a.wav", WAV)}}


def fields_given_twice(route: Route) -> Iterator[Sent]:
    if route.file is not None:
        fields = [(name, (None, str(value))) for name, value in route.good.items()] * 2
        upload, text = (route.file, ("a.wav", WAV)), (route.file, (None, b"text"))
        for label, pair in (("uploads", [upload, upload]), ("upload, text", [upload, text]), ("text", [text, upload])):
            yield label, {"files": fields + pair}


def file_names(*names: str) -> Callable[[Route], Iterator[Sent]]:
    def requests(route: Route) -> Iterator[Sent]:
        if route.file is not None:
            yield from ((repr(name[:20]), good(route, upload=(name, WAV, "text/html"))) for name in names)

    return requests


def part(name: bytes, value: bytes, *, rest: bytes = b"") -> bytes:
    return b'--B\r\nContent-Disposition: form-data; name="' + name + b'"' + rest + b"\r\n\r\n" + value + b"\r\n"


END = b"--B--\r\n"
LONG = b"n" * 1_000_000
NAMELESS = (
    b"--B\r\n\r\nx\r\n" + END,
    b"--B\r\nContent-Disposition: form-data\r\n\r\nx\r\n" + END,
    b"--B\r\nContent-Disposition: ;;;\r\n\r\nx\r\n" + END,
    part(b"", b"x") + END,
)
OTHER_BOUNDARIES = (
    part(b"prompt", b"x").replace(b"--B", b"--C") + b"--C--\r\n",
    b"--B--B--B\r\n" + END,
    part(b"prompt", b"x").replace(b"\r\n", b"\n") + b"--B--\n",
    bytes(1000),
    b"B\r\n" * 1000,
)
PART_HEADERS = (b"X-A: b\r\n" * 100_000, b"X-A: " + LONG + b"\r\n", b"No-Colon\r\n")
BOMBS = (b"a&" * 50_000, b"a=" + b"x" * 1_000_000, b"%" * 1_000_000, b"&" * 100_000, b"a=b;" * 200_000)


def refused(route: Route, _: str, reply: httpx.Response) -> None:
    assert reply.status_code in route.refused, (reply.status_code, reply.text[:500])
    assert reply.headers["content-type"] == "application/json"
    assert "Traceback" not in reply.text
    assert "site-packages" not in reply.text
    assert len(reply.content) < 20_000
    route.check_error(reply.json())


def refused_by_name(route: Route, label: str, reply: httpx.Response) -> None:
    refused(route, label, reply)
    assert label.partition("=")[0] in reply.text


def refused_as_too_large(route: Route, label: str, reply: httpx.Response) -> None:
    refused(route, label, reply)
    assert reply.status_code == 413 or (label == "streamed" and route.file is not None)


def refused_as_compressed(route: Route, _: str, reply: httpx.Response) -> None:
    assert reply.status_code == 415, (reply.status_code, reply.text[:500])
    assert reply.headers["accept-encoding"] == "identity"
    assert "Content-Encoding" in reply.text
    route.check_error(reply.json())


def taken(_: Route, __: str, reply: httpx.Response) -> None:
    assert reply.status_code in (200, 202), reply.text[:500]
    assert "x-evil" not in reply.headers
    assert "passwd" not in str(reply.headers)


def answered(route: Route, label: str, reply: httpx.Response) -> None:
    if reply.status_code not in (200, 202):
        refused(route, label, reply)


@dataclass(frozen=True)
class Case:
    name: str
    requests: Callable[[Route], Iterable[Sent]]
    expect: Callable[[Route, str, httpx.Response], None] = refused

    def __str__(self) -> str:
        return self.name


CASES = [
    Case("a good request", lambda route: [("good", good(route))], taken),
    # JSON
    Case("an empty body", json_bodies(b"", b" \r\n\t ")),
    Case("cut JSON", json_bodies(b"{", b"}", b'{"prompt": "rai')),
    Case("no object", json_bodies(b"null", b"[]", b'[{"prompt": "x"}]', b"1", b'"x"', b"true", b"NaN")),
    Case("two objects", json_bodies(b'{"prompt": "x"} {}')),
    Case("loose JSON", json_bodies(b'{"prompt": "x",}', b"{'prompt': 'x'}", b'{"prompt": "x" /* y */}')),
    Case("no text", json_bodies(b"\x00", b"\x80\x04\x95\x00\x00\x00\x00\x00\x00\x00\x00.", b"\x1f\x8b\x08" + bytes(5))),
    Case("a form for JSON", json_bodies(b"prompt=x&duration=1")),
    Case("wide characters", json_bodies(*('{"prompt": "x"}'.encode(f"utf-{kind}") for kind in ("16", "16-be", "32")))),
    Case("two byte order marks", json_bodies(b'\xef\xbb\xbf\xef\xbb\xbf{"prompt": "x"}')),
    Case("deep lists", json_bodies(b'{"prompt": "x", "a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", b"[" * 500_000)),
    Case("deep objects", json_bodies(b'{"a":' * 100_000 + b"1" + b"}" * 100_000)),
    Case("what JSON allows", what_json_allows, taken),
    Case("many values", many_values, refused_as_too_large),
    # Prompts
    Case("half characters", prompts(b'"\\ud800"', b'"a\\udc00b"', b'"\\udc00\\ud800"')),
    Case("bad UTF-8", prompts(b'"\xff"', b'"\xe2\x82"', b'"\xc0\xaf"', b'"\xed\xa0\x80"')),
    Case("bad escapes", prompts(b'"a\nb"', b'"\\x41"')),
    Case("a prompt of a megabyte", prompts(b'"' + b"x" * 1_000_000 + b'"')),
    Case("a blank prompt", prompts(b'""', b'" \\n\\t\\u00a0\\u2003 "')),
    Case("a prompt that is no text", prompts(b"1", b"true", b"null", b'["x"]', b'{"a": "x"}')),
    # Numbers
    Case("endless numbers", numbers(b"NaN", b"Infinity", b"-Infinity", b"1e400", b"-1e400"), refused_by_name),
    Case("endless numbers as text", numbers(b'"nan"', b'"Infinity"'), refused_by_name),
    Case("words for numbers", numbers(b'"many"', b"[1]", b'{"a": 1}'), refused_by_name),
    Case("blanks for numbers", blank_numbers, refused_by_name),
    Case("long numbers", numbers(b"1" + b"0" * 5000)),
    Case("a megabyte of digits", numbers(b"9" * 1_000_000, most=1)),
    Case("odd sizes", numbers(b"1" + b"0" * 400, b"-" + b"9" * 20, b"-0.0", b"1e-320", b"1e308"), answered),
    Case("odd spellings", numbers(b"true", b'"1"', '"\u0663"'.encode(), b'"1_0"', b'"0x10"'), answered),
    # Bodies
    Case("a body above its limit", too_large, refused_as_too_large),
    Case("lengths that lie", lying_lengths, answered),
    Case("other types", other_types, answered),
    Case("a compressed body", compressed, refused_as_compressed),
    # Forms
    Case("cut forms", forms(b"", END, b"--B\r\n", part(b"prompt", b"x")[:-3])),
    Case("parts without a name", forms(*NAMELESS)),
    Case("other boundaries", forms(*OTHER_BOUNDARIES)),
    Case("many fields", forms(*(part(b"f", b"x") * number + END for number in (65, 10_000)))),
    Case("many files", forms(part(b"f", b"x", rest=b'; filename="f"') * 9 + END)),
    Case("a field of 5 MB", forms(part(b"prompt", b"x" * 5_000_000) + END)),
    Case("names of 1 MB", forms(part(LONG, b"x") + END, part(b"audio", WAV, rest=b'; filename="' + LONG + b'"') + END)),
    Case("headers of parts", forms(*(b"--B\r\n" + lines + b"\r\nx\r\n" + END for lines in PART_HEADERS))),
    Case(
        "base64",
        forms(part(b"audio", b"UklGRg==", rest=b'; filename="a.wav"\r\nContent-Transfer-Encoding: base64') + END),
    ),
    Case("urlencoded bombs", forms(*BOMBS, headers=URLENCODED)),
    Case("text for a file", text_for_a_file, refused_by_name),
    Case("a file for text", a_file_for_text, refused_by_name),
    Case("fields given twice", fields_given_twice, answered),
    Case(
        "file names",
        file_names("../../etc/passwd", "/dev/zero", "a\x00b.wav", "a" * 3000, "a.wav\r\nX-Evil: 1", "%00"),
        taken,
    ),
    Case("no file name", file_names(""), answered),
    Case("damaged audio", uploads(b"", b"not audio", WAV[:20], bytes(5000), b"PK\x03\x04" + bytes(100))),
]


async def failures_of(client: httpx.AsyncClient, case: Case, routes: Iterable[Route] = ROUTES) -> list[str]:
    """Returns a line for each route and request with an unexpected response."""
    failures = []
    for route in routes:
        for label, request in case.requests(route):
            try:
                async with asyncio.timeout(HANG_S):
                    reply = await client.post(route.path, **request)
                case.expect(route, label, reply)
            except Exception as error:  # noqa: BLE001  any error counts as a failure
                failures.append(f"{route.path}, {label}: {type(error).__name__} {error}"[:1000])
    return failures


@pytest.mark.parametrize("case", CASES, ids=str)
async def test_every_body_is_read_without_a_500(client: httpx.AsyncClient, case: Case) -> None:
    routes = [route for route in ROUTES if not route.again]
    assert any(list(case.requests(route)) for route in routes)
    failures = await failures_of(client, case, routes)
    assert not failures, "\n".join(failures)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
async def test_every_route_answers_hostile_requests(client: httpx.AsyncClient, case: Case) -> None:
    failures = await failures_of(client, case, [route for route in ROUTES if route.again])
    assert not failures, "\n".join(failures)


async def test_boundaries_in_the_data_of_a_part_are_limited(client: httpx.AsyncClient) -> None:
    """The parser is slow for each boundary that does not end a part, so 20 MB of them would take 17 s."""
    for number, status in ((900, 200), (1100, 400)):
        upload = part(b"audio", WAV + b"\r\n--BX" * number, rest=b'; filename="a.wav"')
        body = part(b"prompt", b"x") + part(b"duration", b"1") + upload + END
        reply = await client.post("/v1/audio/variations", content=body, headers=MULTIPART)
        assert reply.status_code == status, reply.text
    assert reply.json()["detail"] == "body: the form contains its boundary more than 1000 times"


@pytest.mark.parametrize(("mark", "most"), [("&", 1000), ("%41", 20_000)])
@pytest.mark.parametrize(
    "path", ["/v1/audio/variations", "/generate/style-transfer", "/v2beta/audio/stable-audio-2/text-to-audio"]
)
async def test_costly_characters_of_an_urlencoded_form_are_limited(
    client: httpx.AsyncClient, path: str, mark: str, most: int
) -> None:
    """Ten clients that send 1 MB of them would delay the clips of all others by 6 to 12 s."""
    replies = [
        await client.post(path, content=b"prompt=x" + mark.encode() * number, headers=URLENCODED)
        for number in (most, most + 1)
    ]
    assert replies[1].status_code == 400
    message = f"the form contains the character {mark[0]} more than {most} times"
    assert [message in reply.text for reply in replies] == [False, True]


async def in_pieces(body: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(body), 400):
        yield body[start : start + 400]


@pytest.mark.parametrize("send", [bytes, in_pieces])
async def test_blanks_after_a_boundary_are_limited(client: httpx.AsyncClient, send: Callable[[bytes], Any]) -> None:
    """The parser reads them one by one."""
    for number, status in ((1000, 200), (1001, 400)):
        upload = part(b"audio", WAV, rest=b'; filename="a.wav"').replace(b"--B", b"--B" + b" " * number, 1)
        body = part(b"prompt", b"x") + part(b"duration", b"1") + upload + END
        reply = await client.post("/v1/audio/variations", content=send(body), headers=MULTIPART)
        assert reply.status_code == status, reply.text
    assert reply.json()["detail"] == "body: more than 1000 spaces follow a boundary of the form"


async def test_commas_in_text_are_not_values(client: httpx.AsyncClient) -> None:
    text = '[{,"\\' * 20_000
    assert (await client.post("/v1/audio/generations", json={"prompt": text, "duration": 1})).status_code == 200


@pytest.mark.parametrize("field", ["loudness", "loras", "prompts", "seeds"])
async def test_many_values_in_a_form_field_are_refused_by_name(client: httpx.AsyncClient, field: str) -> None:
    text = "{" + ",".join(f'"k{number}":1' for number in range(30_000)) + "}"
    form = {"prompt": "x", "duration": "1", field: text}
    reply = await client.post("/v1/audio/variations", data=form, files={"audio": ("a.wav", WAV)})
    assert reply.status_code == 422
    assert reply.json()["detail"][0]["msg"] == f"{field}: more than 10000 lists, objects and commas"
    assert reply.json()["detail"][0]["loc"] == ["body", field]


HOSTILE_PROMPTS = [
    f"{MARK}\r\nSet-Cookie: {MARK}=1\r\n\r\n{MARK}",
    f'{MARK}"; filename="{MARK}.sh',
    f"../../../{MARK}/{MARK}",
    f"..\\{MARK}\x00.wav",
    f"\u202e{MARK}\u2066\u200f",
    f"${{jndi:ldap://{MARK}}} $({MARK}) `{MARK}` %s %n {{{MARK}}} {{{{7*7}}}}",
    f"<script>{MARK}</script>",
    f"\x1b[2J{MARK}\x07\x08\x7f",
    f"'; DROP TABLE jobs; -- {MARK}",
    f"{MARK}\u2028level=error\u2029\x85",
]


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], str]]:
    """Returns a function that returns all log text so far at level info or above, of structlog and of `logging`."""
    caplog.set_level(logging.INFO)
    with structlog.testing.capture_logs() as lines:
        yield lambda: str([line for line in lines if line["log_level"] != "debug"]) + caplog.text


async def test_prompt_is_never_logged_or_sent_in_a_header(
    client: httpx.AsyncClient, backend: ToneBackend, log: Callable[[], str]
) -> None:
    def check(route: Route, prompt: str, reply: httpx.Response) -> None:
        answered(route, prompt, reply)
        recipe = reply.headers.pop("X-Recipe", None)
        if recipe is not None:  # the recipe contains the prompt as printable ASCII JSON
            assert re.fullmatch(r"[ -~]+", recipe)
            parsed = json.loads(recipe)
            assert parsed.get("left_out") == ["prompt"] or parsed["prompt"] == prompt.strip()
        assert MARK not in str(reply.headers.raw)
        if reply.status_code == 200 and not route.queued:
            assert backend.last.prompt == prompt.strip()

    def requests(route: Route) -> Iterator[Sent]:
        for prompt in (hostile + route.prompt_end for hostile in HOSTILE_PROMPTS):
            yield prompt, good(route, {route.prompt: prompt})
        for wrong in ({"steps": 0}, {"seed": "x"}):
            yield prompt, good(route, {route.prompt: prompt, **wrong})

    failures = await failures_of(client, Case("prompts", requests, check))
    assert not failures, "\n".join(failures)
    assert "request" in log()
    assert MARK not in log()


# Requests that no HTTP client would send. They are written to a socket.

NO_HTTP = [b"", b"\r\n", b"\x16\x03\x01" * 100, b"GET / HTTP/9.9\r\n\r\n", b"A" * 70_000, b"\x00"]
HEAD = b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
LIES = [
    HEAD + b"Content-Length: 100\r\n\r\n{}",
    HEAD + b"Content-Length: 1\r\n\r\n{}",
    HEAD + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
    HEAD + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n{}",
    HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n",
    HEAD + b"Transfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\n{}",
    HEAD + b"Content-Encoding: gzip\r\nContent-Length: 2\r\n\r\n{}",
]
ODD_TEXTS = ["%00", "%ff", "%0d%0a", "%2e%2e%2f", "a" * 5000, "99999999999999999999", "\xe9", "%%%"]
ODD_HEADERS = {
    "x-fal-request-timeout": ["nan", "-1", "1e400", "\xff"],
    "x-fal-queue-priority": ["x", "\xff", "", "-1"],
    "x-fal-target-url": ["http://[", "https://fal.run/%ff%00/../x?%%%", "\xff", "file:///etc/passwd"],
    "x-forwarded-proto": ["javascript", "\xff", '"', "https,http"],
    "x-forwarded-host": ["", 'evil"x', "\xff", "["],
    "x-request-id": ["\xff", "a" * 5000, "", "%0d%0a"],
    "authorization": ["Bearer", "Basic \xff", "Key ", "Bearer " + "a" * 5000],
    "range": ["bytes=9-1", "x", "bytes=-", "\xff"],
    "content-encoding": ["gzip", "br", "\xff", ""],
    "last-event-id": ["\xff", "-1", "9" * 30, "nan"],
    "idempotency-key": ["\xff", "a" * 5000, "", "a b"],
    "origin": ["null", "http://[", "\xff", ""],
    "host": ["", ":", 'evil"x', "[::1"],
    "content-type": ["\xff", ";;;", "multipart/form-data; boundary=\xff", ""],
}


async def send(port: int, request: bytes, *, is_all: bool = False) -> bytes:
    """Send a request over a new connection. Returns the response, or only its start if it is an event stream.

    If `is_all`, the sending half of the connection is closed after the request.
    """
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(request)
        if is_all:
            writer.write_eof()
        async with asyncio.timeout(HANG_S):
            begin = await reader.read(65536)
            return begin if b"text/event-stream" in begin else begin + await reader.read()
    finally:
        writer.transport.abort()


async def test_raw_junk_ends_only_its_own_connection(shared: tuple[FastAPI, ToneBackend]) -> None:
    lies = [lie.replace(b"%s", route.path.encode()) for lie in LIES for route in ROUTES]
    async with listening(shared[0], lifespan="off") as port:
        for raw in NO_HTTP + lies:
            answer = await send(port, raw, is_all=True)
            assert not answer or answer.startswith(b"HTTP/1.1 4"), (raw[:200], answer[:500])
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE_S) as client:
            assert (await client.get("/health")).status_code == 200


def odd_requests(app: FastAPI) -> Iterator[bytes]:
    """Yield requests to every operation with unusual paths, queries and headers.

    Each operation gets one of the unusual hosts, because these are refused before the application finds the operation.
    """
    operations = [(method.upper(), path) for path, methods in app.openapi()["paths"].items() for method in methods]
    operations += [("GET", "/api/fal/proxy"), ("POST", "/api/fal/proxy")]
    for index, (method, path) in enumerate(operations):
        for text in ODD_TEXTS if "{" in path else ODD_TEXTS[:2]:
            query = f"?generation_id={text}&fal_webhook={text}&logs={text}&cursor={text}"
            yield _raw(method, re.sub(r"\{[^}]*\}", text, path) + query, {"Host": "localhost"})
        for number in range(4):
            headers = {name: values[number] for name, values in ODD_HEADERS.items()}
            host = headers.pop("host")
            if number == index % 4:
                yield _raw(method, re.sub(r"\{[^}]*\}", "x", path), {"host": host, **headers})
            yield _raw(method, re.sub(r"\{[^}]*\}", "x", path), {"Host": "localhost", **headers})


def _raw(method: str, path: str, headers: dict[str, str]) -> bytes:
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"{method} {path} HTTP/1.1\r\n{lines}Connection: close\r\nContent-Length: 2\r\n\r\n{{}}".encode("latin-1")


async def test_odd_paths_queries_and_headers_never_cause_a_500(shared: tuple[FastAPI, ToneBackend]) -> None:
    failures = []
    with structlog.testing.capture_logs() as lines:
        async with listening(shared[0], lifespan="off") as port:
            for request in odd_requests(shared[0]):
                answer = await send(port, request)
                status = int(answer.split()[1]) if answer else 0
                is_json = b"content-type: application/json" in answer.lower() or b"Invalid HTTP request" in answer
                if not (200 <= status < 500 or status == 503) or (status >= 400 and not is_json):
                    failures.append(f"{request[:300]!r}: {answer[:300]!r}")
    assert not failures, "\n".join(failures)
    assert not [line for line in lines if line["log_level"] == "error"]
