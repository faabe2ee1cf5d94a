"""`--on gce` with the real client of Compute Engine against a loopback server."""

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
from prime_jax.launch import archive, cloud, engine, gce
from prime_jax.launch.gce import Options

pytest.importorskip("google.cloud.compute_v1", reason="pip install 'prime_jax[gcp]'")
import fake_gce
from google.api_core import exceptions
from google.cloud import compute_v1

OPTIONS = Options(project="p", zone=fake_gce.ZONE, spot=True, data="gs://bucket/data")
FLEX = replace(OPTIONS, spot=False, flex_start="3d")
V6E, ONE_HOST = slices.parse("v6e-16"), slices.parse("v6e-8")


@pytest.fixture(scope="module")
def packed():
    return archive.pack()


@pytest.fixture
def service(monkeypatch, packed):
    fake = fake_gce.FakeGce()
    monkeypatch.setattr(archive, "pack", lambda: packed)
    with fake_gce.serve(fake) as clients:
        monkeypatch.setattr(gce, "client", lambda: clients)
        yield fake


@pytest.fixture
def sweep(tmp_path):
    """Eight runs, at most two machines; their files stay in a local folder."""
    fake_trainer.planned(tmp_path / "sweep")
    return engine.Sweep("gs://bucket/sweep", tmp_path / "sweep", 2, V6E)


def up(sweep, options=OPTIONS) -> str:
    return launching.printed(gce.up, sweep, options)


def down(sweep) -> str:
    return launching.printed(gce.down, sweep, OPTIONS)


def test_up_makes_a_policy_a_template_and_a_group_for_each_worker(service, sweep, packed):
    text = up(sweep)
    assert "80.00 USD per hour" in text  # 2 machines of 16 chips
    assert (sweep.notes / packed.name).read_bytes() == packed.data
    names = service.groups
    assert len(names) == 2
    assert service.names("instanceTemplates") == service.names("resourcePolicies") == names
    assert all(name.startswith(f"{sweep.name}-v6e-16-") for name in names)
    base = f"projects/p/zones/{fake_gce.ZONE}/instanceGroupManagers"
    group = service.found[f"{base}/{names[0]}"]
    assert (group["targetSize"], group["targetSizePolicy"]) == (4, {"mode": "BULK"})
    policy = service.found[group["resourcePolicies"]["workloadPolicy"]]
    assert policy["workloadPolicy"] == {"type": "HIGH_THROUGHPUT", "acceleratorTopology": "4x4"}
    properties = service.found[group["instanceTemplate"]]["properties"]
    assert properties["machineType"] == "ct6e-standard-4t"
    assert properties["scheduling"]["provisioningModel"] == "SPOT"
    (item,) = properties["metadata"]["items"]
    assert f"export PRIME_NAME={names[0]}\n" in item["value"]
    assert "export PRIME_HOSTS=4\n" in item["value"]
    assert f"instance-groups managed delete {names[0]} --project p --zone" in item["value"]
    service.settle()
    assert list(service.states().values()) == ["ACTIVE", "ACTIVE"]
    before = service.everything()
    assert "ACTIVE, ACTIVE" in up(sweep)
    assert service.everything() == before, "the second time changes nothing"


def test_one_host_needs_no_policy(service, sweep):
    up(replace(sweep, only=ONE_HOST))
    assert len(service.groups) == 2
    assert service.names("resourcePolicies") == []
    group = service._group(service.groups[0])
    assert group["targetSize"] == 1
    assert "targetSizePolicy" not in group


