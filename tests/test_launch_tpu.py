import json
import sys
from dataclasses import replace

import fake_store
import fake_trainer
import launching
import pytest
from launching import finish

from prime_jax.errors import UserError
from prime_jax.hardware import slices
from prime_jax.launch import archive, cloud, engine, tpu
from prime_jax.launch.tpu import Options

pytest.importorskip("google.cloud.tpu_v2", reason="pip install 'prime_jax[gcp]'")
import fake_tpu
import grpc
from google.api_core import exceptions
from google.cloud import tpu_v2

OPTIONS = Options(project="p", zone="us-west4-a", spot=True, data="gs://bucket/data")
V5E = slices.parse("v5e-16")


@pytest.fixture(scope="module")
def packed():
    return archive.pack()


@pytest.fixture
def service(monkeypatch, packed):
    fake = fake_tpu.FakeTpu()
    monkeypatch.setattr(archive, "pack", lambda: packed)
    with fake_tpu.serve(fake) as client:
        monkeypatch.setattr(tpu, "client", lambda: client)
        yield fake


@pytest.fixture
def sweep(tmp_path):
    """Eight runs, at most three machines; their files stay in a local folder."""
    fake_trainer.planned(tmp_path / "sweep")
    return engine.Sweep("gs://bucket/sweep", tmp_path / "sweep", 3, V5E)


def up(sweep, options=OPTIONS) -> str:
    return launching.printed(tpu.up, sweep, options)


def down(sweep) -> str:
    return launching.printed(tpu.down, sweep, OPTIONS)


def test_up_makes_what_is_missing_and_says_what_it_costs(service, sweep, packed):
    text = up(sweep)
    assert len(service.resources) == 3
    assert "72.00 USD per hour" in text  # 3 machines of 16 chips
    assert (sweep.notes / packed.name).read_bytes() == packed.data
    for full, one in service.resources.items():
        name = full.rpartition("/")[2]
        assert name.startswith(f"{sweep.name}-v5e-16-")
        node = one.tpu.node_spec[0].node
        assert (node.accelerator_type, node.runtime_version) == (
            "v5litepod-16",
            "v2-alpha-tpuv5-lite",
        )
        assert "spot" in one
        assert f"export PRIME_NAME={name}\n" in node.metadata["startup-script"]
    up(sweep)
    assert len(service.resources) == 3, "the second time changes nothing"


def test_it_says_where_newer_chips_are(service, sweep):
    assert "maintenance" not in up(sweep), "v5e is nowhere else"
    text = up(replace(sweep, only=slices.parse("v6e-16")))
    assert "in maintenance (fixes only); v6e-16 is also on Compute Engine: --on gce" in text
    assert "maintenance" not in up(replace(sweep, only=slices.parse("v6e-16"))), "nothing to do"


def test_no_more_machines_than_open_runs(service, sweep):
    finish(sweep, leave=1)
    up(sweep)
    assert len(service.resources) == 1


def test_machines_wait_for_quota(service, sweep):
    service.quota = 32
    up(sweep)
    service.settle()
    assert sorted(service.states().values()) == ["ACTIVE", "ACTIVE", "WAITING_FOR_RESOURCES"]
    up(sweep)
    assert len(service.resources) == 3, "a machine that waits is not missing"


def test_a_preempted_machine_is_deleted_before_it_is_replaced(service, sweep):
    service.quota = 48
    up(sweep)
    service.settle()
    lost = min(service.states())
    service.preempt(lost)
    assert service.held() == 48, "SUSPENDED holds quota"
    service.log.clear()
    up(sweep)
    changes = [(method, name) for method, name in service.log if method != "list"]
    assert changes[0] == ("delete", lost)
    assert [method for method, _ in changes] == ["delete", "create"]
    assert lost not in service.states(), "under a fresh name"
    service.settle()
    assert list(service.states().values()) == ["ACTIVE"] * 3


