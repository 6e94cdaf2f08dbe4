"""The options of Ray Serve deployments that follow from the settings: replica counts, limits and resources."""

from __future__ import annotations

import json
import os
import platform
import resource
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest

from stable_audio_serve.core.errors import ConfigError
from stable_audio_serve.core.settings import ModelSettings, Settings
from stable_audio_serve.engine import EngineOptions
from stable_audio_serve.serving import placement
from stable_audio_serve.serving.placement import ingress_options, model_options, plan_deployments, runner_options
from stable_audio_serve.serving.reservations import Slot, decide_surge, require_room


def make_options(*models: dict[str, Any], cluster_gpus: float = 0, **settings: Any) -> dict[str, dict[str, Any]]:
    plan = plan_deployments(Settings.model_validate({"models": models, **settings}))
    return {model.name: model_options(plan, model, cluster_gpus=cluster_gpus) for model in plan.settings.models}


def gpus(*models: dict[str, Any], **settings: Any) -> list[float]:
    return [options["ray_actor_options"]["num_gpus"] for options in make_options(*models, **settings).values()]


SFX: dict[str, Any] = {"name": "small-sfx"}
MUSIC: dict[str, Any] = {"name": "small-music"}


def test_preloaded_models_have_a_replica_and_others_start_at_zero() -> None:
    options = make_options(SFX, MUSIC)
    assert options["small-sfx"]["autoscaling_config"]["min_replicas"] == 1
    assert options["small-music"]["autoscaling_config"]["min_replicas"] == 0


def test_models_are_preloaded_by_alias_or_not_at_all() -> None:
    both = make_options(SFX, MUSIC, preload_models=["stable-audio-3-small-music"])
    assert [o["autoscaling_config"]["min_replicas"] for o in both.values()] == [0, 1]
    none = make_options(SFX, MUSIC, preload_models=[])
    assert [o["autoscaling_config"]["min_replicas"] for o in none.values()] == [0, 0]


def test_settings_decide_replica_counts_and_delays() -> None:
    counts = {"min_replicas": 2, "max_replicas": 5}
    waits = {"target_wait_s": 3, "upscale_delay_s": 1, "downscale_delay_s": 60}
    options = make_options(SFX | {"replicas": counts | waits})
    scaling = options["small-sfx"]["autoscaling_config"]
    assert {key: scaling[key] for key in counts} == counts
    assert scaling["policy"]["policy_kwargs"] == {"target_wait_s": 3}
    assert (scaling["upscale_delay_s"], scaling["downscale_delay_s"]) == (1, 60)


def test_serve_limits_leave_admission_to_the_engine() -> None:
    options = make_options(SFX)["small-sfx"]
    assert options["max_ongoing_requests"] >= 2 * EngineOptions().max_rows
    assert options["max_queued_requests"] > 0


def test_stopping_replica_may_finish_the_longest_request() -> None:
    settings = Settings.model_validate({"models": [SFX], "api": {"max_deadline_s": 777}})
    plan = plan_deployments(settings)
    (model,) = settings.models
    for options in (ingress_options(settings), model_options(plan, model, cluster_gpus=0)):
        assert options["graceful_shutdown_timeout_s"] == 777


def environment(model: dict[str, Any], *, cluster_gpus: float) -> dict[str, str]:
    (options,) = make_options(model, cluster_gpus=cluster_gpus).values()
    found: dict[str, str] = options["ray_actor_options"]["runtime_env"].get("env_vars", {})
    return found