@pytest.mark.parametrize(
    ("options", "scheduling", "affinity"),
    [
        ({}, {"provisioningModel": "STANDARD"}, None),
        (
            {"spot": True},
            {
                "provisioningModel": "SPOT",
                "instanceTerminationAction": "STOP",
                "automaticRestart": False,
            },
            None,
        ),
        (
            {"reservation": "mine"},
            {"provisioningModel": "RESERVATION_BOUND", "instanceTerminationAction": "DELETE"},
            ["mine"],
        ),
        (
            {"flex_start": "12h"},
            {
                "provisioningModel": "FLEX_START",
                "instanceTerminationAction": "DELETE",
                "maxRunDuration": {"seconds": "43200"},
            },
            [],
        ),
    ],
)
def test_how_hosts_are_rented(service, sweep, options, scheduling, affinity):
    up(replace(sweep, workers=1), replace(OPTIONS, **{"spot": False} | options))
    properties = service._template(service._group(service.groups[0]))["properties"]
    assert properties["scheduling"] == {"onHostMaintenance": "TERMINATE", **scheduling}
    found = properties.get("reservationAffinity")
    assert (found and found.get("values", [])) == affinity


@pytest.mark.parametrize(
    "name", ["v5p-8", "v5p-32", "v6e-4", "v6e-8", "v6e-64", "tpu7x-8", "tpu7x-64"]
)
def test_topologies_fit_their_machines(service, sweep, name):
    where = slices.parse(name)
    up(replace(sweep, workers=1, only=where))
    group = service._group(service.groups[0])
    assert group["targetSize"] == where.hosts
    assert service.chips(group) * where.hosts == where.chips


def test_a_resize_request_waits_and_is_granted(service, sweep):
    service.capacity = 8
    one = replace(sweep, only=ONE_HOST)
    up(one, FLEX)
    assert len(service.names("resizeRequests")) == 2
    service.settle()
    assert sorted(service.states().values()) == ["ACTIVE", "WAITING"]
    before = service.everything()
    assert fake_gce.STOCKOUT[1] in up(one, FLEX), "the cloud's reason for waiting"
    assert service.everything() == before, "what waits is not missing"
    service.capacity += 8
    service.settle()
    assert list(service.states().values()) == ["ACTIVE", "ACTIVE"]


def test_several_hosts_of_flex_start_wait_in_bulk_mode(service, sweep):
    service.capacity = 15
    up(replace(sweep, workers=1), FLEX)
    assert service.names("resizeRequests") == []
    service.settle()
    assert list(service.states().values()) == ["WAITING"]
    service.capacity = 16
    service.settle()
    assert list(service.states().values()) == ["ACTIVE"]


@pytest.mark.parametrize("where", [V6E, ONE_HOST])
def test_when_flex_start_is_over_there_is_a_new_machine(service, sweep, where):
    sweep = replace(sweep, workers=1, only=where)
    up(sweep, FLEX)
    service.settle()
    (old,) = service.groups
    service.end(old)
    assert f"delete {old}: ENDED" in up(sweep, FLEX)
    (new,) = service.groups
    assert new != old


def test_a_stockout_is_shown_in_the_clouds_words_and_waited_for(service, sweep):
    service.capacity = 0
    up(sweep)
    service.settle()
    before = service.everything()
    assert "ZONE_RESOURCE_POOL_EXHAUSTED_WITH_DETAILS: Waiting for resources." in up(sweep)
    assert service.everything() == before


def test_all_hosts_of_a_preempted_slice_are_replaced(service, sweep):
    up(sweep)
    service.settle()
    lost, kept = service.groups
    service.preempt(lost, index=2)
    service.log.clear()
    text = up(sweep)
    assert f"delete {lost}: PREEMPTED {lost}-0002 TERMINATED" in text
    changes = [(method, kind) for method, kind, _ in service.log if method != "GET"]
    kinds = ["instanceGroupManagers", "instanceTemplates", "resourcePolicies"]
    gone, made = [("DELETE", kind) for kind in kinds], [("POST", kind) for kind in kinds]
    hosts = ("POST", "instanceGroupManagers")  # they are also listed by POST
    assert [c for c in changes if c != hosts] == [*gone, *made[:0:-1]]
    assert len(service.groups) == 2
    assert kept in service.groups
    assert lost not in service.groups, "under a fresh name"
    service.settle()
    assert list(service.states().values()) == ["ACTIVE", "ACTIVE"]