def test_what_failed_is_shown_in_the_clouds_words_and_replaced(service, sweep):
    up(sweep)
    broken = min(service.states())
    service.break_(broken, "Quota limit 'TPUV5sPreemptibleLitepodPerProject' has been exceeded.")
    text = up(sweep)
    assert "Quota limit 'TPUV5sPreemptibleLitepodPerProject' has been exceeded." in text
    assert broken not in service.states()
    assert len(service.states()) == 3


def test_an_idle_machine_is_deleted_and_a_working_one_is_not(service, sweep):
    up(sweep)
    service.settle()
    finish(sweep, leave=1)
    idle, *working = sorted(service.states())
    (sweep.notes / f"{idle}.idle").write_text("exit code 0\n")
    up(sweep)
    assert sorted(service.states()) == working, "the other one leaves by itself"


def test_machines_that_still_wait_go_when_there_is_nothing_for_them(service, sweep):
    up(sweep)
    finish(sweep, leave=0)
    up(sweep)
    assert service.states() == {}


def test_machines_that_cannot_work_stop_the_making_of_more(service, sweep):
    up(sweep)
    service.settle()
    broken = min(service.states())
    (sweep.notes / f"{broken}.failed").write_text("host 0: installing failed\n")
    with pytest.raises(UserError, match=r"host 0: installing failed.*--again"):
        up(sweep)
    assert broken not in service.states(), "it costs and does nothing"
    assert len(service.states()) == 2
    up(sweep, replace(OPTIONS, again=True))
    assert len(service.states()) == 3
    up(sweep)


def test_a_drawn_name_that_exists_is_drawn_again(service, sweep, monkeypatch):
    drawn = iter(["aaaa", "aaaa", "bbbb", "bbbb", "cccc"])
    monkeypatch.setattr(cloud.secrets, "token_hex", lambda n: next(drawn))
    up(sweep)
    assert [name[-4:] for name in sorted(service.states())] == ["aaaa", "bbbb", "cccc"]


