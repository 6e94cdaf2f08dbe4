"""The same hostile bodies for every route of every dialect: refused in the dialect's own form, never a 500 or a hang,
and never a word of a prompt in the log, a header or a path.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
import structlog

from tests.audio_files import make_audio_file
from tests.backends import ToneBackend

pytestmark = pytest.mark.slow

JSON = {"content-type": "application/json"}
MULTIPART = {"content-type": "multipart/form-data; boundary=B"}
URLENCODED = {"content-type": "application/x-www-form-urlencoded"}
WAV = make_audio_file(duration_s=0.2)
MARK = "zyxwv"  # what no log line, header or path may show
HANG_S = 60.0  # no refusal takes so long, on any machine


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


def check_fal(body: Any) -> None:
    detail = body["detail"]
    assert detail
    if not isinstance(detail, str):
        assert all({"loc", "msg", "type"} <= set(item) for item in detail)


@dataclass(frozen=True)
class Route:
    """One way in: what a good request holds, and how the dialect says no."""

    path: str
    check_error: Callable[[Any], None]
    good: dict[str, Any]
    prompt: str = "prompt"
    numbers: tuple[str, ...] = ("duration", "steps", "seed", "cfg_scale")
    file: str | None = None  # the form field of the upload; None for JSON routes
    queued: bool = False  # the engine is asked later
    prompt_end: str = ""  # what every prompt needs
    may_be_blank: frozenset[str] = frozenset()  # numbers whose empty text means that they are absent
    refused: frozenset[int] = field(default=frozenset({400, 413, 422}))

    def json(self, **changes: Any) -> bytes:
        return json.dumps(self.good | changes).encode()

    def raw(self, name: str, literal: bytes) -> bytes:
        """A JSON body with one value spelled out."""
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
_FAL = {"prompt": "rain", "seconds_total": 1}
_FAL_NUMBERS = ("seconds_total", "seconds_start", "steps")
ROUTES = {
    route.path: route
    for route in (
        Route("/v1/audio/generations", check_sa3, _SA3),
        Route("/sa3/generate", check_sa3, _SA3),
        Route("/v1/audio/variations", check_sa3, _SA3, file="audio"),
        Route("/v1/audio/inpaint", check_sa3, _SA3_INPAINT, file="audio"),
        Route("/jobs", check_sa3, _SA3, queued=True),
        Route("/jobs/variations", check_sa3, _SA3, file="audio", queued=True),
        Route("/jobs/inpaint", check_sa3, _SA3_INPAINT, file="audio", queued=True),
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
        Route("/fal-ai/stable-audio", check_fal, _FAL, numbers=_FAL_NUMBERS, refused=frozenset({413, 422})),
        Route(
            "/queue/fal-ai/stable-audio",
            check_fal,
            _FAL,
            numbers=_FAL_NUMBERS,
            refused=frozenset({413, 422}),
            queued=True,
        ),
    )
}
json_routes = pytest.mark.parametrize("path", [path for path, route in ROUTES.items() if route.file is None])
form_routes = pytest.mark.parametrize("path", [path for path, route in ROUTES.items() if route.file is not None])
all_routes = pytest.mark.parametrize("path", ROUTES)


async def post_form(
    client: httpx.AsyncClient, route: Route, changes: dict[str, Any] | None = None, *, upload: Any = ("a.wav", WAV)
) -> httpx.Response:
    values = route.good | (changes or {})
    assert route.file is not None
    return await client.post(route.path, data=values, files={route.file: upload})


async def post_good(client: httpx.AsyncClient, route: Route, **changes: Any) -> httpx.Response:
    if route.file is None:
        return await client.post(route.path, content=route.json(**changes), headers=JSON)
    return await post_form(client, route, changes)


@all_routes
async def test_the_good_request_of_every_route_is_taken(client: httpx.AsyncClient, path: str) -> None:
    reply = await post_good(client, ROUTES[path])
    assert reply.status_code in (200, 202), reply.text


NOT_JSON = {
    "empty": b"",
    "blank": b" \r\n\t ",
    "open": b"{",
    "closed": b"}",
    "cut": b'{"prompt": "rai',
    "null": b"null",
    "list": b"[]",
    "list of objects": b'[{"prompt": "x"}]',
    "number": b"1",
    "string": b'"x"',
    "true": b"true",
    "NaN": b"NaN",
    "two values": b'{"prompt": "x"} {}',
    "trailing comma": b'{"prompt": "x",}',
    "single quotes": b"{'prompt': 'x'}",
    "comment": b'{"prompt": "x" /* y */}',
    "zero byte": b"\x00",
    "utf-16": '{"prompt": "x"}'.encode("utf-16"),
    "utf-16-be": '{"prompt": "x"}'.encode("utf-16-be"),
    "utf-32": '{"prompt": "x"}'.encode("utf-32"),
    "two byte order marks": b'\xef\xbb\xbf\xef\xbb\xbf{"prompt": "x"}',
    "deep lists": b'{"prompt": "x", "a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "deep and open": b"[" * 500_000,
    "pickle": b"\x80\x04\x95\x00\x00\x00\x00\x00\x00\x00\x00.",
    "gzip": b"\x1f\x8b\x08\x00\x00\x00\x00\x00",
    "form": b"prompt=x&duration=1",
}


@pytest.mark.parametrize("name", NOT_JSON)
@json_routes
async def test_what_is_no_json_object(client: httpx.AsyncClient, path: str, name: str) -> None:
    ROUTES[path].expect_refusal(await client.post(path, content=NOT_JSON[name], headers=JSON))


BAD_TEXTS = {
    "lone surrogate": b'"\\ud800"',
    "lone low surrogate": b'"a\\udc00b"',
    "surrogates swapped": b'"\\udc00\\ud800"',
    "bad utf-8": b'"\xff"',
    "cut utf-8": b'"\xe2\x82"',
    "overlong utf-8": b'"\xc0\xaf"',
    "surrogate in utf-8": b'"\xed\xa0\x80"',
    "raw newline": b'"a\nb"',
    "bad escape": b'"\\x41"',
    "a megabyte": b'"' + b"x" * 1_000_000 + b'"',
    "empty": b'""',
    "white space": b'" \\n\\t\\u00a0\\u2003 "',
    "number": b"1",
    "bool": b"true",
    "null": b"null",
    "list": b'["x"]',
    "object": b'{"a": "x"}',
}


@pytest.mark.parametrize("name", BAD_TEXTS)
@json_routes
async def test_prompts_that_are_no_prompt(client: httpx.AsyncClient, path: str, name: str) -> None:
    route = ROUTES[path]
    body = route.raw(route.prompt, BAD_TEXTS[name])
    route.expect_refusal(await client.post(path, content=body, headers=JSON))


BAD_NUMBERS = {
    "NaN": b"NaN",
    "Infinity": b"Infinity",
    "-Infinity": b"-Infinity",
    "1e400": b"1e400",
    "-1e400": b"-1e400",
    "5000 digits": b"1" + b"0" * 5000,
    "a megabyte of digits": b"9" * 1_000_000,
    "nan text": b'"nan"',
    "infinite text": b'"Infinity"',
    "words": b'"many"',
    "list": b"[1]",
    "object": b'{"a": 1}',
    "empty text": b'""',
}
ODD_NUMBERS = {
    "400 digits": b"1" + b"0" * 400,
    "20 digits": b"-" + b"9" * 20,
    "minus zero": b"-0.0",
    "tiny": b"1e-320",
    "huge": b"1e308",
    "bool": b"true",
    "null": b"null",
    "text": b'"1"',
    "other digits": '"\u0663"'.encode(),
    "underscores": b'"1_0"',
    "hex": b'"0x10"',
}


def numbers_of(routes: dict[str, Route]) -> list[tuple[str, str]]:
    return [(route.path, number) for route in routes.values() for number in route.numbers]


@pytest.mark.parametrize(("path", "number"), numbers_of(ROUTES))
async def test_numbers_that_are_none(client: httpx.AsyncClient, path: str, number: str) -> None:
    route = ROUTES[path]
    for name, literal in BAD_NUMBERS.items():
        if name == "empty text" and (route.file or number in route.may_be_blank):
            continue  # an empty form field is one that was left out
        if route.file is None:
            reply = await client.post(path, content=route.raw(number, literal), headers=JSON)
        else:
            reply = await post_form(client, route, {number: literal.decode().strip('"')})
        route.expect_refusal(reply)
        assert number in reply.text or len(literal) > 4000, reply.text


@pytest.mark.parametrize(("path", "number"), numbers_of(ROUTES))
async def test_odd_numbers_are_answered(client: httpx.AsyncClient, path: str, number: str) -> None:
    route = ROUTES[path]
    for literal in ODD_NUMBERS.values():
        if route.file is None:
            route.expect_answer(await client.post(path, content=route.raw(number, literal), headers=JSON))
        else:
            route.expect_answer(await post_form(client, route, {number: literal.decode().strip('"')}))


@json_routes
async def test_what_json_allows_is_taken(client: httpx.AsyncClient, path: str) -> None:
    route = ROUTES[path]
    good = route.json()
    prompt = f'"{route.prompt}": '.encode()
    for body in (
        b"\xef\xbb\xbf" + good,
        b" \r\n\t" + good + b"\n ",
        good.replace(prompt, prompt + b'"first", ' + prompt),
        good.removesuffix(b"}") + b', "unknown": {"a": [1, null, {"b": NaN}]}}',
        good.removesuffix(b"}") + b', "": 1, "__proto__": {}, "__class__": 2, "self": 3}',
        route.raw(route.prompt, b'"\\ud83c\\udfa7 \xf0\x9f\x8e\xa7 \\u0000 \\u202e' + route.prompt_end.encode() + b'"'),
    ):
        reply = await client.post(path, content=body, headers=JSON)
        assert reply.status_code in (200, 202), (body[:80], reply.text)


@all_routes
async def test_a_body_above_its_limit_is_413(client: httpx.AsyncClient, path: str) -> None:
    route = ROUTES[path]

    async def stream(size: int) -> AsyncIterator[bytes]:
        for _ in range(0, size, 65536):
            yield bytes(65536)

    if route.file is None:
        for content in (bytes(2_000_000), stream(2_000_000)):
            reply = await client.post(path, content=content, headers=JSON)
            route.expect_refusal(reply)
            assert reply.status_code == 413
    else:
        reply = await client.post(path, content=bytes(2_000_000), headers=URLENCODED)
        route.expect_refusal(reply)
        assert reply.status_code == 413
        route.expect_refusal(await client.post(path, content=stream(2_000_000), headers=URLENCODED))


BAD_LENGTHS = ["-1", "1e3", "0x10", "99999999999999999999999", "", "+5", "ten"]


@pytest.mark.parametrize("length", BAD_LENGTHS)
@all_routes
async def test_a_length_that_lies_does_not_matter(client: httpx.AsyncClient, path: str, length: str) -> None:
    route = ROUTES[path]
    content = route.json() if route.file is None else b"--B--\r\n"
    headers = (JSON if route.file is None else MULTIPART) | {"content-length": length}
    route.expect_answer(await client.post(path, content=content, headers=headers))


@all_routes
@pytest.mark.parametrize(
    "content_type",
    [
        "",
        "text/plain",
        "image/png",
        "application/xml",
        "application/x-www-form-urlencoded",
        "multipart/form-data",
        "multipart/form-data; boundary=",
        "multipart/form-data; boundary=" + "b" * 5000,
        "multipart/mixed; boundary=B",
        "application/json; charset=utf-16",
        "application/json;" * 500,
        ";;;",
        "é",
        "multipart/form-data; boundary=\xff",
    ],
)
async def test_a_body_declared_as_something_else(client: httpx.AsyncClient, path: str, content_type: str) -> None:
    route = ROUTES[path]
    headers = [(b"content-type", content_type.encode("latin-1"))]
    for content in (route.json(), b"--B\r\n\r\n--B--", b"prompt=x"):
        route.expect_answer(await client.post(path, content=content, headers=headers))


def part(name: bytes, value: bytes, *, rest: bytes = b"") -> bytes:
    return b'--B\r\nContent-Disposition: form-data; name="' + name + b'"' + rest + b"\r\n\r\n" + value + b"\r\n"


END = b"--B--\r\n"
BAD_FORMS = {
    "nothing": b"",
    "only the end": END,
    "no end": b"--B\r\n",
    "half a part": part(b"prompt", b"x")[:-3],
    "no disposition": b"--B\r\n\r\nx\r\n" + END,
    "no name": b"--B\r\nContent-Disposition: form-data\r\n\r\nx\r\n" + END,
    "empty name": part(b"", b"x") + END,
    "another boundary": part(b"prompt", b"x").replace(b"--B", b"--C") + b"--C--\r\n",
    "a boundary inside a boundary": b"--B--B--B\r\n" + END,
    "bare line feeds": part(b"prompt", b"x").replace(b"\r\n", b"\n") + b"--B--\n",
    "65 fields": part(b"f", b"x") * 65 + END,
    "10000 fields": part(b"f", b"x") * 10_000 + END,
    "9 files": part(b"f", b"x", rest=b'; filename="f"') * 9 + END,
    "a field of 5 MB": part(b"prompt", b"x" * 5_000_000) + END,
    "a name of 1 MB": part(b"n" * 1_000_000, b"x") + END,
    "a file name of 1 MB": part(b"audio", WAV, rest=b'; filename="' + b"n" * 1_000_000 + b'"') + END,
    "100000 headers": b"--B\r\n" + b"X-A: b\r\n" * 100_000 + b"\r\nx\r\n" + END,
    "a header of 1 MB": b"--B\r\nX-A: " + b"b" * 1_000_000 + b"\r\n\r\nx\r\n" + END,
    "a header without colon": b"--B\r\nNo-Colon\r\n\r\nx\r\n" + END,
    "zero bytes": bytes(1000),
    "no dashes": b"B\r\n" * 1000,
    "base64": part(b"audio", b"UklGRg==", rest=b'; filename="a.wav"\r\nContent-Transfer-Encoding: base64') + END,
}


@pytest.mark.parametrize("name", BAD_FORMS)
@form_routes
async def test_broken_forms(client: httpx.AsyncClient, path: str, name: str) -> None:
    async with asyncio.timeout(HANG_S):
        ROUTES[path].expect_refusal(await client.post(path, content=BAD_FORMS[name], headers=MULTIPART))


@form_routes
async def test_urlencoded_bombs(client: httpx.AsyncClient, path: str) -> None:
    for body in (b"a&" * 500_000, b"a=" + b"x" * 1_000_000, b"%" * 1_000_000, b"&" * 1_000_000, b"a=b;" * 200_000):
        async with asyncio.timeout(HANG_S):
            ROUTES[path].expect_refusal(await client.post(path, content=body, headers=URLENCODED))


@form_routes
async def test_text_for_a_file_and_a_file_for_text(client: httpx.AsyncClient, path: str) -> None:
    route = ROUTES[path]
    assert route.file is not None
    as_text = await client.post(
        path,
        files={name: (None, str(value)) for name, value in route.good.items()} | {route.file: (None, b"RIFF....WAVE")},
    )
    route.expect_refusal(as_text)
    assert route.file in as_text.text
    files = {name: ("f.txt", str(value).encode()) for name, value in route.good.items()}
    as_file = await client.post(path, files=files | {route.file: ("a.wav", WAV)})
    route.expect_refusal(as_file)
    assert route.prompt in as_file.text


@form_routes
async def test_fields_given_twice_are_answered(client: httpx.AsyncClient, path: str) -> None:
    route = ROUTES[path]
    assert route.file is not None
    fields = [(name, (None, str(value))) for name, value in route.good.items()] * 2
    upload = (route.file, ("a.wav", WAV))
    route.expect_answer(await client.post(path, files=[*fields, upload, upload]))
    route.expect_answer(await client.post(path, files=[*fields, upload, (route.file, (None, b"text"))]))
    route.expect_answer(await client.post(path, files=[*fields, (route.file, (None, b"text")), upload]))


FILE_NAMES = [
    "",
    "../../etc/passwd",
    "/dev/zero",
    "a\x00b.wav",
    "a" * 3000,
    "\u202egnp.wav",
    "a.wav\r\nX-Evil: 1",
    "%00",
]


@pytest.mark.parametrize("name", FILE_NAMES)
@form_routes
async def test_a_file_name_means_nothing(client: httpx.AsyncClient, path: str, name: str) -> None:
    route = ROUTES[path]
    reply = await post_form(client, route, upload=(name, WAV, "text/html"))
    assert "x-evil" not in reply.headers
    assert "passwd" not in str(reply.headers)
    route.expect_answer(reply)
    if name:
        assert reply.status_code in (200, 202), reply.text


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
    """All that is logged at info or above, by structlog and by the standard library."""
    caplog.set_level(logging.INFO)
    with structlog.testing.capture_logs() as lines:
        yield lambda: str([line for line in lines if line["log_level"] != "debug"]) + caplog.text


@pytest.mark.parametrize("prompt", HOSTILE_PROMPTS)
@all_routes
async def test_a_prompt_is_never_logged_nor_part_of_a_header(
    client: httpx.AsyncClient, backend: ToneBackend, log: Callable[[], str], path: str, prompt: str
) -> None:
    route = ROUTES[path]
    prompt += route.prompt_end
    for changes in ({route.prompt: prompt}, {route.prompt: prompt, "steps": 0}, {route.prompt: prompt, "seed": "x"}):
        reply = await post_good(client, route, **changes)
        route.expect_answer(reply)
        recipe = reply.headers.pop("X-Recipe", None)
        if recipe is not None:  # says what made the file, the prompt too, as JSON of printable ASCII characters
            assert re.fullmatch(r"[ -~]+", recipe)
            assert json.loads(recipe)["prompt"] == prompt.strip()
        assert MARK not in str(reply.headers.raw)
    if not route.queued:
        assert backend.requests[0][1].prompt == prompt.strip()
    assert "request" in log()
    assert MARK not in log()
