#!/usr/bin/env bash
# Sets up mae_align on a TPU VM, a GPU host or a CPU (Linux), and checks that JAX sees the devices.
#
#   bash tpu_setup.sh [KEY=VALUE ...]
#
#   MODE=tpu|gpu|cpu     what to set up; without it: TPU device files, else nvidia-smi, else the CPU
#   EXPECT_DEVICES=N     fail unless this host has exactly N devices (default: at least one)
#   PYTHON=COMMAND       the Python to use (default: python3 if it is new enough, else one that uv brings)
#   CUDA=12|13           MODE=gpu: which CUDA packages (default: the newest that the driver supports)
#   WAIT=SECONDS         longest time for the device check (default 600)
#   FORCE=1              build the environment anew
#
# Everything goes into .venv-MODE in this folder. A second run reuses it, and only checks, while
# CUDA, the Python and pyproject.toml stay as they are. It never asks and never calls sudo.
#
# CPU
#   bash tpu_setup.sh MODE=cpu
#   .venv-cpu/bin/python -m experiments.masking_sweep
#
# GPU host (NVIDIA driver with CUDA 12 or 13; nothing else has to be installed)
#   bash tpu_setup.sh EXPECT_DEVICES=1
#   .venv-gpu/bin/python -m experiments.masking_sweep
#
# TPU VM, one host. Runtime versions by Google's documentation of Cloud TPU software versions:
# v6e v2-alpha-tpuv6e, v5p v2-alpha-tpuv5, v5e v2-alpha-tpuv5-lite, v4 and older tpu-ubuntu2204-base.
#   export NAME=mae-align ZONE=... REPOSITORY=...     # a zone that has this TPU; where you clone this from
#   gcloud compute tpus tpu-vm create $NAME --zone=$ZONE --accelerator-type=v6e-8 --version=v2-alpha-tpuv6e
#   gcloud compute tpus tpu-vm ssh $NAME --zone=$ZONE --command="git clone $REPOSITORY mae_align"
#   gcloud compute tpus tpu-vm ssh $NAME --zone=$ZONE \
#     --command="cd mae_align && bash tpu_setup.sh EXPECT_DEVICES=8"
#   gcloud compute tpus tpu-vm ssh $NAME --zone=$ZONE \
#     --command="cd mae_align && JAX_PLATFORMS=tpu,cpu .venv-tpu/bin/python -m experiments.masking_sweep"
#
# TPU slice of several hosts: the same commands on every worker at once. EXPECT_DEVICES counts the
# devices of each host. MAE_ALIGN_DISTRIBUTED=auto lets the processes find each other. TPUs sum the moments of
# a stream; sweeps solve in float64, on the CPU of each host.
#   gcloud compute tpus tpu-vm create $NAME --zone=$ZONE --accelerator-type=v6e-32 --version=v2-alpha-tpuv6e
#   gcloud compute tpus tpu-vm ssh $NAME --zone=$ZONE --worker=all --command="git clone $REPOSITORY mae_align"
#   gcloud compute tpus tpu-vm ssh $NAME --zone=$ZONE --worker=all \
#     --command="cd mae_align && bash tpu_setup.sh EXPECT_DEVICES=4"
#   gcloud compute tpus tpu-vm ssh $NAME --zone=$ZONE --worker=all --command="cd mae_align && \
#     JAX_PLATFORMS=tpu,cpu MAE_ALIGN_DISTRIBUTED=auto .venv-tpu/bin/python -m experiments.masking_sweep"
#   gcloud compute tpus tpu-vm delete $NAME --zone=$ZONE     # a TPU costs money until it is deleted
#
# If something is wrong
#   - The check waits: on a slice the TPU starts only when every worker runs it, even to count the
#     devices of one host. Run it with --worker=all. It stops after WAIT seconds.
#   - "already in use": another process holds the TPU. End it, then run this again.
#   - pip reaches nothing: a TPU VM without an external address needs Cloud NAT.
#   - A GPU older than compute capability 7.5 (V100) needs CUDA=12 whatever the driver offers.
#
# What was tested, and how: the CPU path is run as it is by .ci/run. The TPU and GPU branches were
# never run on a TPU or GPU: tests/test_tpu_setup.py runs this script with fakes of what it looks at
# (python3, pip, uv, nvidia-smi, curl and device files). For that alone, TPU_SETUP_ROOT names a folder
# that stands for / where device files are looked for. The gcloud commands above were not run.
set -euo pipefail