def test_a_crash_after_creation_leaves_nothing_twice(service, sweep, monkeypatch):
    made = cloud._create

    def dies(*arguments):
        made(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(cloud, "_create", dies)
    with pytest.raises(KeyboardInterrupt):
        up(sweep)
    assert len(service.states()) == 1
    monkeypatch.setattr(cloud, "_create", made)
    up(sweep)
    assert len(service.states()) == 3


def test_a_crash_between_deletion_and_creation(service, sweep, monkeypatch):
    up(sweep)
    service.settle()
    service.preempt(min(service.states()))
    service.fail["create"] = (grpc.StatusCode.UNAVAILABLE, "try later")
    with pytest.raises(UserError, match="try later"):
        up(sweep)
    assert len(service.states()) == 2
    up(sweep)
    assert len(service.states()) == 3


@pytest.mark.parametrize(
    ("method", "code", "words"),
    [
        ("create", grpc.StatusCode.PERMISSION_DENIED, "Permission 'tpu.nodes.create' denied"),
        ("create", grpc.StatusCode.RESOURCE_EXHAUSTED, "Quota exceeded for quota metric 'cores'"),
        ("list", grpc.StatusCode.PERMISSION_DENIED, "Cloud TPU API has not been used in project p"),
        ("list", grpc.StatusCode.NOT_FOUND, "Location us-west4-z is not found"),
    ],
)
def test_refusals_in_the_clouds_own_words(service, sweep, method, code, words):
    service.fail[method] = (code, words)
    with pytest.raises(UserError, match=words) as caught:
        up(sweep)
    assert "\n" not in str(caught.value)


def test_no_credentials(sweep, monkeypatch, tmp_path):
    for name in ("GOOGLE_APPLICATION_CREDENTIALS", "CLOUDSDK_CONFIG"):
        monkeypatch.setenv(name, str(tmp_path / "nowhere"))
    monkeypatch.setenv("NO_GCE_CHECK", "True")  # no look for a metadata server
    with pytest.raises(UserError, match="gcloud auth application-default login"):
        up(sweep)


def test_a_missing_library_is_one_line_with_the_command(sweep, monkeypatch):
    monkeypatch.delattr("google.cloud.tpu_v2")
    monkeypatch.setitem(sys.modules, "google.cloud.tpu_v2", None)
    with pytest.raises(UserError, match=r"google-cloud-tpu: pip install 'prime_jax\[gcp\]'"):
        up(sweep)


def test_down_removes_this_sweeps_machines_and_no_others(service, sweep, tmp_path):
    other = replace(sweep, root="gs://bucket/other", workers=1)
    up(other)
    up(sweep)
    service.settle()
    service.preempt(min(name for name in service.states() if name.startswith(sweep.name)))
    assert "nothing is left" in down(sweep)
    assert [name[:12] for name in service.states()] == [other.name]
    assert "nothing of this sweep" in down(sweep)


def test_nothing_is_made_without_consent(service, sweep):
    here, lines = launching.dialogue(yes=False)
    tpu.up(sweep, OPTIONS, here)
    assert lines
    assert service.states() == {}


def test_watch_replaces_what_is_taken_away_until_all_is_done(service, sweep, monkeypatch):
    passes = iter(range(100))

    def meanwhile(seconds):
        index = next(passes)
        service.settle()
        if index == 0:
            service.preempt(min(service.states()))
        if index == 1:
            assert list(service.states().values()) == ["ACTIVE"] * 3
            service.fail["list"] = (grpc.StatusCode.UNAVAILABLE, "a hiccup")
        if index == 3:
            finish(sweep, leave=0)
            service.resources.clear()  # each deletes itself

    monkeypatch.setattr(cloud.time, "sleep", meanwhile)
    # The client itself would retry a hiccup for minutes.
    text = up(sweep, replace(OPTIONS, watch=True))
    assert service.states() == {}
    assert text.count("requested") == 4
    assert next(passes) == 4


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"project": ""}, "--project"),
        ({"zone": ""}, "--zone"),
        ({"reservation": "r"}, "--spot and --reservation"),
        ({"valid_until": "tomorrow"}, "--valid-until"),
    ],
)
def test_bad_options(service, sweep, changed, message):
    with pytest.raises(UserError, match=message):
        up(sweep, replace(OPTIONS, **changed))
    assert service.log == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: r["tpu"]["node_spec"][0].update(parent="projects/q/locations/z"), "parent"),
        (lambda r: r["tpu"]["node_spec"][0].update(node_id="x" * 64), "63"),
        (lambda r: r["tpu"]["node_spec"][0]["node"].pop("runtime_version"), "runtime_version"),
        (lambda r: r.update(reservation_name="projects/p/locations/z/reservations/r"), "spot"),
    ],
)
def test_the_server_rejects_what_the_real_one_rejects(service, sweep, change, words):
    pool = sweep.pools()[0]
    good = tpu.request(pool, OPTIONS, "a", "gs://code")
    change(good)
    where = {"parent": tpu.parent_of(OPTIONS), "queued_resource_id": "a"}
    with pytest.raises(exceptions.InvalidArgument, match=words):
        tpu.client().create_queued_resource(**where, queued_resource=good)


@pytest.mark.parametrize(
    ("name", "accelerator", "runtime"),
    [
        ("v4-8", "v4-8", "tpu-ubuntu2204-base"),
        ("v5p-128", "v5p-128", "v2-alpha-tpuv5"),
        ("v6e-256", "v6e-256", "v2-alpha-tpuv6e"),
    ],
)
def test_the_clouds_names(service, sweep, name, accelerator, runtime):
    sweep = replace(sweep, only=slices.parse(name))
    up(sweep, replace(OPTIONS, spot=False, reservation="mine", valid_until="6h"))
    one = next(iter(service.resources.values()))
    node = one.tpu.node_spec[0].node
    assert (node.accelerator_type, node.runtime_version) == (accelerator, runtime)
    assert one.reservation_name == "projects/p/locations/us-west4-a/reservations/mine"
    assert "guaranteed" in one
    assert node.scheduling_config.reserved
    assert one.queueing_policy.valid_until_duration.total_seconds() == 6 * 3600