def test_a_host_that_still_saves_is_left_alone(service, sweep):
    up(sweep)
    service.settle()
    lost = service.groups[0]
    service.preempt(lost, status="STOPPING")
    text = up(sweep)
    assert "delete" not in text
    assert len(service.groups) == 3, "another one is asked for already"
    service.preempt(lost)
    assert f"delete {lost}: PREEMPTED" in up(sweep)
    assert len(service.groups) == 2


def test_an_idle_machine_is_deleted_and_a_working_one_is_not(service, sweep):
    up(sweep)
    service.settle()
    finish(sweep, leave=1)
    idle, working = service.groups
    (sweep.notes / f"{idle}.idle").write_text("exit code 0\n")
    up(sweep)
    assert service.groups == [working], "the other one leaves by itself"


def test_a_machine_that_has_deleted_itself_leaves_nothing_behind(service, sweep):
    """A host deletes its group; template and policy are left to the next `up`."""
    up(sweep)
    service.settle()
    finish(sweep, leave=0)
    where = {"project": "p", "zone": fake_gce.ZONE}
    for name in service.groups:
        gce.client().group.delete(**where, instance_group_manager=name)
    up(sweep)
    assert service.everything() == []


def test_a_name_that_is_taken_is_drawn_again(service, sweep, monkeypatch):
    drawn = iter(["aaaa", "aaaa", "bbbb"])
    monkeypatch.setattr(cloud.secrets, "token_hex", lambda n: next(drawn))
    up(sweep)
    assert [name[-4:] for name in service.groups] == ["aaaa", "bbbb"]


def test_names_that_are_always_taken_end(service, sweep, monkeypatch):
    monkeypatch.setattr(cloud.secrets, "token_hex", lambda n: "aaaa")
    with pytest.raises(UserError, match="already exists"):
        up(sweep)
    assert len(service.groups) == 1


@pytest.mark.parametrize("kind", ["instanceTemplates", "instanceGroupManagers", "resizeRequests"])
def test_a_crash_between_two_creations_and_a_second_up(service, sweep, kind):
    one = replace(sweep, workers=1, only=ONE_HOST if kind == "resizeRequests" else V6E)
    service.fail["POST", kind] = (503, "backendError", "try later")
    with pytest.raises(UserError, match="try later"):
        up(one, FLEX)
    assert service.everything() != []
    up(one, FLEX)
    (name,) = service.groups
    assert service.names("instanceTemplates") == [name]
    service.settle()
    assert list(service.states().values()) == ["ACTIVE"]
    assert "nothing is left" in down(one)
    assert service.everything() == []


@pytest.mark.parametrize(
    ("call", "code", "reason", "words"),
    [
        (("POST", "instanceTemplates"), 403, "forbidden", "Required 'compute.instanceTemplates.create' permission"),
        (("POST", "instanceGroupManagers"), 403, "quotaExceeded", "Quota 'TPUS_PER_TPU_FAMILY' exceeded"),
        (("GET", "resourcePolicies"), 403, "accessNotConfigured", "Compute Engine API has not been used in project p"),
        (("GET", "instanceGroupManagers"), 404, "notFound", "The resource 'projects/p/zones/us-z' was not found"),
    ],
)  # fmt: skip
def test_refusals_in_the_clouds_own_words(service, sweep, call, code, reason, words):
    service.fail[call] = (code, reason, words)
    with pytest.raises(UserError) as caught:
        up(sweep)
    assert str(caught.value) == f"Compute Engine: {words}"


def test_an_operation_that_fails_is_shown_in_the_clouds_own_words(service, sweep):
    words = "Quota 'INSTANCE_GROUP_MANAGERS' exceeded. Limit: 1.0 in region us-central1."
    service.fail_later["POST", "instanceGroupManagers"] = (403, "QUOTA_EXCEEDED", words)
    with pytest.raises(UserError) as caught:
        up(sweep)
    assert str(caught.value) == f"Compute Engine: {words}"


