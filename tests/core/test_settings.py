from __future__ import annotations

from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError
from typer.testing import CliRunner

from stable_audio_serve.cli import app
from stable_audio_serve.core.catalog import ModelCard, ModelCatalog
from stable_audio_serve.core.errors import ConfigError
from stable_audio_serve.core.keys import hash_key
from stable_audio_serve.core.settings import JobSettings, ModelSettings, Settings
from stable_audio_serve.core.settings_sources import VARIABLES, check_model_names, load_settings, preloaded_names


def load(tmp_path: Path, args: dict[str, Any] | None = None, **environ: str) -> Settings:
    return load_settings(args, environ=environ, directory=tmp_path)


def test_defaults_are_the_documented_ones(tmp_path: Path) -> None:
    settings = load(tmp_path)
    assert [model.name for model in settings.models] == ["small-sfx", "small-music", "medium"]
    assert (settings.api.max_duration_s, settings.api.most_steps(8), settings.api.max_batch_size) == (380.0, 50, 4)
    assert (settings.api.max_deadline_s, settings.api.max_long_s) == (3600.0, 1800.0)
    assert settings.api.max_upload_bytes == 104_857_600
    assert settings.storage.max_bytes_per_key == 2 * 2**30
    model = settings.models[0]
    assert (model.max_loras, model.max_lora_rank, model.lora_cache_bytes) == (4, 64, 512 * 2**20)
    assert model.lora_stacking == "chained"
    assert settings.output_dir == "outputs"
    assert settings.model_half is True
    assert settings.preload_models is None
    assert settings.storage.prefix == "stable-audio/jobs"