say() { printf 'tpu_setup: %s\n' "$*"; }
warn() { printf 'tpu_setup: warning: %s\n' "$*" >&2; }
fail() {
  printf 'tpu_setup: %s\n' "$*" >&2
  exit 1
}
usage_error() {
  printf 'tpu_setup: %s (bash tpu_setup.sh --help)\n' "$*" >&2
  exit 2
}

readonly new_python=3.12 # brought by uv; supported: pyproject.toml, requires-python
mode='' expect_devices='' python='' cuda='' wait_seconds=600 force=0

read_arguments() {
  local argument value
  for argument in "$@"; do
    value=${argument#*=}
    case $argument in
      MODE=tpu | MODE=gpu | MODE=cpu) mode=$value ;;
      MODE=*) usage_error "$argument: MODE is tpu, gpu or cpu" ;;
      EXPECT_DEVICES=*)
        [[ $value =~ ^[1-9][0-9]*$ ]] || usage_error "$argument: give a whole number of at least 1"
        expect_devices=$value
        ;;
      PYTHON=?*) python=$value ;;
      CUDA=12 | CUDA=13) cuda=$value ;;
      CUDA=*) usage_error "$argument: CUDA is 12 or 13" ;;
      WAIT=*)
        [[ $value =~ ^[1-9][0-9]*$ ]] || usage_error "$argument: give a whole number of seconds of at least 1"
        wait_seconds=$value
        ;;
      FORCE=0 | FORCE=1) force=$value ;;
      FORCE=*) usage_error "$argument: FORCE is 0 or 1" ;;
      *) usage_error "unknown argument '$argument'" ;;
    esac
  done
}

enter_repository() {
  cd "$(dirname "${BASH_SOURCE[0]:-}")"
  grep -qs '^name = "mae-align"' pyproject.toml ||
    fail "$PWD is no clone of mae_align: clone it, and run the tpu_setup.sh inside it"
}

# Prints the device files of the TPU chips, one a line; fails where there are none. Newer TPUs are
# handed over through VFIO, which other devices use too: they need a PCI device of Google's as well.
tpu_files() {
  local root=${TPU_SETUP_ROOT:-}
  compgen -G "$root/dev/accel[0-9]*" && return
  grep -qsix 0x1ae0 "$root"/sys/bus/pci/devices/*/vendor && compgen -G "$root/dev/vfio/[0-9]*"
}

# Prints the GPUs, one a line; fails where there are none.
gpu_list() {
  local gpus
  gpus=$(nvidia-smi -L 2>/dev/null) && grep '^GPU [0-9]' <<<"$gpus"
}

find_mode() {
  local devices
  if [[ -n $mode ]]; then
    say "MODE=$mode, as asked"
  elif devices=$(tpu_files); then
    mode=tpu
    say "MODE=tpu: found $(wc -l <<<"$devices") TPU device files"
  elif devices=$(gpu_list); then
    mode=gpu
    say "MODE=gpu: found $(wc -l <<<"$devices") GPUs"
  else
    mode=cpu
    say "MODE=cpu: found neither TPU device files nor a GPU that nvidia-smi lists"
    if command -v nvidia-smi >/dev/null; then
      warn "nvidia-smi is installed but lists no GPU: if there is one, repair its driver and run this again"
    fi
  fi
}

# Sets cuda to the newest CUDA that both the driver and JAX support.
find_cuda() {
  [[ -z $cuda ]] || return 0
  local answer version
  answer=$(nvidia-smi 2>&1) ||
    fail "nvidia-smi does not answer: install the NVIDIA driver, or use MODE=cpu. It says: ${answer%%$'\n'*}"
  # Drivers from 610 on say "CUDA UMD Version".
  version=$(sed -nE 's/.*CUDA (UMD )?Version *: *([0-9]+)\.[0-9]+.*/\2/p' <<<"$answer" | sort -nu | tail -n 1)
  [[ -n $version ]] || fail "nvidia-smi does not say which CUDA its driver supports: give CUDA=12 or CUDA=13"
  if ((version >= 13)); then
    cuda=13
  elif ((version == 12)); then
    cuda=12
  else
    fail "the driver supports CUDA $version, JAX needs 12 or 13: update the NVIDIA driver, or use MODE=cpu"
  fi
}

