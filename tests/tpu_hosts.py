"""TPU hosts in a sandbox: the real start-up script, stand-ins for the tools that it calls."""

import os
import subprocess
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from prime_jax.hardware import slices
from prime_jax.launch import engine, gce, tpu

NAME = "prime-x-abcd"

GCLOUD = """#!/usr/bin/env bash
# gs:// is a folder; what else is asked of the cloud is written down.
set -eu
here() { echo "$BUCKETS/${1#gs://}"; }
echo "$*" >>"$BUCKETS/calls"
case "$1 $2" in
"storage cp")
  from=$3 to=$4
  [[ $from == gs://* ]] && from=$(here "$from")
  [[ $to == gs://* ]] && to=$(here "$to")
  mkdir -p "$(dirname "$to")"
  if [[ $from == - ]]; then cat >"$to"; else cp "$from" "$to"; fi ;;
"storage rsync") cp -r "$(here "$4")/." "$5" ;;
"compute tpus" | "compute instance-groups") exit "${REFUSE_DELETE:-0}" ;;
esac
"""
PYTHON3 = """#!/usr/bin/env bash
# `pip install --target DIR uv` brings the stand-in for uv.
set -eu
[[ $* != *--version* ]] || exit 0
mkdir -p "$HERE/home/uv/bin"
cp "$HERE/tools/uv-stand-in" "$HERE/home/uv/bin/uv"
exit "${INSTALL_FAILS:-0}"
"""
UV = """#!/usr/bin/env bash
set -eu
echo "uv $*" >>"$BUCKETS/calls"
if [[ $1 == venv ]]; then
  mkdir -p "$4/bin"
  cp "$HERE/tools/worker" "$4/bin/prime-jax"
  [[ ! -e $HERE/tools/venv-python ]] || cp "$HERE/tools/venv-python" "$4/bin/python"
fi
[[ $1 != pip ]] || test -f constraints.txt
"""
FUSE = """#!/usr/bin/env bash
echo "gcsfuse $*" >>"$BUCKETS/calls"
"""
WORKER = """#!/usr/bin/env bash
# Leaves with the next of $CODES; `wait` waits for SIGTERM and leaves with 85.
echo "worker $* at ${PRIME_COORDINATOR:-alone} ${PRIME_PROCESS_ID:-0}/${PRIME_PROCESSES:-1}" >>"$BUCKETS/calls"
test ! -e "$PRIME_LOCK" || echo "stale lock" >>"$BUCKETS/calls"
echo locked >"$PRIME_LOCK"
n=$(cat "$HERE/count" 2>/dev/null || echo 0)
echo $((n + 1)) >"$HERE/count"
codes=($CODES)
if [[ ${codes[n]} == wait ]]; then
  trap 'exit 85' TERM
  touch "$HERE/waiting"
  while :; do sleep 0.05; done
fi
exit "${codes[n]}"
"""


def metadata(
    index: int, hosts: int, tpu_env: str, network: str, late: dict[str, int]
) -> ThreadingHTTPServer:
    """The attributes of host `index`, served as the metadata server does.

    Args:
        late: how often each attribute is asked for before it is there.
    """
    attributes = {
        "agent-worker-number": str(index),
        "worker-network-endpoints": ",".join(
            f"unknown:{k}:{network.format(k)}" for k in range(hosts)
        ),
        "tpu-env": f"ACCELERATOR_TYPE: 'v5litepod-{4 * hosts}'\n{tpu_env}",
    }

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_GET(self):
            name = self.path.rpartition("/attributes/")[2]
            left = late.pop(name, 0)
            late.update({name: left - 1} if left else {})
            value = "" if left else attributes.get(name, "")
            value = value.encode()
            known = value and self.headers["Metadata-Flavor"] == "Google"
            self.send_response(200 if known else 404)
            self.send_header("Content-Length", str(len(value)))
            self.end_headers()
            self.wfile.write(value)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


class Vm:
    """One host in a sandbox: its disk, the bucket, and stand-ins first on PATH."""

    def __init__(self, path: Path, buckets: Path | None = None):
        self.path, self.buckets = path, buckets or path / "buckets"
        tools = path / "tools"
        tools.mkdir(parents=True)
        stand_ins = {"gcloud": GCLOUD, "python3": PYTHON3, "uv-stand-in": UV, "worker": WORKER}
        stand_ins["gcsfuse"] = FUSE
        for name, text in stand_ins.items():
            (tools / name).write_text(text)
            (tools / name).chmod(0o755)

    def install(self, pool: engine.Pool, code: str) -> None:
        """Write the start-up script, as `--on gce` where it can, else as `--on tpu`."""
        self.pool, self.code = pool, code
        setup = (f"touch {self.path}/was-set-up",)
        given = {"project": "p", "zone": "a-b-c", "data": "gs://bucket/data", "setup": setup}
        if pool.slice_.chip.machine.image and pool.slice_.slices == 1:
            made = gce.resources(pool, gce.Options(**given), NAME, code)
            (item,) = made["template"]["properties"]["metadata"]["items"]
            self.script = item["value"]
        else:
            made = tpu.request(pool, tpu.Options(**given), NAME, code)
            self.script = made["tpu"]["node_spec"][0]["node"]["metadata"]["startup-script"]
        (self.path / "startup.sh").write_text(self.script)

    def install_on(self, slice_: str) -> None:
        """The same for another slice."""
        self.install(replace(self.pool, slice_=slices.parse(slice_)), self.code)

    def boot(
        self,
        codes: str,
        *,
        index=0,
        hosts=1,
        tpu_env="",
        network="10.0.0.{}",
        late: dict[str, int] | None = None,
        **environment: str,
    ):
        self.server = metadata(index, hosts, tpu_env, network, late or {})
        values = {
            "PATH": f"{self.path}/tools:{os.environ['PATH']}",
            "HERE": str(self.path),
            "BUCKETS": str(self.buckets),
            "CODES": codes,
            "PRIME_HOME": str(self.path / "home"),
            "PRIME_LOCK": str(self.path / "libtpu_lockfile"),
            "PRIME_PAUSE_SECONDS": "0",
            "PRIME_SHIP_SECONDS": "0.2",
            "GCE_METADATA_HOST": f"127.0.0.1:{self.server.server_port}",
        }
        return subprocess.Popen(["bash", self.path / "startup.sh"], env=values | environment)

    def run(self, codes: str, **how) -> int:
        """Boot, and wait for the end."""
        process = self.boot(codes, **how)
        try:
            return process.wait(timeout=60)
        finally:
            process.kill()
            self.halt()

    def halt(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    @property
    def calls(self) -> list[str]:
        return (self.buckets / "calls").read_text().splitlines()

    def deletions(self) -> list[str]:
        return [c for c in self.calls if c.startswith("compute ") and " delete " in c]

    def marks(self) -> dict[str, str]:
        folder = self.buckets / "bucket/sweep/launch"
        return {path.name: path.read_text().strip() for path in folder.glob("prime-*")}

    def log(self, host: object = 0) -> str:
        folder = self.buckets / "bucket/sweep/logs/prime-x-abcd"
        return (folder / f"host-{host}.log").read_text()


# A worker that trains, from the archive.
REAL = """#!/usr/bin/env bash
cd "$HERE/home/code"
exec {python} -m prime_jax "$@"
"""
