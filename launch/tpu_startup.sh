# shellcheck shell=bash
# Start-up script of a TPU VM: runs as root at every boot, on every host of the slice.
# `prime-jax sweep up --on gce` or `tpu` puts exports above it: PRIME_ROOT, PRIME_SLICE, PRIME_SLICES
# (their number), PRIME_HOSTS (of each), PRIME_CODE, PRIME_NAME, PRIME_GIVE_BACK (a command),
# PRIME_DATA (lines FROM, tab, TO), PRIME_MOUNT, PRIME_SETUP (shell lines) and JAX_COORDINATOR_PORT.
# `prime-jax sweep render` prints the whole.
set -euo pipefail

home=${PRIME_HOME:-/opt/prime}
lock=${PRIME_LOCK:-/tmp/libtpu_lockfile}
metadata="http://${GCE_METADATA_HOST:-metadata.google.internal}/computeMetadata/v1/instance/attributes"
mkdir -p "$home"
log=$home/startup.log
exec >>"$log" 2>&1

attribute() { curl --silent --fail --retry 5 -H 'Metadata-Flavor: Google' "$metadata/$1"; }
megascale() { attribute tpu-env | sed -n "s/^MEGASCALE_$1: *'\{0,1\}\([^']*\)'\{0,1\}$/\1/p"; }
say() { echo "$(date -u +%FT%TZ) $*"; }
ship() { gcloud storage cp "$log" "$PRIME_ROOT/logs/$PRIME_NAME/host-$process.log" >/dev/null 2>&1 || true; }
mark() { echo "$2" | gcloud storage cp - "$PRIME_ROOT/launch/$PRIME_NAME.$1"; }

# The rent ends here, even when nobody watches. The next `up` or `down` does it where the VM may not.
give_back() {
  say "deleting $PRIME_NAME"
  ship
  eval "$PRIME_GIVE_BACK" || say "may not delete itself; \`sweep up\` will"
}

stage=starting stopping='' finished='' worker='' process=unknown
# shellcheck disable=SC2329 # called by the trap below
at_exit() {
  local code=$?
  if [[ -z $stopping && -z $finished ]]; then
    say "$stage failed (exit code $code)"
    mark failed "$PRIME_NAME host $process: $stage failed (exit code $code)" || true
    give_back
  fi
  ship
  [[ -z ${shipper:-} ]] || kill "$shipper" 2>/dev/null || true
}
# Preemption and maintenance: the worker saves and leaves with 85.
# shellcheck disable=SC2329 # called by the trap below
stop() {
  stopping=yes
  say 'asked to stop'
  [[ -z $worker ]] || kill -TERM "$worker" 2>/dev/null || true
}
trap at_exit EXIT
trap stop TERM INT

# The hosts of the slice, and the number of this one. The image writes the attributes after the
# boot, and not all at once.
members() {
  local number slice=0
  mapfile -t hosts < <(attribute worker-network-endpoints | tr , '\n' | cut -d: -f3-)
  number=$(attribute agent-worker-number) || return 1
  [[ ${#hosts[@]} -eq $PRIME_HOSTS && $number =~ ^[0-9]+$ && $number -lt $PRIME_HOSTS ]] || return 1
  first=${hosts[0]}
  [[ $first != *:* ]] || first="[$first]" # IPv6
  if [[ $PRIME_SLICES -gt 1 ]]; then
    slice=$(megascale SLICE_ID) first=$(megascale COORDINATOR_ADDRESS)
    [[ $slice =~ ^[0-9]+$ && -n $first ]] || return 1
    [[ $first != *:*:* || $first == \[* ]] || first="[$first]" # a bare IPv6 address
    [[ $first == *']' ]] || first=${first%:*}
  fi
  process=$((number + PRIME_HOSTS * slice))
}

stage='finding the hosts of the slice in the metadata'
count=$((PRIME_HOSTS * PRIME_SLICES))
if [[ $count -eq 1 ]]; then
  process=0
else
  tries=${PRIME_METADATA_TRIES:-60}
  until members; do
    tries=$((tries - 1))
    [[ $tries -gt 0 ]] || exit 1
    sleep "${PRIME_PAUSE_SECONDS:-10}"
  done
  export PRIME_COORDINATOR=$first:$JAX_COORDINATOR_PORT PRIME_PROCESSES=$count PRIME_PROCESS_ID=$process
fi
while sleep "${PRIME_SHIP_SECONDS:-60}"; do ship; done &
shipper=$!

stage='installing'
if [[ ! -e $home/installed || $(<"$home/installed") != "$PRIME_CODE" ]]; then
  say "host $process of $count: installing $PRIME_CODE"
  rm -rf "$home/code" "$home/venv"
  mkdir -p "$home/code"
  gcloud storage cp "$PRIME_CODE" "$home/code.tar.gz"
  tar -xzf "$home/code.tar.gz" -C "$home/code"
  # The image's Python is too old: bring one. --target works on images whose pip is locked, too.
  python3 -m pip --version || { apt-get -qq update && apt-get -qqy install python3-pip; }
  python3 -m pip install --quiet --upgrade --target "$home/uv" uv
  export UV_PYTHON_INSTALL_DIR=$home/python
  "$home/uv/bin/uv" venv --python 3.12 "$home/venv"
  (cd "$home/code" && "$home/uv/bin/uv" pip install --python "$home/venv" -c constraints.txt -e '.[tpu,gcp]')
  echo "$PRIME_CODE" >"$home/installed"
fi

stage='the setup of the user'
eval "$PRIME_SETUP"

stage='fetching data'
while IFS=$'\t' read -r from to; do
  [[ -n $from ]] || continue
  mkdir -p "$to"
  if [[ -z ${PRIME_MOUNT:-} ]]; then
    say "copying $from to $to"
    gcloud storage rsync --recursive "$from" "$to"
  elif ! mountpoint -q "$to"; then
    say "mounting $from at $to"
    from=${from#gs://}
    gcsfuse -o ro --implicit-dirs --only-dir "${from#*/}" "${from%%/*}" "$to"
  fi
done <<<"$PRIME_DATA"

stage='the worker'
crashes=0 met=''
while [[ -z $stopping ]]; do
  rm -f "$lock" # of a process that was killed
  say "host $process of $count: working on $PRIME_ROOT"
  "$home/venv/bin/prime-jax" sweep work "$PRIME_ROOT" --slice "$PRIME_SLICE" &
  worker=$!
  code=0
  wait "$worker" || code=$?
  while kill -0 "$worker" 2>/dev/null; do # a signal has ended the wait, not the worker
    code=0
    wait "$worker" || code=$?
  done
  worker=''
  say "worker left with exit code $code"
  [[ -z $stopping ]] || exit 85
  case $code in
    0 | 1) # nothing is open; 1: some runs have failed, and are recorded
      finished=yes
      if [[ $process == 0 ]]; then
        mark idle "exit code $code" || true
        give_back
      fi
      exit 0
      ;;
    85) # another host was told to stop: meet again
      met=yes
      sleep "${PRIME_PAUSE_SECONDS:-10}"
      ;;
    2) # bad input stays bad; but the hosts of a slice that was once at work did not meet again
      if [[ -n $met && $count -gt 1 ]]; then
        finished=yes
        give_back
      fi
      exit 2
      ;;
    *)
      crashes=$((crashes + 1))
      [[ $code -ne 75 ]] || met=yes # the watchdog: another host is lost
      [[ $crashes -lt 5 ]] || exit "$code"
      sleep "${PRIME_PAUSE_SECONDS:-10}"
      ;;
  esac
done
exit 85