def test_several_slices_are_one_request(service, sweep):
    up(replace(sweep, only=slices.parse("2xv6e-256"), workers=1))
    (full, one), *rest = service.resources.items()
    assert not rest
    params = one.tpu.node_spec[0].multislice_params
    assert (params.node_count, params.node_id_prefix) == (2, full.rpartition("/")[2])
    assert len(f"{params.node_id_prefix}-0") <= 63


def test_slices_that_are_no_tpu_vms(service, sweep):
    for name, words in (("tpu7x-8", "--on gce"), ("h100-8", "GPUs")):
        with pytest.raises(UserError, match=words):
            up(replace(sweep, only=slices.parse(name)))
    with pytest.raises(UserError, match="--slice"):
        up(replace(sweep, only=None))


def test_finished_runs_without_a_slice_are_no_mistake(service, sweep):
    finish(sweep, leave=0)
    up(replace(sweep, only=None))
    assert service.states() == {}


def test_a_local_root_is_refused(service, sweep):
    with pytest.raises(UserError, match="gs://"):
        up(replace(sweep, root="/home/me/sweep"))


def test_render_is_what_up_sends(service, sweep):
    files = tpu.render(sweep, OPTIONS)
    request = json.loads(files[f"{sweep.name}-v5e-16-request.json"])
    script = files[f"{sweep.name}-v5e-16-startup.sh"]
    request["tpu"]["node_spec"][0]["node"]["metadata"]["startup-script"] = script
    finish(sweep, leave=1)
    up(sweep)
    (full, sent), *_ = service.resources.items()
    name = full.rpartition("/")[2]
    text = json.dumps(request).replace(f"{sweep.name}-v5e-16-0000", name)
    expected = tpu_v2.QueuedResource(json.loads(text))
    sent = tpu_v2.QueuedResource({"tpu": sent.tpu, "spot": {}})
    assert tpu_v2.QueuedResource.to_dict(sent) == tpu_v2.QueuedResource.to_dict(expected)


def test_from_the_command_line_with_the_sweep_in_a_bucket(service, packed, capsys):
    from prime_jax import cli
    from prime_jax.runtime import storage

    where = ["--project", "p", "--zone", "us-west4-a"]
    with fake_store.bucket("gs") as bucket:
        root = storage.path(bucket.url)
        fake_trainer.planned(root)
        up = ["sweep", "up", bucket.url, "--on", "tpu", "--slice", "v5e-16", "--workers", "2"]
        up += [*where, "--data", "gs://bucket/data", "--yes"]
        assert cli.main(up) == 0
        assert "2 x v5e-16" in capsys.readouterr().out
        assert storage.read(root / "launch" / packed.name) == packed.data
        script = next(iter(service.resources.values())).tpu.node_spec[0].node.metadata
        assert f"PRIME_ROOT={bucket.url}\n" in script["startup-script"]
        storage.write(root / "launch" / f"{min(service.states())}.failed", b"no disk")
        assert cli.main(up) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "no disk" in line
        service.fail["list"] = (grpc.StatusCode.PERMISSION_DENIED, "you may not")
        assert cli.main([*up, "--again"]) == 2
        assert capsys.readouterr().err == "prime-jax: Cloud TPU: you may not\n"
        bucket.store.denied = True
        assert cli.main([*up, "--again"]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
        assert cli.main(["sweep", "down", bucket.url, "--on", "tpu", *where, "--yes"]) == 0
    assert service.states() == {}