def test_the_environment_beats_the_dotenv_file_which_beats_arguments(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("STABLE_AUDIO_MAX_STEPS=30\nSTABLE_AUDIO_MAX_DURATION=200\nOTHER=1\n")
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    environ = {"STABLE_AUDIO_MAX_STEPS": "20"}
    args = {"api": {"max_steps": 10, "max_duration_s": 100, "max_batch_size": 2}}
    settings = load_settings(args, environ=environ, directory=inner)
    assert (settings.api.max_steps, settings.api.max_duration_s, settings.api.max_batch_size) == (20, 200.0, 2)
    assert environ["OTHER"] == "1"
    assert args == {"api": {"max_steps": 10, "max_duration_s": 100, "max_batch_size": 2}}


def test_validated_arguments_are_merged_like_raw_ones(tmp_path: Path) -> None:
    args = Settings.model_validate({"api": {"max_steps": 10}, "models": [{"name": "demo", "path": "x"}]})
    settings = load_settings(args, environ={"STABLE_AUDIO_MAX_BATCH_SIZE": "3"}, directory=tmp_path)
    assert (settings.api.max_steps, settings.api.max_batch_size, settings.models[0].path) == (10, 3, "x")


@pytest.mark.parametrize("value", ["1", "true", "YES", "on", "True"])
def test_words_that_mean_true(tmp_path: Path, value: str) -> None:
    assert load(tmp_path, {"model_half": False}, STABLE_AUDIO_MODEL_HALF=value).model_half is True


@pytest.mark.parametrize("value", ["0", "false", "No", "off"])
def test_words_that_mean_false(tmp_path: Path, value: str) -> None:
    assert load(tmp_path, STABLE_AUDIO_MODEL_HALF=value).model_half is False


def test_the_newer_default_model_name_wins(tmp_path: Path) -> None:
    assert load(tmp_path, STABLE_AUDIO_MODEL="medium").default_model == "medium"
    both = load(tmp_path, STABLE_AUDIO_MODEL="medium", STABLE_AUDIO_DEFAULT_MODEL="small-music")
    assert both.default_model == "small-music"


def test_default_steps_are_allowed_unless_the_operator_sets_a_limit(tmp_path: Path) -> None:
    assert load(tmp_path).api.most_steps(100) == 100
    assert load(tmp_path, STABLE_AUDIO_MAX_STEPS="20").api.most_steps(100) == 20


def test_an_empty_preload_list_means_load_on_first_use(tmp_path: Path) -> None:
    assert load(tmp_path, STABLE_AUDIO_PRELOAD_MODELS="").preload_models == ()
    assert load(tmp_path, STABLE_AUDIO_PRELOAD_MODELS="medium, small-sfx,").preload_models == ("medium", "small-sfx")


def test_other_empty_variables_count_as_not_set(tmp_path: Path) -> None:
    settings = load(tmp_path, STABLE_AUDIO_DEVICE="", STABLE_AUDIO_MAX_STEPS=" ", STABLE_AUDIO_STORAGE_PREFIX="")
    assert settings.device is None
    assert settings.api.max_steps is None
    assert settings.storage.prefix == ""


def test_the_hub_token_is_read_from_both_names(tmp_path: Path) -> None:
    environ = {"HUGGING_FACE_HUB_TOKEN": "first-token"}
    settings = load_settings(environ=environ, directory=tmp_path)
    assert environ["HF_TOKEN"] == "first-token"
    assert settings.hf_token is not None
    assert settings.hf_token.get_secret_value() == "first-token"
    assert "first-token" not in repr(settings)
    environ = {"HUGGING_FACE_HUB_TOKEN": "old", "HF_TOKEN": "new"}
    load_settings(environ=environ, directory=tmp_path)
    assert environ["HF_TOKEN"] == "new"


@pytest.mark.parametrize(
    ("name", "value", "path", "expected"),
    [
        ("STABLE_AUDIO_DEFAULT_MODEL", "medium", "default_model", "medium"),
        ("STABLE_AUDIO_MODEL", "medium", "default_model", "medium"),
        ("STABLE_AUDIO_PRELOAD_MODELS", "medium, small-sfx", "preload_models", ("medium", "small-sfx")),
        ("STABLE_AUDIO_DEVICE", "cpu", "device", "cpu"),
        ("STABLE_AUDIO_MODEL_HALF", "off", "model_half", False),
        ("STABLE_AUDIO_MAX_DURATION", "60.5", "api.max_duration_s", 60.5),
        ("STABLE_AUDIO_MAX_STEPS", "99", "api.max_steps", 99),
        ("STABLE_AUDIO_MAX_BATCH_SIZE", "2", "api.max_batch_size", 2),
        ("STABLE_AUDIO_MAX_UPLOAD_BYTES", "1000", "api.max_upload_bytes", 1000),
        ("STABLE_AUDIO_OUTPUT_DIR", "/data/out", "output_dir", "/data/out"),
        ("STABLE_AUDIO_DATABASE_URL", "sqlite:////data/jobs.db", "jobs.database_url", "sqlite:////data/jobs.db"),
        ("STABLE_AUDIO_PUBLIC_URL", "https://a.example", "api.public_url", "https://a.example"),
        ("STABLE_AUDIO_STORAGE_BUCKET", "b", "storage.bucket", "b"),
        ("AWS_S3_BUCKET", "b", "storage.bucket", "b"),
        ("R2_BUCKET", "b", "storage.bucket", "b"),
        ("R2_BUCKET_NAME", "b", "storage.bucket", "b"),
        ("STABLE_AUDIO_STORAGE_PREFIX", "p/q", "storage.prefix", "p/q"),
        ("STABLE_AUDIO_STORAGE_ENDPOINT_URL", "https://s3.example", "storage.endpoint_url", "https://s3.example"),
        ("AWS_ENDPOINT_URL_S3", "https://s3.example", "storage.endpoint_url", "https://s3.example"),
        ("AWS_ENDPOINT_URL", "https://s3.example", "storage.endpoint_url", "https://s3.example"),
        ("R2_ENDPOINT_URL", "https://s3.example", "storage.endpoint_url", "https://s3.example"),
        ("STABLE_AUDIO_STORAGE_REGION", "auto", "storage.region", "auto"),
        ("AWS_REGION", "eu-west-1", "storage.region", "eu-west-1"),
        ("AWS_DEFAULT_REGION", "eu-west-1", "storage.region", "eu-west-1"),
        (
            "STABLE_AUDIO_STORAGE_PUBLIC_BASE_URL",
            "https://cdn.example/x",
            "storage.public_base_url",
            "https://cdn.example/x",
        ),
        ("STABLE_AUDIO_PRESIGNED_URL_EXPIRES", "60", "storage.presigned_url_expires_s", 60),
    ],
)
def test_every_variable_takes_effect(tmp_path: Path, name: str, value: str, path: str, expected: object) -> None:
    settings = load(tmp_path, **{name: value})
    assert attrgetter(path)(settings) == expected
    assert attrgetter(path)(load(tmp_path)) != expected


@pytest.mark.parametrize(
    "names",
    [
        ("STABLE_AUDIO_STORAGE_BUCKET", "AWS_S3_BUCKET", "R2_BUCKET", "R2_BUCKET_NAME"),
        ("STABLE_AUDIO_STORAGE_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "R2_ENDPOINT_URL", "AWS_ENDPOINT_URL"),
        ("STABLE_AUDIO_STORAGE_REGION", "AWS_REGION", "AWS_DEFAULT_REGION"),
    ],
)
def test_our_name_of_a_variable_wins(tmp_path: Path, names: tuple[str, ...]) -> None:
    storage = load(tmp_path, **{name: f"https://{index}.example" for index, name in enumerate(names)}).storage
    assert "https://0.example" in (storage.bucket, storage.endpoint_url, storage.region)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("STABLE_AUDIO_MAX_DURATION", "long"),
        ("STABLE_AUDIO_MAX_DURATION", "nan"),
        ("STABLE_AUDIO_MAX_DURATION", "0"),
        ("STABLE_AUDIO_MAX_BATCH_SIZE", "many"),
        ("STABLE_AUDIO_MAX_UPLOAD_BYTES", "100MB"),
        ("STABLE_AUDIO_PRESIGNED_URL_EXPIRES", "soon"),
        ("STABLE_AUDIO_MODEL_HALF", "maybe"),
        ("STABLE_AUDIO_DEVICE", "tpu"),
    ],
)
def test_a_bad_variable_is_named(tmp_path: Path, name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=name) as caught:
        load(tmp_path, **{name: value})
    assert value in caught.value.message