def test_no_credentials(sweep, monkeypatch, tmp_path):
    for name in ("GOOGLE_APPLICATION_CREDENTIALS", "CLOUDSDK_CONFIG"):
        monkeypatch.setenv(name, str(tmp_path / "nowhere"))
    monkeypatch.setenv("NO_GCE_CHECK", "True")  # no look for a metadata server
    with pytest.raises(UserError, match="gcloud auth application-default login"):
        up(sweep)


def test_a_missing_library_is_one_line_with_the_command(sweep, monkeypatch):
    monkeypatch.delattr("google.cloud.compute_v1")
    monkeypatch.setitem(sys.modules, "google.cloud.compute_v1", None)
    with pytest.raises(UserError, match=r"google-cloud-compute: pip install 'prime_jax\[gcp\]'"):
        up(sweep)


def test_down_removes_this_sweeps_resources_and_no_others(service, sweep):
    other = replace(sweep, root="gs://bucket/other", workers=1)
    up(other)
    up(sweep)
    service.settle()
    foreign = f"{sweep.name}-v6e-16-theirs"  # by its name one of ours, but not by its mark
    body = {"name": foreign, "description": "", "workloadPolicy": {"type": "HIGH_THROUGHPUT"}}
    service.found[f"projects/p/regions/us-central1/resourcePolicies/{foreign}"] = body
    service.preempt(next(name for name in service.groups if name.startswith(sweep.name)))
    assert "nothing is left" in down(sweep)
    assert [name[:12] for name in service.groups] == [other.name]
    assert foreign in service.names("resourcePolicies")
    assert "nothing of this sweep" in down(sweep)


def test_a_sweep_in_two_zones(service, sweep):
    """Templates belong to the project and policies to the region: those of the other zone stay."""
    there = replace(OPTIONS, zone="us-central1-b")
    service.machines.add((there.zone, "ct6e-standard-4t"))
    up(sweep)
    first = service.everything()
    assert "delete" not in up(sweep, there)
    assert set(first) < set(service.everything())
    here, lines = launching.dialogue()
    assert gce.down(sweep, there, here) == 0
    assert lines[-1] == "nothing is left"
    assert service.everything() == first


@pytest.mark.parametrize(
    ("refusal", "transient"),
    [
        ((400, "resourceNotReady", "The resource is not ready"), True),
        ((502, "backendError", "Bad gateway"), True),
        ((400, "invalid", "Invalid value"), False),
        ((403, "quotaExceeded", "Quota exceeded"), False),
    ],
)
def test_what_is_worth_another_attempt(service, sweep, refusal, transient):
    up(sweep)
    service.fail["DELETE", "instanceGroupManagers"] = refusal
    with pytest.raises(UserError, match=refusal[2]) as caught:
        down(sweep)
    assert cloud.is_transient(caught.value) == transient
    assert "nothing is left" in down(sweep)


def test_nothing_is_made_without_consent(service, sweep):
    here, lines = launching.dialogue(yes=False)
    gce.up(sweep, OPTIONS, here)
    assert lines
    assert service.everything() == []


