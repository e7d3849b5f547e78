#!/bin/bash
# What every machine of a Cloud TPU slice does when it boots: fetches the job's folder from the bucket, installs the
# package, and runs the job's command as the systemd unit `emollama`, which goes on where it was. `tpu.py` puts the
# folder there and gives this script to the machines; they tell of themselves in the folder's `state` and `logs`.
set -euo pipefail

readonly home=/opt/emollama log=/var/log/emollama.log
readonly need_disk_gb=20 need_memory_gb=8
export HOME=${HOME:-/root} # systemd gives its units none
mkdir -p "$home/job"

# metadata NAME: an attribute that Cloud TPU or `tpu.py` gave this machine.
metadata() {
  curl -sSf --retry 5 --retry-connrefused -H 'Metadata-Flavor: Google' \
    "http://${GCE_METADATA_HOST:-metadata.google.internal}/computeMetadata/v1/instance/attributes/$1"
}

# tpu_env NAME: a line of the attribute tpu-env, NAME: 'VALUE'; nothing where there is none.
tpu_env() { sed -n "s/^$1: *'\{0,1\}\([^']*\)'\{0,1\} *$/\1/p" <<<"$environment"; }

# Which process of the run this is: as JAX finds it, but known before JAX is there, and in one way for it and for us.
job=${EMOLLAMA_JOB:-$(metadata emollama-job)}
environment=$(metadata tpu-env 2>/dev/null || true)
worker=$(metadata agent-worker-number)
IFS=, read -ra workers <<<"$(metadata worker-network-endpoints)"
coordinator=$(tpu_env MEGASCALE_COORDINATOR_ADDRESS)
coordinator=${coordinator%%:*}
slices=$(tpu_env MEGASCALE_NUM_SLICES)
slice=$(tpu_env MEGASCALE_SLICE_ID)
process=$((${slice:-0} * ${#workers[@]} + worker))
processes=$((${slices:-1} * ${#workers[@]}))
[ -n "$coordinator" ] || coordinator=${workers[0]##*:} # an address, or NAME:ID:ADDRESS

# One time for each boot: it tells the machine's lives apart.
[ -e /run/emollama-booted ] || date +%s >/run/emollama-booted

cat >"$home/environment" <<END
PATH=$home/venv/bin:$PATH
HOME=$HOME
JAX_COORDINATOR_ADDRESS=$coordinator:8476
JAX_NUM_PROCESSES=$processes
JAX_PROCESS_ID=$process
# The port that Cloud TPU's firewall opens; JAX's own choice is closed.
JAX_COORDINATOR_PORT=8476
# Downloads at less than 256 bytes/s for a minute begin anew, which are slow for all machines at once otherwise.
TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS=60
TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES=256
PYTHONUNBUFFERED=1
END

cat >"$home/report" <<END
#!/bin/bash
# report STATE [MESSAGE]: puts the log into the bucket, and unless STATE is \`log\` how this process is. As the unit's
# last command it has the exit code in EXIT_STATUS.
export PATH=$PATH HOME=$HOME
timeout 60 gcloud storage cp $log $job/logs/process-$process.log --quiet 2>/dev/null
[ "\$1" != log ] || exit 0
status=
[ "\$1" != ended ] || status=\$EXIT_STATUS
printf '{"process": %d, "state": "%s", "status": "%s", "message": "%s", "booted": %d, "time": %d}\n' \\
  $process "\$1" "\$status" "\${2:-}" "\$(cat /run/emollama-booted)" "\$(date +%s)" |
  timeout 60 gcloud storage cp - $job/state/process-$process.json --quiet 2>/dev/null
exit 0
END
chmod +x "$home/report"
touch "$log"

unfit() {
  echo "$1" | tee -a "$log" >&2
  "$home/report" unfit "$1"
  exit 1
}
trap 'unfit "line $LINENO of the startup script failed"' ERR

tries() { # COMMAND...: up to five times
  local i
  for i in 1 2 3 4 5; do
    if "$@"; then return; fi
    echo "attempt $i: $* failed"
    sleep $((5 * i))
  done
  return 1
}

systemctl stop emollama 2>/dev/null || true # the run before, which saves
"$home/report" installing
disk=$(df --output=avail -B1G "$home" | tail -1)
memory=$(($(sed -n 's/^MemAvailable: *\([0-9]*\).*/\1/p' /proc/meminfo) >> 20))
[ "$disk" -ge "$need_disk_gb" ] || unfit "there are $disk GB of disk space at $home, and $need_disk_gb are needed"
[ "$memory" -ge "$need_memory_gb" ] || unfit "there are $memory GiB of memory, and $need_memory_gb are needed"

rm -rf "${home:?}/job" # a run before may have left folders there
mkdir "$home/job"
tries gcloud storage cp "$job/*" "$home/job/" --quiet >>"$log" 2>&1 || unfit "cannot read $job"

# A Python that the package runs on. Images for TPUs come with 3.10, and upgrade themselves as they start: apt waits.
find_python() {
  local candidate
  for candidate in python3.12 python3.13 python3.11 python3; do
    if "$candidate" -c 'import ensurepip, sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  {
    tries apt-get -qq -o DPkg::Lock::Timeout=900 update
    tries apt-get -qq -o DPkg::Lock::Timeout=900 install -y python3-pip
    tries python3 -m pip install -q uv
    tries python3 -m uv python install 3.12
  } >>"$log" 2>&1
  python3 -m uv python find 3.12
}

# Into the environment that is there, if there is one: of new code under the same version, too.
install() {
  local python extras wheel=("$home"/job/emollama_jax-*.whl) pip=("$home/venv/bin/pip" -q --disable-pip-version-check)
  extras=$(cat "$home/job/extras")
  if [ ! -x "$home/venv/bin/pip" ]; then
    python=$(find_python) && "$python" -m venv "$home/venv" || return
  fi
  "${pip[@]}" install -c "$home/job/constraints.txt" "${wheel[0]}[$extras]" &&
    "${pip[@]}" install --no-deps --force-reinstall "${wheel[0]}"
}

# A machine that only boots again has all.
stamp=$(cat "$home"/job/*.whl "$home/job/constraints.txt" "$home/job/extras" | sha256sum)
if [ "$(cat "$home/installed" 2>/dev/null)" != "$stamp" ]; then
  rm -f "$home/installed"
  tries install >>"$log" 2>&1 || unfit "the package cannot be installed"
  echo "$stamp" >"$home/installed"
fi

# Starts again after what passes: 75 (asked to end), 3 (the others are not there yet), 134 (another process went away),
# a kill. A person is needed after 1, 2 and 4; 130 is an interrupt. A stop leaves time to save.
cat >/etc/systemd/system/emollama.service <<END
[Unit]
Description=emollama: $job
StartLimitIntervalSec=0

[Service]
EnvironmentFile=$home/environment
WorkingDirectory=$home/job
ExecStartPre=$home/report running
ExecStart=/bin/bash $home/job/command.sh
ExecStopPost=$home/report ended
Restart=on-failure
RestartSec=10
RestartPreventExitStatus=1 2 4 130
KillMode=mixed
TimeoutStartSec=300
TimeoutStopSec=600
LimitNOFILE=100000
LimitMEMLOCK=infinity
StandardOutput=append:$log
StandardError=append:$log
END
cat >/etc/systemd/system/emollama-log.service <<END
[Service]
Type=oneshot
ExecStart=$home/report log
END
cat >/etc/systemd/system/emollama-log.timer <<END
[Timer]
OnActiveSec=30
OnUnitActiveSec=30
END
systemctl daemon-reload
systemctl start emollama-log.timer
systemctl --no-block restart emollama