# In this program, a thread allocates and fills the same blocks of 8 to 72 MiB three times. The program prints the page
# faults of the third time.
_BLOCKS = """
import resource, threading
def use_blocks():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [bytearray(size << 20) for size in (8, 40, 72)]
    blocks[1] = None
    blocks.append(bytearray(24 << 20))
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
faults = []
thread = threading.Thread(target=lambda: [use_blocks() for _ in range(3)])
thread.start()
thread.join()
print(faults[2])
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="Ray has the allocator on Linux only")
@pytest.mark.skipif(" " in sys.prefix, reason="the loader would split the path of the allocator")
def test_a_replica_on_a_cpu_reuses_freed_memory() -> None:
    def third_faults(variables: dict[str, str]) -> int:
        command = [sys.executable, "-c", _BLOCKS]
        return int(subprocess.run(command, capture_output=True, text=True, check=True, env=variables).stdout)

    assert third_faults({}) > 10_000
    assert third_faults(environment(SFX, cluster_gpus=0)) < 1_000


@pytest.mark.server
@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="Ray has the allocator on Linux only")
def test_memory_does_not_grow_with_the_number_of_prompts() -> None:
    command = [sys.executable, "-m", "tests.serving.memory_process", "1500"]
    variables = os.environ | environment(SFX, cluster_gpus=0) | {"OMP_NUM_THREADS": "1"}
    folder = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=variables, cwd=folder)
    first, *_, last = json.loads(done.stdout)
    assert last <= 1.1 * first  # the cache of prompts takes 2 %


def test_a_replica_on_a_gpu_has_the_usual_environment() -> None:
    assert environment(SFX, cluster_gpus=1) == {}


def test_a_replica_without_a_reserved_gpu_sees_none() -> None:
    hidden = ("CUDA_VISIBLE_DEVICES", "")
    assert hidden in environment(SFX | {"num_gpus": 0}, cluster_gpus=1).items()
    assert hidden in environment(SFX, cluster_gpus=0).items()  # a machine with a GPU may join the cluster later
    assert hidden not in environment(SFX | {"num_gpus": 0, "device": "cuda"}, cluster_gpus=1).items()


def test_a_numbered_gpu_is_refused_because_a_replica_sees_one_gpu() -> None:
    with pytest.raises(ConfigError, match=r"models.small-sfx: .*cuda:1.*CUDA_VISIBLE_DEVICES"):
        gpus(SFX | {"device": "cuda:1"}, cluster_gpus=2)
    with pytest.raises(ConfigError, match="CUDA_VISIBLE_DEVICES"):
        gpus(SFX | {"num_gpus": 1}, cluster_gpus=2, device="cuda:1")
    assert gpus(SFX | {"device": "cuda:0"}, cluster_gpus=2) == [1]


def test_an_allocator_that_the_user_preloads_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_PRELOAD", "/opt/lib/libtcmalloc.so")
    assert environment(SFX, cluster_gpus=0) == {"CUDA_VISIBLE_DEVICES": ""}


@pytest.mark.parametrize("name", ["my music", "a:b"])
def test_a_path_that_the_loader_would_split_is_not_preloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    library = tmp_path / name / "ray" / "core" / "libjemalloc.so"
    library.parent.mkdir(parents=True)
    library.touch()
    found = ModuleSpec("ray", None, is_package=True)
    found.submodule_search_locations = [str(library.parents[1])]
    monkeypatch.setattr(placement, "find_spec", lambda name: found)
    assert environment(SFX, cluster_gpus=0) == {"CUDA_VISIBLE_DEVICES": ""}


def test_pages_that_the_allocator_does_not_support_keep_the_usual_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sysconf", lambda name: 65536)
    assert environment(SFX, cluster_gpus=0) == {"CUDA_VISIBLE_DEVICES": ""}


def test_a_gpu_is_reserved_only_if_there_is_one() -> None:
    assert gpus(SFX) == [0]
    assert gpus(SFX, cluster_gpus=1) == [1]
    assert gpus(SFX, MUSIC, cluster_gpus=8) == [1, 1]


def test_models_share_scarce_gpus_and_always_fit() -> None:
    shares = gpus(SFX, MUSIC, {"name": "medium"}, cluster_gpus=1)
    assert shares == [0.3333] * 3
    # No replica spans two GPUs, so three replicas cannot have two thirds of a GPU each on two GPUs.
    assert gpus(SFX | {"replicas": {"min_replicas": 2, "max_replicas": 2}}, MUSIC, cluster_gpus=2) == [0.5] * 2
    assert gpus(*({"name": name, "path": "/models"} for name in "abcde"), cluster_gpus=4) == [0.5] * 5
    assert gpus(*({"name": name, "path": "/models"} for name in "abcde"), cluster_gpus=2) == [0.3333] * 5
    assert gpus(SFX | {"num_gpus": 0.5}, MUSIC, {"name": "medium"}, cluster_gpus=2) == [0.5, 0.5, 0.5]
    assert gpus(SFX | {"num_gpus": 0.4}, MUSIC, {"name": "medium"}, cluster_gpus=2) == [0.4, 0.6, 0.6]
    assert gpus(SFX | {"num_gpus": 0.4}, MUSIC, {"name": "medium"}, cluster_gpus=1) == [0.4, 0.3, 0.3]


def test_settings_decide_gpus_and_cpu_models_reserve_none() -> None:
    assert gpus(SFX | {"num_gpus": 0.25}, cluster_gpus=1) == [0.25]
    assert gpus(SFX | {"device": "cpu"}, cluster_gpus=1) == [0]
    assert gpus(SFX, cluster_gpus=1, device="cpu") == [0]
    assert gpus(SFX | {"device": "cuda", "num_gpus": 1}) == [1]


def test_cpu_models_leave_the_gpu_to_others() -> None:
    assert gpus(SFX | {"device": "cpu"}, MUSIC, cluster_gpus=1) == [0, 1]


def test_cuda_without_a_gpu_is_refused() -> None:
    with pytest.raises(ConfigError, match="small-sfx"):
        gpus(SFX, device="cuda")


def test_an_embedded_ray_counts_enough_cpus_for_every_replica() -> None:
    many = plan_deployments(
        Settings.model_validate({"models": [SFX | {"num_cpus": 3, "replicas": {"max_replicas": 100}}]})
    )
    assert many.num_cpus == 300
    few = plan_deployments(Settings.model_validate({"models": [SFX]}))
    assert few.num_cpus == max(os.cpu_count() or 1, 1)


def test_unknown_names_are_refused_by_variable() -> None:
    with pytest.raises(ConfigError, match="STABLE_AUDIO_PRELOAD_MODELS"):
        plan_deployments(Settings.model_validate({"models": [SFX], "preload_models": ["medium"]}))


def test_serve_never_queues_requests_before_the_ingress() -> None:
    options = ingress_options(Settings.model_validate({"ingress": {"replicas": 3, "max_ongoing_requests": 9}}))
    assert options["num_replicas"] == 3
    most_connections = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    assert options["max_ongoing_requests"] > min(most_connections, 65_536)
    assert options.get("max_queued_requests", -1) == -1


@pytest.mark.parametrize(
    ("replicas", "cpus", "most"), [(2, (8, 8), 1), (3, (8, 8), 2), (5, (8, 8, 8), 3), (300, (8, 8), 100)]
)
def test_loss_of_one_node_leaves_ingress_and_runners(replicas: int, cpus: tuple[int, ...], most: int) -> None:
    settings = Settings.model_validate({"ingress": {"replicas": replicas}, "jobs": {"runners": replicas}})
    nodes = [Slot(0.0, float(number)) for number in cpus]
    for options in (ingress_options(settings, nodes), runner_options(settings, nodes)):
        assert options["max_replicas_per_node"] == most


@pytest.mark.parametrize(("replicas", "cpus"), [(1, (8, 8)), (2, (8,)), (2, (8, 0)), (2, ())])
def test_replicas_share_a_node_if_there_is_only_one(replicas: int, cpus: tuple[int, ...]) -> None:
    ingress = {"replicas": replicas, "num_cpus": 0.9}
    settings = Settings.model_validate({"ingress": ingress, "jobs": {"runners": replicas}})
    nodes = [Slot(0.0, float(number)) for number in cpus]
    for options in (ingress_options(settings, nodes), runner_options(settings, nodes)):
        assert "max_replicas_per_node" not in options


def test_folders_are_relative_to_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    plan = plan_deployments(Settings(models=(ModelSettings(name="mine", path="model"),), output_dir="out"))
    assert plan.settings.output_dir == str(tmp_path / "out")
    assert plan.settings.models[0].path == str(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_folders_may_be_in_the_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    plan = plan_deployments(Settings(models=(ModelSettings(name="mine", path="~/model"),), output_dir="~/out"))
    assert plan.settings.output_dir == str(tmp_path / "out")
    assert plan.settings.models[0].path == str(tmp_path / "model")


def test_unusable_database_stops_startup() -> None:
    with pytest.raises(ConfigError, match="database_url") as caught:
        make_options({"name": "demo"}, jobs={"database_url": "mysql://u:secret@db/jobs"})
    assert "secret" not in caught.value.message


ONE_GPU, TWO_GPUS = Slot(1, 16), Slot(2, 16)


def surges(nodes: list[Slot], *models: dict[str, Any], **settings: Any) -> list[bool | None]:
    plan = plan_deployments(Settings.model_validate({"models": models, **settings}))
    decided = decide_surge(plan.settings, nodes, cluster_gpus=sum(node.gpus for node in nodes))
    return [model.replicas.surge for model in decided.models]


def test_update_starts_the_new_replica_first_on_a_spare_gpu() -> None:
    whole = SFX | {"num_gpus": 1}
    assert surges([ONE_GPU], whole) == [False]
    assert surges([TWO_GPUS], whole) == [True]
    assert surges([ONE_GPU, ONE_GPU], whole) == [True]
    assert surges([TWO_GPUS], whole | {"replicas": {"max_replicas": 2}}) == [False]
    assert surges([ONE_GPU], SFX | {"num_gpus": 0.5}) == [True]
    assert surges([ONE_GPU], SFX) == [False]  # on a single GPU, a replica gets all of it by default


def test_two_half_gpus_do_not_make_a_whole() -> None:
    halves = {"num_gpus": 0.5, "replicas": {"max_replicas": 1}}
    for nodes in ([ONE_GPU, ONE_GPU], [TWO_GPUS]):
        assert surges(nodes, SFX | halves, MUSIC | {"num_gpus": 1}) == [True, False]
    assert surges([TWO_GPUS], *(model | halves | {"num_gpus": 0.6} for model in (SFX, MUSIC))) == [False, False]


def test_no_surge_without_room_for_all_replicas() -> None:
    assert surges([TWO_GPUS], SFX | {"num_gpus": 0.5}, MUSIC | {"num_gpus": 1, "replicas": {"max_replicas": 9}}) == [
        False,
        False,
    ]


def test_surge_needs_more_cpus_than_the_ingress_uses() -> None:
    assert surges([Slot(0, 2)], SFX) == [True]
    assert surges([Slot(0, 2)], SFX, MUSIC) == [False, False]
    assert surges([Slot(0, 2)], SFX, ingress={"replicas": 2, "num_cpus": 0.5}) == [False]


def test_surge_setting_overrides_the_decision() -> None:
    options = [SFX | {"num_gpus": 1, "replicas": {"surge": surge}} for surge in (True, False)]
    assert [surges([], option) for option in options] == [[True], [False]]
    assert surges([TWO_GPUS], options[1]) == [False]


def test_embedded_ray_counts_cpus_for_a_configured_surge() -> None:
    model = SFX | {"num_cpus": 100, "replicas": {"surge": True}}
    assert plan_deployments(Settings.model_validate({"models": [model]})).num_cpus == 200
    assert make_options(model)["small-sfx"]["max_surge_percent"] == 1
    assert make_options(SFX)["small-sfx"]["max_surge_percent"] == 0


def refused_room(*models: dict[str, Any], gpus: float = 1.0) -> str:
    """Return the error of `require_room` on one machine with this many GPUs; empty if there is room."""
    plan = plan_deployments(Settings.model_validate({"models": models}))
    try:
        require_room(plan.settings, [Slot(gpus, plan.num_cpus)], least=plan.least_replicas, cluster_gpus=gpus)
    except ConfigError as error:
        return error.message
    return ""


def test_a_model_that_could_never_be_placed_is_refused() -> None:
    whole, idle = SFX | {"num_gpus": 1}, MUSIC | {"replicas": {"min_replicas": 0}}
    assert refused_room(SFX, MUSIC) == ""  # equal shares
    assert refused_room(whole) == ""
    assert "models.small-music: 1 replica(s) with num_gpus 1 do not fit on 1 GPU(s)" in refused_room(whole, idle)
    assert refused_room(whole, idle, gpus=2) == ""
    assert "other models reserve 1" in refused_room(whole, MUSIC | {"num_gpus": 0.5})
    assert "models.small-sfx: 2 replica(s)" in refused_room(
        whole | {"replicas": {"min_replicas": 2, "max_replicas": 2}}
    )
    assert "0 GPU(s)" in refused_room(whole, gpus=0)
    one = {"num_gpus": 0.6, "replicas": {"min_replicas": 1}}
    shared = [model | one for model in (SFX, MUSIC, {"name": "medium"})]
    assert "1 replica(s) with num_gpus 0.6" in refused_room(*shared, gpus=2)  # no replica spans two GPUs
    assert refused_room({"name": "medium", "num_gpus": 2}, SFX | {"num_gpus": 0.5}, gpus=3) == ""