def test_watch_replaces_what_is_taken_away_until_all_is_done(service, sweep, monkeypatch):
    passes = iter(range(100))

    def meanwhile(seconds):
        index = next(passes)
        service.settle()
        if index == 0:
            service.preempt(service.groups[0])
        if index == 1:
            assert list(service.states().values()) == ["ACTIVE", "ACTIVE"]
            service.fail["POST", "instanceTemplates"] = (429, "rateLimitExceeded", "a hiccup")
            service.preempt(service.groups[0])
        if index == 3:
            assert list(service.states().values()) == ["ACTIVE", "ACTIVE"]
            finish(sweep, leave=0)
            for name in service.groups:
                (sweep.notes / f"{name}.idle").write_text("exit code 0\n")

    monkeypatch.setattr(cloud.time, "sleep", meanwhile)
    text = up(sweep, replace(OPTIONS, watch=True))
    assert service.everything() == []
    assert "a hiccup; trying again" in text
    assert text.count("requested") == 4


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"project": ""}, "--on gce needs --project"),
        ({"zone": ""}, "--on gce needs --zone"),
        ({"zone": "us-central1"}, "write a zone, e.g. us-central1-c"),
        ({"reservation": "r"}, "--spot and --reservation exclude each other"),
        ({"flex_start": "3d"}, "--spot and --flex-start exclude each other"),
        ({"spot": False, "flex_start": "soon"}, "--flex-start soon: write 90m, 6h or 2d"),
        ({"spot": False, "flex_start": "8d"}, "--flex-start 8d: must be from 10m to 7d"),
        ({"spot": False, "flex_start": "5m"}, "--flex-start 5m: must be from 10m to 7d"),
    ],
)
def test_bad_options(service, sweep, changed, message):
    for what in (up, gce.render):
        with pytest.raises(UserError, match=message):
            what(sweep, replace(OPTIONS, **changed))
    assert service.log == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5e-16", "Compute Engine offers v5p, v6e and tpu7x, no v5e; use --on tpu"),
        ("h100-8", "TPUs only; render for k8s or sky"),
        ("2xv6e-16", "several slices need --on tpu, or render for k8s"),
        ("2xtpu7x-128", "several slices need render for k8s"),
        (None, "--slice v6e-16"),
    ],
)
def test_slices_that_compute_engine_does_not_offer(service, sweep, name, message):
    with pytest.raises(UserError, match=message):
        up(replace(sweep, only=name and slices.parse(name)))
    assert service.log == []


def test_a_zone_without_the_machines(service, sweep):
    with pytest.raises(UserError, match="has no ct6e-standard-4t in europe-west4-b; zones with it"):
        up(sweep, replace(OPTIONS, zone="europe-west4-b"))
    assert service.everything() == []


def test_a_local_root_is_refused(service, sweep):
    with pytest.raises(UserError, match="gs://"):
        up(replace(sweep, root="/home/me/sweep"))


BODIES = {
    "policy": ("resource_policy_resource", "ResourcePolicy"),
    "template": ("instance_template_resource", "InstanceTemplate"),
    "group": ("instance_group_manager_resource", "InstanceGroupManager"),
    "request": ("instance_group_manager_resize_request_resource", "InstanceGroupManagerResizeRequest"),
}  # fmt: skip


def insert(kind: str, body: dict, **where: str) -> None:
    argument, message = BODIES[kind]
    resource = getattr(compute_v1, message).from_json(json.dumps(body))
    getattr(gce.client(), kind).insert(project="p", **where, **{argument: resource}).result()


def insert_all(made: dict) -> None:
    insert("policy", made["policy"], region="us-central1")
    insert("template", made["template"])
    insert("group", made["group"], zone=fake_gce.ZONE)


def change_duration(made):
    del made["template"]["properties"]["scheduling"]["maxRunDuration"]


def change_type(made):
    made["policy"]["workloadPolicy"]["type"] = "HIGH_AVAILABILITY"


def change_repairs(made):
    made["group"]["instanceLifecyclePolicy"] = {"defaultActionOnFailure": "REPAIR"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda made: made["policy"]["workloadPolicy"].update(acceleratorTopology="4x8"), "4x8 has 32 chips"),
        (change_type, "HIGH_AVAILABILITY"),
        (lambda made: made["group"].update(name="x" * 64), "Invalid value for field 'resource.name'"),
        (lambda made: made["group"].pop("resourcePolicies"), "needs a workload policy"),
        (change_duration, "needs a run duration"),
        (change_repairs, "DO_NOTHING"),
        (lambda made: made["template"]["properties"]["scheduling"].update(onHostMaintenance="MIGRATE"), "TERMINATE"),
    ],
)  # fmt: skip
def test_the_server_rejects_what_the_real_one_rejects(service, sweep, change, words):
    made = gce.resources(sweep.pools()[0], FLEX, "a", "gs://code")
    change(made)
    with pytest.raises(exceptions.BadRequest, match=words):
        insert_all(made)


