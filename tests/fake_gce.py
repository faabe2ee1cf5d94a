"""A loopback Compute Engine under the real google-cloud-compute client: groups, queues, refusals.

It tests our reading of Google's pages and no more. Each refusal names the page that it was read
from; all were read on 2026-11-30, in stored copies of unknown age. `tick` moves everything one
state on; nothing happens by itself.
"""

import contextlib
import json
import math
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from google.auth.credentials import AnonymousCredentials
from google.cloud import compute_v1

from prime_jax.launch import gce

ZONE = "us-central1-c"
PATHS = re.compile(
    r"/compute/v1/(?P<scope>projects/[^/]+/(?:global|regions/[^/]+|zones/[^/]+))/"
    r"(?P<kind>\w+)(?:/(?P<name>[^/]+)(?:/(?P<inner>\w+)(?:/(?P<inner_name>[^/]+))?)?)?"
)
STOCKOUT = ("ZONE_RESOURCE_POOL_EXHAUSTED_WITH_DETAILS", "Waiting for resources.")


class Refused(Exception):
    def __init__(self, code: int, reason: str, message: str):
        self.code, self.reason, self.message = code, reason, message


class FakeGce:
    """The service.

    Attributes:
        capacity: chips that it can hand out.
        machines: (zone, machine type) that it has.
        found: bodies by path, e.g. `projects/p/zones/z/instanceGroupManagers/name`.
        hosts: managed instances by name of their group.
        log: (method, kind, name) of what was asked, refused calls included.
        fail: (method, kind) -> (HTTP code, reason, message) with which a call fails, once.
        fail_later: the same, but the call is accepted and its operation fails.
    """

    def __init__(self, capacity: int = 64):
        self.capacity = capacity
        self.machines = {(ZONE, f"{kind}t") for kind in (
            "ct5p-hightpu-4", "ct6e-standard-4", "ct6e-standard-8", "tpu7x-standard-4"
        )}  # fmt: skip
        self.found: dict[str, dict] = {}
        self.hosts: dict[str, list[dict]] = {}
        self.operations: dict[str, dict] = {}
        self.log: list[tuple[str, str, str]] = []
        self.fail: dict[tuple[str, str], tuple[int, str, str]] = {}
        self.fail_later: dict[tuple[str, str], tuple[int, str, str]] = {}

    # What a test drives.

    def names(self, kind: str) -> list[str]:
        return sorted(p.rpartition("/")[2] for p in self.found if p.split("/")[-2] == kind)

    @property
    def groups(self) -> list[str]:
        return self.names("instanceGroupManagers")

    def everything(self) -> list[str]:
        return sorted(self.found)

    def tick(self) -> None:
        for path, group in list(self.found.items()):
            if path.split("/")[-2] == "instanceGroupManagers":
                self._advance(path, group)

    def settle(self) -> None:
        for _ in range(3):
            self.tick()

    def _advance(self, path: str, group: dict) -> None:
        hosts = self.hosts[group["name"]]
        requests = [r for p, r in self.found.items() if p.startswith(f"{path}/resizeRequests/")]
        for request in requests:
            if request["state"] == "CREATING":
                request["state"] = "ACCEPTED"
                return
        new = [host for host in hosts if host["currentAction"] == "CREATING"]
        if not new:
            return
        errors = {"errors": [dict(zip(("code", "message"), STOCKOUT, strict=True))]}
        if self.chips(group) * len(new) > self.capacity:  # all at once, or none
            if "targetSizePolicy" in group:
                check = {"inProgress": True, "lastProgressCheck": {"error": errors}}
                group["status"] = {"isStable": False, "bulkInstanceOperation": check}
            else:
                new[0]["lastAttempt"] = {"errors": errors}
            return
        self.capacity -= self.chips(group) * len(new)
        for host in new:
            host |= {"instanceStatus": "RUNNING", "currentAction": "NONE", "lastAttempt": {}}
        group["status"] = {"isStable": True}
        for request in requests:
            request["state"] = "SUCCEEDED"

    def preempt(self, name: str, index: int = 0, status: str = "TERMINATED") -> None:
        """A spot host is stopped, and its chips are somebody else's."""
        self.hosts[name][index]["instanceStatus"] = status

    def end(self, name: str) -> None:
        """The run duration of flex-start is over: the group deletes its hosts."""
        self.hosts[name].clear()
        self._group(name)["targetSize"] = 0

    def states(self) -> dict[str, str]:
        api = gce.client()
        where = {"project": "p", "zone": ZONE}
        out = {}
        for name in self.groups:
            one = {**where, "instance_group_manager": name}
            out[name] = gce.state(
                api.group.get(**one),
                list(api.group.list_managed_instances(**one)),
                list(api.request.list(**one)),
            )[0]
        return out

    def chips(self, group: dict) -> int:
        return int(self._template(group)["properties"]["machineType"].rpartition("-")[2][:-1])

    def _group(self, name: str) -> dict:
        return next(g for p, g in self.found.items() if p.endswith(f"Managers/{name}"))

    def _template(self, group: dict) -> dict:
        template = self.found.get(group["instanceTemplate"])
        if template is None:
            raise Refused(
                404, "notFound", f"The resource '{group['instanceTemplate']}' was not found"
            )
        return template

    # What the client calls.

    def answer(self, method: str, path: str, query: dict, body: dict) -> dict:
        match = PATHS.fullmatch(path)
        assert match, path
        scope, kind, name, inner, inner_name = match.groups()
        if kind == "operations":
            return self.operations[name]
        about = "resizeRequests" if inner == "resizeRequests" else kind
        self.log.append((method, about, body.get("name") or inner_name or name or ""))
        if inner == "listManagedInstances":
            self._get(f"{scope}/{kind}/{name}")
            return {"managedInstances": self.hosts[name]}
        if (method, about) in self.fail:
            raise Refused(*self.fail.pop((method, about)))
        if kind == "machineTypes":
            if (scope.rpartition("/")[2], name) not in self.machines:
                raise Refused(
                    404, "notFound", f"The resource '{scope}/{kind}/{name}' was not found"
                )
            return {"name": name}
        base = f"{scope}/{kind}" + (f"/{name}/{inner}" if inner else "")
        whole = f"{base}/{inner_name if inner else name}"
        if method == "GET":
            return (
                self._list(base, query)
                if (inner_name if inner else name) is None
                else self._get(whole)
            )
        if (method, about) in self.fail_later:
            return self._operation(scope, self.fail_later.pop((method, about)))
        if method == "POST":
            self._insert(scope, base, about, body)
        else:
            self._delete(whole, about)
        return self._operation(scope)

    def _get(self, path: str) -> dict:
        if path not in self.found:
            raise Refused(404, "notFound", f"The resource '{path}' was not found")
        return self.found[path]

    def _list(self, base: str, query: dict) -> dict:
        found = [self.found[p] for p in sorted(self.found) if p.rpartition("/")[0] == base]
        start, size = (
            int(query.get("pageToken", 0)),
            2,
        )  # small pages, so that clients must turn them
        more = {"nextPageToken": str(start + size)} if start + size < len(found) else {}
        return {"items": found[start : start + size], **more}

    def _insert(self, scope: str, base: str, kind: str, body: dict) -> None:
        whole = f"{base}/{body['name']}"
        if whole in self.found:
            raise Refused(409, "alreadyExists", f"The resource '{whole}' already exists")
        # REST reference, InstanceGroupManagerResizeRequest: a name has 1 to 63 characters, as in
        # RFC 1035. The reference of the other kinds was not read.
        if not re.fullmatch(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?", body["name"]):
            message = f"Invalid value for field 'resource.name': '{body['name']}'"
            raise Refused(400, "invalid", message)
        {
            "resourcePolicies": lambda: None,
            "instanceTemplates": lambda: self._check_template(body["properties"]),
            "instanceGroupManagers": lambda: self._check_group(scope, body),
            "resizeRequests": lambda: self._check_request(base, body),
        }[kind]()
        self.found[whole] = body
        if kind == "instanceGroupManagers":
            self.hosts[body["name"]] = self._new(body["name"], body["targetSize"])
            body["status"] = {"isStable": not body["targetSize"]}
        if kind == "resizeRequests":
            group = base.split("/")[-2]
            body["state"] = "CREATING"
            self._group(group)["targetSize"] += body["resizeBy"]
            self.hosts[group] += self._new(group, body["resizeBy"])

    def _new(self, group: str, count: int) -> list[dict]:
        start = len(self.hosts.get(group, ()))
        return [
            {
                "instance": f"projects/p/zones/z/instances/{group}-{start + i:04x}",
                "currentAction": "CREATING",
            }
            for i in range(count)
        ]

    def _check_template(self, properties: dict) -> None:
        scheduling = properties["scheduling"]
        # Every example that was found for TPUs sets it; the page that requires it: not checked.
        if scheduling["onHostMaintenance"] != "TERMINATE":
            raise Refused(400, "invalid", "TPU instances need onHostMaintenance TERMINATE")
        if scheduling.get("provisioningModel") == "FLEX_START":
            _check_duration(scheduling.get("maxRunDuration"))

    def _check_group(self, scope: str, group: dict) -> None:
        template = self._template(group)["properties"]
        bulk = group.get("targetSizePolicy", {}).get("mode") == "BULK"
        policy = group.get("resourcePolicies", {}).get("workloadPolicy")
        flex = template["scheduling"]["provisioningModel"] == "FLEX_START"
        repairs = group["instanceLifecyclePolicy"].get("defaultActionOnFailure") != "DO_NOTHING"
        # "About bulk mode in MIGs": with the flex-start model repairs must be off, DO_NOTHING.
        if bulk and flex and repairs:
            raise Refused(400, "invalid", "flex-start in bulk mode needs DO_NOTHING on failure")
        # "About workload policies in MIGs": several hosts of a slice need a workload policy.
        if group["targetSize"] > 1 and not policy:
            raise Refused(400, "invalid", "a multi-host TPU slice needs a workload policy")
        if not policy:
            return
        # Resource policies are regional (REST reference). That a group takes only those of its
        # own region is asked for by the project; no page that says so was found: not checked.
        if scope.rpartition("/")[2].rpartition("-")[0] != policy.split("/")[3]:
            raise Refused(400, "invalid", f"'{policy}' is in another region than the group")
        found = self._get(policy)["workloadPolicy"]
        # "About workload policies in MIGs": only HIGH_THROUGHPUT takes an accelerator topology.
        if found["type"] != "HIGH_THROUGHPUT":
            raise Refused(400, "invalid", f"workload policy of type {found['type']}")
        # "TPU machines": each machine type has certain topologies. Here only the number of chips
        # is compared, which follows from it; the table of shapes could not be read.
        chips = math.prod(int(side) for side in found["acceleratorTopology"].split("x"))
        if chips != self.chips(group) * group["targetSize"]:
            shape = f"topology {found['acceleratorTopology']} has {chips} chips"
            raise Refused(400, "invalid", f"{shape}, not those of {template['machineType']}")

    def _check_request(self, base: str, request: dict) -> None:
        group = self._get(base.rpartition("/")[0])
        # "About bulk mode in MIGs": it does not support resize requests.
        if group.get("targetSizePolicy", {}).get("mode") == "BULK":
            raise Refused(400, "invalid", "resize requests are not supported in bulk mode")
        _check_duration(request.get("requestedRunDuration"))

    def _delete(self, path: str, kind: str) -> None:
        self._get(path)
        # RESOURCE_IN_USE is in the API's list of errors; that these two give it: not checked.
        groups = [g for p, g in self.found.items() if p.split("/")[-2] == "instanceGroupManagers"]
        if kind != "instanceGroupManagers" and f'"{path}"' in json.dumps(groups):
            raise Refused(400, "resourceInUseByAnotherResource", f"'{path}' is in use")
        if kind == "instanceGroupManagers":
            group = self.found[path]
            running = [h for h in self.hosts.pop(group["name"]) if h.get("instanceStatus")]
            self.capacity += self.chips(group) * len(running)
        # "About resize requests in a MIG": they go with their group.
        for inner in [p for p in self.found if p == path or p.startswith(f"{path}/")]:
            del self.found[inner]

    def _operation(self, scope: str, failed: tuple[int, str, str] | None = None) -> dict:
        name = f"operation-{len(self.operations)}"
        where = scope.split("/")[2:]
        place = {f"{where[0][:-1]}": "/".join(where)} if len(where) == 2 else {}
        begun = {"name": name, "status": "RUNNING", **place}
        self.operations[name] = begun | {"status": "DONE"}
        if failed:
            code, reason, message = failed
            self.operations[name] |= {
                "httpErrorStatusCode": code,
                "httpErrorMessage": reason,
                "error": {"errors": [{"code": reason, "message": message}]},
            }
        return begun


def _check_duration(duration: dict | None) -> None:
    # "About resize requests in a MIG": a run duration, between 10 minutes and 7 days.
    if duration is None:
        raise Refused(400, "required", "flex-start needs a run duration")
    if not 600 <= int(duration["seconds"]) <= 604_800:
        raise Refused(400, "invalid", "the run duration must be from 10 minutes to 7 days")


@contextlib.contextmanager
def serve(fake: FakeGce):
    """The real clients, connected to `fake`."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def answer(self):
            path, _, query = self.path.partition("?")
            asked = dict(pair.split("=", 1) for pair in query.split("&") if "=" in pair)
            body = json.loads(
                self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"{}"
            )
            try:
                code, found = 200, fake.answer(self.command, path, asked, body)
            except Refused as error:
                code = error.code
                one = {"message": error.message, "domain": "global", "reason": error.reason}
                found = {"error": {"code": code, "message": error.message, "errors": [one]}}
            text = json.dumps(found).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_POST = do_DELETE = answer

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        endpoint = {"api_endpoint": f"http://127.0.0.1:{server.server_port}"}
        how = {"credentials": AnonymousCredentials(), "client_options": endpoint}
        made = gce.clients(compute_v1, **how)
        operations = {
            "zone_operations": compute_v1.ZoneOperationsClient(**how),
            "region_operations": compute_v1.RegionOperationsClient(**how),
            "global_operations": compute_v1.GlobalOperationsClient(**how),
        }
        for one in vars(made).values():  # which would ask the real endpoint for operations
            one.transport._extended_operations_services = operations
        try:
            yield made
        finally:
            for one in (*vars(made).values(), *operations.values()):
                one.transport.close()
            server.shutdown()
            thread.join()