# Prints the version of the Python $1 if this project runs on it and it can make environments
# (Debian and Ubuntu keep ensurepip in a package of its own).
usable_version() {
  local version
  version=$("$1" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null) || return 1
  [[ $version =~ ^3\.(11|12|13)\. ]] || return 1
  "$1" -c 'import ensurepip, venv' 2>/dev/null || return 1
  echo "$version"
}

# Sets python, empty where uv has to bring one, and python_version, which the stamp records.
find_python() {
  local candidate
  # An activated environment of this script is what it may be about to remove.
  [[ ${VIRTUAL_ENV:-} != "$PWD"/.venv-* ]] || PATH=${PATH//"$VIRTUAL_ENV/bin:"/}
  if [[ -n $python ]]; then
    python_version=$(usable_version "$python") ||
      fail "PYTHON=$python is not a Python 3.11 to 3.13 with the venv module (Debian, Ubuntu: python3-venv)"
    return
  fi
  for candidate in python3 python3.12 python3.13 python3.11; do
    if python_version=$(usable_version "$candidate"); then
      python=$candidate
      return
    fi
  done
  python_version="$new_python of uv"
}

# Sets python to a Python that uv installs, and fetches uv itself if need be.
fetch_python() {
  local uv=uv
  if ! command -v uv >/dev/null; then
    uv=$PWD/.venv-uv/bin/uv
    if [[ ! -x $uv ]]; then
      say "python3 is too old or has no venv module: fetching uv, which brings Python $new_python"
      # A folder of its own: works without the venv module, and where pip refuses to touch the system.
      python3 -m pip install --quiet --target .venv-uv uv ||
        fail "no Python 3.11 to 3.13 with the venv module, and no pip that could fetch one. Next:" \
          "sudo apt-get install -y python3-venv python3-pip, and run this again"
    fi
  fi
  "$uv" python install "$new_python" ||
    fail "uv could not install Python $new_python: install one yourself and give PYTHON=COMMAND"
  python=$(UV_PYTHON_PREFERENCE=only-managed "$uv" python find "$new_python") ||
    fail "uv does not find the Python it installed: install one yourself and give PYTHON=COMMAND"
}

# Makes the environment $venv, unless it is there and was made from the same things.
build() {
  local extra='' stamp wanted
  case $mode in
    tpu) extra='[tpu]' ;;
    gpu) extra="[cuda$cuda]" ;;
  esac
  stamp=$venv/tpu_setup.stamp
  # The folder too: an environment does not survive being moved.
  wanted="extra=$extra python=$python_version pyproject=$(cksum <pyproject.toml) folder=$PWD"
  if ((!force)) && [[ -x $venv/bin/python && $(cat "$stamp" 2>/dev/null) == "$wanted" ]]; then
    say "$venv is up to date (FORCE=1 builds it anew)"
    return
  fi
  [[ -n $python ]] || fetch_python
  say "building $venv with Python $python_version: pip install -e '.$extra' (minutes)"
  rm -rf "$venv"
  "$python" -m venv "$venv" || fail "$python -m venv $venv failed: see above, then run this again"
  "$venv/bin/python" -m pip install --quiet --no-input -e ".$extra" ||
    fail "pip could not install mae_align$extra: see above, then run this again"
  # Last: an interrupted run leaves no stamp, and the next one starts anew.
  echo "$wanted" >"$stamp"
}

# Prints what JAX sees, as lines of name=value, after having computed on each device. Does not start
# jax.distributed: nothing here needs the other processes.
show_devices() {
  timeout --kill-after=10 "$wait_seconds" env JAX_PLATFORMS="$1" "$venv/bin/python" - <<'PYTHON'
import platform

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np

from mae_align.runtime.devices import solve_context, solve_device

print(f"python={platform.python_version()}")
print(f"jax={jax.__version__}")
print(f"jaxlib={jaxlib.__version__}")
print(f"backend={jax.default_backend()}")
print(f"kind={jax.local_devices()[0].device_kind}")
print(f"local_device_count={jax.local_device_count()}")
print(f"device_count={jax.device_count()}")
for device in jax.local_devices():
    ones = jax.device_put(np.ones((8, 8), np.float32), device)
    if float((ones @ ones).sum()) != 512.0:
        raise SystemExit(f"{device} computes wrongly")
with solve_context("float64"):
    values = np.asarray(jnp.linalg.eigvalsh(jnp.asarray([[2.0, 1.0], [1.0, 2.0]], dtype=jnp.float64)))
if values.dtype != np.float64 or abs(values - [1.0, 3.0]).max() > 1e-12:
    raise SystemExit(f"a float64 solve gives {values} of type {values.dtype}")
print(f"float64={solve_device('float64').platform}")
PYTHON
}