def test_the_server_rejects_a_policy_of_another_region(service, sweep):
    made = gce.resources(sweep.pools()[0], FLEX, "a", "gs://code")
    insert("policy", made["policy"], region="europe-west4")
    insert("template", made["template"])
    policy = made["group"]["resourcePolicies"]["workloadPolicy"]
    elsewhere = policy.replace("us-central1", "europe-west4")
    made["group"]["resourcePolicies"]["workloadPolicy"] = elsewhere
    with pytest.raises(exceptions.BadRequest, match="in another region"):
        insert("group", made["group"], zone=fake_gce.ZONE)


def test_the_server_rejects_wrong_resize_requests(service, sweep):
    where = {"zone": fake_gce.ZONE}
    made = gce.resources(sweep.pools()[0], FLEX, "bulk", "gs://code")
    insert_all(made)
    single = engine.Pool(sweep, ONE_HOST, 1)
    one = gce.resources(single, FLEX, "one", "gs://code")
    insert("template", one["template"])
    insert("group", one["group"], **where)
    for group, duration, words in (
        ("bulk", {"seconds": "600"}, "bulk mode"),
        ("one", None, "needs a run duration"),
        ("one", {"seconds": str(8 * 86400)}, "7 days"),
    ):
        body = {"name": "r", "resizeBy": 1, "requestedRunDuration": duration}
        if duration is None:
            del body["requestedRunDuration"]
        with pytest.raises(exceptions.BadRequest, match=words):
            insert("request", body, **where, instance_group_manager=group)
    with pytest.raises(exceptions.Conflict, match="already exists"):
        insert("group", one["group"], **where)
    with pytest.raises(exceptions.BadRequest, match="in use"):
        gce.client().template.delete(project="p", instance_template="one")


def test_render_is_what_up_sends(service, sweep):
    files = gce.render(sweep, OPTIONS)
    made = json.loads(files[f"{sweep.name}-v6e-16-resources.json"])
    (item,) = made["template"]["properties"]["metadata"]["items"]
    item["value"] = files[f"{sweep.name}-v6e-16-startup.sh"]
    up(replace(sweep, workers=1))
    (name,) = service.groups
    made = json.loads(json.dumps(made).replace(f"{sweep.name}-v6e-16-0000", name))
    for kind, body in (("resourcePolicies", "policy"), ("instanceTemplates", "template"), ("instanceGroupManagers", "group")):  # fmt: skip
        (path,) = [path for path in service.found if path.split("/")[-2] == kind]
        sent = {key: value for key, value in service.found[path].items() if key != "status"}
        assert sent == made[body]


def test_from_the_command_line_with_the_sweep_in_a_bucket(service, packed, capsys):
    from prime_jax import cli
    from prime_jax.runtime import storage

    where = ["--project", "p", "--zone", fake_gce.ZONE]
    with fake_store.bucket("gs") as bucket:
        root = storage.path(bucket.url)
        fake_trainer.planned(root)
        up = ["sweep", "up", bucket.url, "--on", "gce", "--slice", "tpu7x-16", "--workers", "2"]
        up += [*where, "--flex-start", "12h", "--data", "gs://bucket/data", "--yes"]
        assert cli.main(up) == 0
        assert "2 x tpu7x-16" in capsys.readouterr().out
        assert storage.read(root / "launch" / packed.name) == packed.data
        storage.write(root / "launch" / f"{service.groups[0]}.failed", b"no disk")
        assert cli.main(up) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "no disk" in line
        assert cli.main(["sweep", "down", bucket.url, "--on", "gce", *where, "--yes"]) == 0
    assert service.everything() == []