@pytest.mark.parametrize(
    ("args", "key"),
    [
        ({"api": {"max_step": 1}}, "api.max_step"),
        ({"api": 5}, "api"),
        ({"models": [{"name": "a", "pth": "x"}]}, "models.0.pth"),
        ({"models": [{"name": "../a"}]}, "models.0.name"),
        ({"models": [{"name": "a", "mode": "quick"}]}, "models.0.mode"),
        ({"models": [{"name": "a", "max_duration_s": float("inf")}]}, "models.0.max_duration_s"),
        ({"models": [{"name": "a", "path": "x", "repo_id": "y"}]}, "either path"),
        ({"models": [{"name": "a", "device": "gpu"}]}, "models.0.device"),
    ],
)
def test_a_bad_key_is_named(tmp_path: Path, args: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        load(tmp_path, args)


def test_an_unknown_model_name_stops_startup() -> None:
    catalog = ModelCatalog([ModelCard("small-sfx", "stable-audio-3", aliases=("stable-audio-3-small-sfx",))])
    check_model_names(Settings(default_model="stable-audio-3-small-sfx", preload_models=("small-sfx",)), catalog)
    with pytest.raises(ConfigError, match=r"STABLE_AUDIO_DEFAULT_MODEL or STABLE_AUDIO_MODEL.*'huge'.*small-sfx"):
        check_model_names(Settings(default_model="huge"), catalog)
    with pytest.raises(ConfigError, match=r"STABLE_AUDIO_PRELOAD_MODELS.*'huge'"):
        check_model_names(Settings(preload_models=("small-sfx", "huge")), catalog)
    for key in ("model", "stability_model", "elevenlabs_model"):
        with pytest.raises(ConfigError, match=rf"^dialects\.{key}: unknown model 'huge'"):
            check_model_names(Settings.model_validate({"dialects": {key: "huge"}}), catalog)
    settings = Settings.model_validate({"dialects": {"fal_models": {"stable-audio-3/medium": "huge"}}})
    with pytest.raises(ConfigError, match=r"^dialects\.fal_models\.stable-audio-3/medium: unknown model 'huge'"):
        check_model_names(settings, catalog)


def test_the_default_model_is_preloaded_by_default() -> None:
    catalog = ModelCatalog([ModelCard("a", "f", aliases=("x",)), ModelCard("b", "f")], default="b")
    assert preloaded_names(Settings(), catalog) == ("b",)
    assert preloaded_names(Settings(preload_models=()), catalog) == ()
    assert preloaded_names(Settings(preload_models=("X", "b", "a")), catalog) == ("a", "b")


def test_a_model_with_no_least_replica_is_not_preloaded() -> None:
    catalog = ModelCatalog([ModelCard("a", "f", aliases=("x",)), ModelCard("b", "f")])
    idle = {"models": [{"name": "a", "replicas": {"min_replicas": 0}}, {"name": "b"}]}
    assert preloaded_names(Settings.model_validate(idle), catalog) == ()
    with pytest.raises(ConfigError, match="preload_models keeps x loaded"):
        check_model_names(Settings.model_validate(idle | {"preload_models": ["b", "x"]}), catalog)


def test_every_key_is_described_and_every_variable_sets_one() -> None:
    pending: list[type[BaseModel]] = [Settings, ModelSettings]
    while pending:
        section = pending.pop()
        for name, field in section.model_fields.items():
            assert field.description, f"{section.__name__}.{name}"
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                pending.append(field.annotation)
    tree = Settings().model_dump()
    for path in VARIABLES:
        node: Any = tree
        for key in path:
            node = node[key] if key != path[-1] else node
        assert path[-1] in node


def test_key_hashes_come_from_file_and_variables_and_plain_keys_are_hashed(tmp_path: Path) -> None:
    one, two = hash_key("one"), hash_key("two")
    assert load(tmp_path, {"api": {"key_hashes": [one]}}).api.key_hashes == (one,)
    assert load(tmp_path, STABLE_AUDIO_API_KEY_HASHES=f"{one}, {two}").api.key_hashes == (one, two)
    settings = load(tmp_path, {"api": {"key_hashes": [one]}}, VLLM_API_KEY=" two ")
    assert settings.api.key_hashes == (one, two)
    assert load_settings(settings, environ={"VLLM_API_KEY": "two"}, directory=tmp_path) == settings
    assert load(tmp_path, VLLM_API_KEY="").api.key_hashes == ()
    assert one not in repr(settings)
    assert one not in settings.model_dump_json()


def test_a_plain_key_where_a_hash_belongs_is_refused_but_not_shown(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="STABLE_AUDIO_API_KEY_HASHES") as caught:
        load(tmp_path, STABLE_AUDIO_API_KEY_HASHES="my-plain-key")
    assert "my-plain-key" not in caught.value.message


@pytest.mark.parametrize(
    ("entries", "complaint"),
    [
        ([f"{'a' * 16}:{hash_key('x')}"], "16 hexadecimal digits"),  # such a name is reserved for keys without a name
        *(
            ([f"{name}:{hash_key('x')}"], "64 letters")
            for name in ("", "a b", "a/b", "-a", "a" * 65, "ä", "a:b", "a\n")
        ),
        *(([text], "SHA-256") for text in ("", "alice:", "alice", "alice:" + "0" * 63, hash_key("x").upper())),
        ([hash_key("x"), hash_key("y"), f"alice:{hash_key('x')}"], "entries 1 and 3 are the same key"),
    ],
)
def test_a_key_hash_that_cannot_be_used_is_refused_but_not_shown(
    tmp_path: Path, entries: list[str], complaint: str
) -> None:
    with pytest.raises(ConfigError, match=complaint) as caught:
        load(tmp_path, {"api": {"key_hashes": entries}})
    assert caught.value.message.startswith("api.key_hashes")
    assert not any(digest in caught.value.message for digest in (hash_key("x"), hash_key("x").upper()))


@pytest.mark.parametrize(
    ("key", "entries"),
    [
        *(
            ("cors_origins", [origin])
            for origin in ("localhost", "https://a.example/", "https://*.example", "", "https://")
        ),
        *(("allowed_hosts", [host]) for host in ("a.example:8000", "http://a.example", "*.example", "", "a b", "::1")),
    ],
)
def test_origins_and_hosts_that_cannot_match_are_refused(tmp_path: Path, key: str, entries: list[str]) -> None:
    with pytest.raises(ConfigError, match=f"api.{key}"):
        load(tmp_path, {"api": {key: entries}})


def test_origins_and_hosts_may_be_comma_lists(tmp_path: Path) -> None:
    variables = {
        "STABLE_AUDIO_CORS_ORIGINS": "https://a.example, null",
        "STABLE_AUDIO_ALLOWED_HOSTS": "a.example,[::1]",
    }
    api = load(tmp_path, **variables).api
    assert (api.cors_origins, api.allowed_hosts) == (("https://a.example", "null"), ("a.example", "[::1]"))


def test_keys_may_share_a_name_and_listed_plain_keys_keep_theirs(tmp_path: Path) -> None:
    entries = [f"alice:{hash_key('old')}", f"alice:{hash_key('new')}", hash_key("x"), f"a.b_C-9:{hash_key('y')}"]
    assert load(tmp_path, {"api": {"key_hashes": entries}}, VLLM_API_KEY="new").api.key_hashes == tuple(entries)
    assert load(tmp_path, STABLE_AUDIO_API_KEY_HASHES=", ".join(entries)).api.key_hashes == tuple(entries)


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, (None, None, None)),
        ({"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}, ("a", "b", None)),
        ({"R2_ACCESS_KEY_ID": "c", "R2_SECRET_ACCESS_KEY": "d"}, ("c", "d", None)),
        (
            {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_SESSION_TOKEN": "t"}
            | {"R2_ACCESS_KEY_ID": "c", "R2_SECRET_ACCESS_KEY": "d"},
            ("a", "b", "t"),
        ),
        # A key id without its secret is ignored. AWS_SESSION_TOKEN is used only with the AWS keys.
        ({"AWS_ACCESS_KEY_ID": "a", "R2_ACCESS_KEY_ID": "c", "R2_SECRET_ACCESS_KEY": "d"}, ("c", "d", None)),
        ({"AWS_SESSION_TOKEN": "t", "R2_ACCESS_KEY_ID": "c", "R2_SECRET_ACCESS_KEY": "d"}, ("c", "d", None)),
        ({"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": " "}, (None, None, None)),
    ],
)
def test_access_keys_come_in_pairs(
    tmp_path: Path, environ: dict[str, str], expected: tuple[str | None, str | None, str | None]
) -> None:
    storage = load(tmp_path, **environ).storage
    found = (storage.access_key_id, storage.secret_access_key, storage.session_token)
    assert tuple(value and value.get_secret_value() for value in found) == expected


def test_a_pair_of_the_environment_replaces_the_whole_key_of_the_file(tmp_path: Path) -> None:
    args = {"storage": {"access_key_id": "x", "secret_access_key": "y", "session_token": "z"}}
    assert load(tmp_path, args).storage.session_token is not None
    assert load(tmp_path, args, R2_ACCESS_KEY_ID="c", R2_SECRET_ACCESS_KEY="d").storage.session_token is None
    with pytest.raises(ConfigError, match=r"storage.*set both access_key_id"):
        load(tmp_path, {"storage": {"access_key_id": "only-half"}})


@pytest.mark.parametrize(("given", "kept"), [("/a/b/", "a/b"), ("a", "a"), ("//", ""), ("", "")])
def test_slashes_at_the_ends_of_the_prefix_do_not_count(tmp_path: Path, given: str, kept: str) -> None:
    assert load(tmp_path, STABLE_AUDIO_STORAGE_PREFIX=given).storage.prefix == kept


@pytest.mark.parametrize("prefix", ["../jobs", "a/./b", "/a/..", "."])
def test_a_prefix_that_clients_would_change_in_links_is_refused(tmp_path: Path, prefix: str) -> None:
    with pytest.raises(ConfigError, match="STABLE_AUDIO_STORAGE_PREFIX"):
        load(tmp_path, STABLE_AUDIO_STORAGE_PREFIX=prefix)


@pytest.mark.parametrize(
    ("field", "args"),
    [
        ("output_dir", {"output_dir": "a\0b"}),
        ("dialects.riff_dir", {"dialects": {"riff_dir": "a\0b"}}),
        ("models.0.path", {"models": [{"name": "tiny", "path": "a\0b"}]}),
    ],
)
def test_an_impossible_folder_is_refused(tmp_path: Path, field: str, args: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"^{field}: "):
        load(tmp_path, args)


def test_storage_urls_are_urls_without_secrets(tmp_path: Path) -> None:
    for name in ("STABLE_AUDIO_STORAGE_ENDPOINT_URL", "STABLE_AUDIO_STORAGE_PUBLIC_BASE_URL"):
        for value in ("s3.example", "ftp://s3.example", "https://s3.example/?x=1"):
            with pytest.raises(ConfigError, match=name):
                load(tmp_path, **{name: value})


def test_the_tree_is_frozen() -> None:
    with pytest.raises(ValidationError):
        Settings().api.max_steps = 3  # type: ignore[misc]


def test_config_command_prints_the_tree_without_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("applications:\n- import_path: x:y\n  args:\n    models: [{name: demo, path: somewhere}]\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", "hf_very_secret")
    monkeypatch.setenv("VLLM_API_KEY", "very-plain-key")
    monkeypatch.setenv("STABLE_AUDIO_DATABASE_URL", "postgresql://me:passw0rd@db/jobs")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "aws-key-id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "aws-very-secret")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "aws-token")
    monkeypatch.setenv("STABLE_AUDIO_MAX_STEPS", "12")
    result = CliRunner().invoke(app, ["config", "--config", str(file)])
    assert result.exit_code == 0, result.output
    assert "max_steps: 12" in result.output
    assert "path: somewhere" in result.output
    for secret in ("hf_very_secret", "very-plain-key", hash_key("very-plain-key"), "passw0rd", "aws-"):
        assert secret not in result.output
    assert "@db/jobs" in result.output
    monkeypatch.setenv("STABLE_AUDIO_MAX_STEPS", "twelve")
    result = CliRunner().invoke(app, ["config", "--config", str(file)])
    assert result.exit_code == 2
    assert "STABLE_AUDIO_MAX_STEPS" in result.output


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://me:pass/w0rd@db/jobs",
        "postgresql://me:pass:w0rd@db/jobs",
        "postgresql://me:pass@w0rd@db/jobs",
        "postgresql://db/jobs?user=me&password=w0rd",
        "postgresql://me:pass?w0rd@db/jobs",
        "host=db password=w0rd",
        "postgresql://me:pass%40@db/jobs?sslpassword=w0rd@x",
    ],
)
def test_no_part_of_a_database_password_is_printed(url: str) -> None:
    printed = JobSettings(database_url=url).model_dump_json(include={"database_url"}).partition(":")[2]
    assert "pass" not in printed
    assert "w0rd" not in printed
    assert printed.startswith('"postgresql://') or url.startswith("host=")


@pytest.mark.parametrize("secret", ["whsec_c2hvcnQ=", "not base64!", "whsec_" + "QUFB" * 40])
def test_an_invalid_signing_secret_is_refused_and_not_shown(secret: str) -> None:
    with pytest.raises(ConfigError, match=r"STABLE_AUDIO_WEBHOOK_SECRET: .*whsec_ followed by") as caught:
        load_settings(environ={"STABLE_AUDIO_WEBHOOK_SECRET": secret})
    assert secret not in str(caught.value)


def test_a_valid_signing_secret_is_accepted_and_hidden() -> None:
    secret = "whsec_" + "QUFB" * 8
    settings = load_settings(environ={"STABLE_AUDIO_WEBHOOK_SECRET": secret})
    assert settings.jobs.webhook_secret is not None
    assert settings.jobs.webhook_secret.get_secret_value() == secret
    assert secret not in settings.model_dump_json()