# The value of the line $1=value in $facts.
fact() { sed -n "s/^$1=//p" <<<"$facts"; }

# Sets workers to the number of hosts of the TPU slice and worker to this one's number; empty where unknown.
find_workers() {
  local hosts=${TPU_WORKER_HOSTNAMES:-}
  worker=${TPU_WORKER_ID:-}
  if [[ -z $hosts ]]; then
    hosts=$(metadata worker-network-endpoints)
    worker=$(metadata agent-worker-number)
  fi
  workers=${hosts:+$(tr ',' '\n' <<<"$hosts" | wc -l)}
}

# An attribute of this VM as Google Cloud's metadata server gives it; nothing elsewhere.
metadata() {
  curl --silent --fail --max-time 5 --header 'Metadata-Flavor: Google' \
    "http://metadata.google.internal/computeMetadata/v1/instance/attributes/$1" 2>/dev/null || true
}

check() {
  local platforms=cpu backend=$mode next status=0 needed
  case $mode in
    tpu)
      platforms=tpu,cpu
      next="does another process hold the TPU? Does the runtime version fit it (see --help)? Else: FORCE=1"
      find_workers
      if ((${workers:-1} > 1)); then
        say "worker ${worker:-?} of $workers (from 0): the TPU starts when all of them run this check"
      fi
      ;;
    gpu)
      platforms=cuda,cpu
      next="does nvidia-smi list the GPU? Is it older than compute capability 7.5: CUDA=12. Else: FORCE=1"
      ;;
    cpu) next="run this again with FORCE=1" ;;
  esac
  say "checking the devices, for at most $wait_seconds s (WAIT=SECONDS)"
  facts=$(show_devices "$platforms") || status=$?
  if ((status == 124 || status == 137)); then
    next="give more time with WAIT=SECONDS"
    if [[ $mode == tpu ]]; then
      next="on a slice of several hosts, run this on all at once (gcloud ... --worker=all);"
      next+=" else end the process that holds the TPU"
    fi
    fail "the device check did not end in $wait_seconds s. Next: $next"
  fi
  ((status == 0)) || fail "JAX does not work on MODE=$mode, see above. Next: $next"

  say "Python $(fact python), jax $(fact jax), jaxlib $(fact jaxlib), backend $(fact backend) ($(fact kind))"
  say "jax.local_device_count() $(fact local_device_count), jax.device_count() $(fact device_count)," \
    "float64 solves on: $(fact float64)"
  needed=$(sed -n 's/^ *"jax>=\([0-9.]*\)".*/\1/p' pyproject.toml)
  if ! printf '%s\n' "$needed" "$(fact jax)" | sort -V -C; then
    warn "jax $(fact jax) is older than the $needed that pyproject.toml asks for: run this again with FORCE=1"
  fi
  [[ $(fact backend) == "$backend" ]] ||
    fail "JAX computes on '$(fact backend)', not on '$backend'. Next: $next"
  (($(fact local_device_count) >= 1)) || fail "JAX sees no device. Next: $next"
  if [[ -n $expect_devices && $(fact local_device_count) != "$expect_devices" ]]; then
    fail "JAX sees $(fact local_device_count) devices on this host, EXPECT_DEVICES=$expect_devices." \
      "Next: correct the number, or $next"
  fi
}

show_next_steps() {
  say "ready. Next:"
  printf '  . %s/bin/activate\n' "$venv"
  if [[ $mode == tpu ]]; then
    printf '  export JAX_PLATFORMS=tpu,cpu             # float64 solves run on the host, beside the TPU\n'
    if ((${workers:-1} > 1)); then
      printf '  export MAE_ALIGN_DISTRIBUTED=auto        # on each of the %s workers, all at once\n' "$workers"
    fi
  fi
  printf '  python -m experiments.masking_sweep\n'
}

main() {
  if [[ ${1:-} == --help || ${1:-} == -h ]]; then
    sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
    return
  fi
  read_arguments "$@"
  enter_repository
  find_mode
  venv=.venv-$mode
  [[ $mode != gpu ]] || find_cuda
  find_python
  build
  check
  show_next_steps
}

# Read as a whole before anything runs: the file may change meanwhile.
main "$@"
