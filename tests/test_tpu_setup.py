"""tpu_setup.sh, run by bash with fakes of all that it looks at: Pythons, pip, uv, nvidia-smi, curl, device files.

The PATH of these runs holds nothing but the fakes and links to the standard tools that the script may use.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "tpu_setup.sh"
TOOLS = "bash cat cksum cp dirname env grep mkdir rm sed sleep sort tail timeout tr wc".split()
HEADER = "| NVIDIA-SMI 610.43.02    Driver Version: 610.43.02    {} |"

# Logs its arguments, then does what the script asks of a Python: say its version, make an
# environment (with a copy of itself), install, fetch uv, run the device check.
FAKE_PYTHON = """#!/usr/bin/env bash
echo "${{0##*/}} $*" >>"$FAKE/log"
case "$*" in
  *version_info*) echo {version} ;;
  *ensurepip*) exit {no_venv} ;;
  "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  *"--target .venv-uv uv") [[ {pip} == yes ]] && mkdir -p .venv-uv/bin && cp "$FAKE/uv" .venv-uv/bin/uv ;;
  "-m pip install "*) exit "${{FAKE_PIP_STATUS:-0}}" ;;
  -)
    echo "check JAX_PLATFORMS=$JAX_PLATFORMS" >>"$FAKE/log"
    if [[ -n ${{FAKE_REAL_PYTHON:-}} ]]; then exec "$FAKE_REAL_PYTHON" -; fi
    cat >"$FAKE/check.py"
    if [[ -n ${{FAKE_HANG:-}} ]]; then exec sleep 30; fi
    cat "$FAKE/facts"
    exit "${{FAKE_CHECK_STATUS:-0}}"
    ;;
  *) echo "unexpected: $*" >&2 && exit 99 ;;
esac
"""
FAKE_UV = """#!/usr/bin/env bash
echo "uv $* (${UV_PYTHON_PREFERENCE:-})" >>"$FAKE/log"
case "$*" in
  "python install 3.12") ;;
  "python find 3.12") echo "$FAKE/python3.12" ;;
  *) exit 99 ;;
esac
"""
FAKE_CURL = """#!/usr/bin/env bash
case "${*: -1}" in
  */attributes/worker-network-endpoints) echo "a:b:10.0.0.1,a:b:10.0.0.2,a:b:10.0.0.3,a:b:10.0.0.4" ;;
  */attributes/agent-worker-number) echo 2 ;;
  *) exit 22 ;;
esac
"""


def write_command(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


@dataclass
class Host:
    """A machine without accelerators and with Python 3.12, until something is put on it."""

    folder: Path
    environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("repository", "bin", "fake", "root/dev"):
            (self.folder / name).mkdir(parents=True)
        for name in ("tpu_setup.sh", "pyproject.toml"):
            shutil.copy(ROOT / name, self.repository)
        for tool in TOOLS:
            found = shutil.which(tool)
            assert found, f"these tests need {tool}"
            (self.folder / "bin" / tool).symlink_to(found)
        self.log.touch()
        self.put_python("python3", "3.12.4")
        self.put_facts("cpu", 1)

    @property
    def repository(self) -> Path:
        return self.folder / "repository"

    @property
    def log(self) -> Path:
        return self.folder / "fake/log"

    def put_python(self, name: str, version: str, venv: bool = True, pip: bool = True) -> None:
        text = FAKE_PYTHON.format(version=version, no_venv=int(not venv), pip="yes" if pip else "no")
        write_command(self.folder / "bin" / name, text)

    def put_uv(self, on_path: bool) -> None:
        write_command(self.folder / "fake/uv", FAKE_UV)
        write_command(self.folder / "fake/python3.12", FAKE_PYTHON.format(version="3.12.9", no_venv=0, pip="yes"))
        if on_path:
            write_command(self.folder / "bin/uv", FAKE_UV)

    def put_gpus(self, header: str, status: int = 0) -> None:
        gpus = "GPU 0: NVIDIA H100 (UUID: GPU-1)\\nGPU 1: NVIDIA H100 (UUID: GPU-2)"
        write_command(
            self.folder / "bin/nvidia-smi",
            f"#!/usr/bin/env bash\n[[ {status} == 0 ]] || {{ echo 'NVIDIA-SMI has failed'; exit {status}; }}\n"
            f"if [[ ${{1:-}} == -L ]]; then printf '{gpus}\\n'; else echo '{header}'; fi\n",
        )
        self.put_facts("gpu", 2)

    def put_tpu_files(self, *names: str) -> None:
        for name in names:
            path = self.folder / "root" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        self.put_facts("tpu", 4)

    def put_pci_vendor(self, vendor: str) -> None:
        path = self.folder / "root/sys/bus/pci/devices/0000:00:04.0/vendor"
        path.parent.mkdir(parents=True)
        path.write_text(f"{vendor}\n")

    def put_facts(self, backend: str, count: int, jax_version: str = "0.12.0", all_hosts: int | None = None) -> None:
        facts = {"python": "3.12.4", "jax": jax_version, "jaxlib": jax_version, "backend": backend, "kind": "fake"}
        counts = {"local_device_count": count, "device_count": all_hosts or count, "float64": "cpu"}
        lines = [f"{name}={value}\n" for name, value in (facts | counts).items()]
        (self.folder / "fake/facts").write_text("".join(lines))

    def run(self, *arguments: str, script: Path | None = None, **options: object) -> subprocess.CompletedProcess[str]:
        """Runs the script from a folder outside the repository; forgets the calls logged before."""
        self.log.write_text("")
        environment = {
            "PATH": f"{self.folder / 'bin'}",
            "HOME": str(self.folder),
            "FAKE": str(self.folder / "fake"),
            "TPU_SETUP_ROOT": str(self.folder / "root"),
        }
        return subprocess.run(
            [str(self.folder / "bin/bash"), str(script or self.repository / "tpu_setup.sh"), *arguments],
            env=environment | self.environment,
            **{"cwd": self.folder, "capture_output": True, "text": True, "timeout": 60} | options,  # pyright: ignore[reportArgumentType, reportCallIssue]
        )

    def succeed(self, *arguments: str) -> str:
        done = self.run(*arguments)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    def fail(self, *arguments: str, status: int = 1) -> str:
        """What the script says when it must fail; it never says that all is ready."""
        done = self.run(*arguments)
        assert done.returncode == status, done.stdout + done.stderr
        assert "ready" not in done.stdout
        return done.stderr

    @property
    def calls(self) -> list[str]:
        return self.log.read_text().splitlines()

    @property
    def built(self) -> list[str]:
        """The calls that make an environment and fill it."""
        return [call for call in self.calls if "-m venv" in call or "-m pip install" in call or call.startswith("uv ")]


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def built(mode: str, extra: str, python: str = "python3") -> list[str]:
    return [f"{python} -m venv .venv-{mode}", f"python -m pip install --quiet --no-input -e .{extra}"]


def test_cpu(host: Host) -> None:
    said = host.succeed()
    assert host.built == built("cpu", "")
    assert host.calls[-1] == "check JAX_PLATFORMS=cpu"
    assert "MODE=cpu: found neither" in said and "warning" not in said
    assert "Python 3.12.4, jax 0.12.0, jaxlib 0.12.0, backend cpu (fake)" in said
    assert "jax.local_device_count() 1, jax.device_count() 1, float64 solves on: cpu" in said
    assert ". .venv-cpu/bin/activate" in said and "JAX_PLATFORMS" not in said


def test_the_check_runs_on_a_real_jax(host: Host) -> None:
    host.environment = {
        "FAKE_REAL_PYTHON": sys.executable,
        "PYTHONPATH": str(ROOT),
        "JAX_NUM_CPU_DEVICES": "3",
        "JAX_PLATFORMS": "tpu",  # of the caller: the script sets its own
    }
    said = host.succeed("EXPECT_DEVICES=3")
    assert f"jax {jax.__version__}, jaxlib" in said and "backend cpu (cpu)" in said
    assert "jax.local_device_count() 3, jax.device_count() 3, float64 solves on: cpu" in said


@pytest.mark.parametrize(
    "header, arguments, extra",
    [
        ("CUDA Version: 12.4", [], "[cuda12]"),
        ("CUDA Version: 13.0", [], "[cuda13]"),
        ("CUDA UMD Version: 13.3", [], "[cuda13]"),
        ("CUDA Version: 14.1", [], "[cuda13]"),
        ("CUDA Version: 13.0", ["CUDA=12"], "[cuda12]"),
        ("CUDA Version: N/A", ["CUDA=12"], "[cuda12]"),
    ],
)
def test_gpu(host: Host, header: str, arguments: list[str], extra: str) -> None:
    host.put_gpus(HEADER.format(header))
    said = host.succeed("EXPECT_DEVICES=2", *arguments)
    assert "MODE=gpu: found 2 GPUs" in said
    assert host.built == built("gpu", extra)
    assert host.calls[-1] == "check JAX_PLATFORMS=cuda,cpu"
    assert ". .venv-gpu/bin/activate" in said and "tpu,cpu" not in said


@pytest.mark.parametrize(
    "header, says",
    [
        ("CUDA Version: 11.8", "the driver supports CUDA 11, JAX needs 12 or 13: update the NVIDIA driver"),
        ("CUDA Version: N/A", "does not say which CUDA its driver supports: give CUDA=12 or CUDA=13"),
    ],
)
def test_gpu_driver_that_jax_cannot_use(host: Host, header: str, says: str) -> None:
    host.put_gpus(HEADER.format(header))
    assert says in host.fail()
    assert host.calls == []


def test_gpu_driver_that_fails(host: Host) -> None:
    host.put_gpus("", status=9)
    assert "install the NVIDIA driver, or use MODE=cpu. It says: NVIDIA-SMI has failed" in host.fail("MODE=gpu")
    assert host.calls == []
    host.put_facts("cpu", 1)
    assert "warning: nvidia-smi is installed but lists no GPU" in host.succeed()
    assert host.built == built("cpu", "")


@pytest.mark.parametrize("files", [("dev/accel0", "dev/accel1"), ("dev/vfio/0", "dev/vfio/1", "dev/vfio/vfio")])
def test_tpu_on_one_host(host: Host, files: tuple[str, ...]) -> None:
    host.put_gpus(HEADER.format("CUDA Version: 13.0"))  # the TPU comes first
    host.put_tpu_files(*files)
    host.put_pci_vendor("0x1ae0")
    said = host.succeed("EXPECT_DEVICES=4")
    assert "MODE=tpu: found 2 TPU device files" in said
    assert host.built == built("tpu", "[tpu]")
    assert host.calls[-1] == "check JAX_PLATFORMS=tpu,cpu"
    assert "export JAX_PLATFORMS=tpu,cpu" in said
    assert "worker" not in said and "MAE_ALIGN_DISTRIBUTED" not in said


@pytest.mark.parametrize("source", ["metadata", "environment"])
def test_tpu_on_several_hosts(host: Host, source: str) -> None:
    host.put_tpu_files("dev/accel0")
    host.put_facts("tpu", 4, all_hosts=16)
    if source == "metadata":
        write_command(host.folder / "bin/curl", FAKE_CURL)
    else:
        host.environment = {"TPU_WORKER_ID": "2", "TPU_WORKER_HOSTNAMES": "t0,t1,t2,t3"}
    said = host.succeed("EXPECT_DEVICES=4")
    assert "worker 2 of 4 (from 0): the TPU starts when all of them run this check" in said
    assert "jax.local_device_count() 4, jax.device_count() 16" in said
    assert "export MAE_ALIGN_DISTRIBUTED=auto        # on each of the 4 workers" in said
    assert "JAX sees 4 devices on this host, EXPECT_DEVICES=16" in host.fail("EXPECT_DEVICES=16")


def test_the_check_does_not_start_jax_distributed(host: Host) -> None:
    host.succeed()
    code = (host.folder / "fake/check.py").read_text()
    compile(code, "check.py", "exec")
    assert "jax.local_device_count()" in code and "distributed" not in code


@pytest.mark.parametrize(
    "vendor, files", [("0x10de", ("dev/vfio/0",)), ("0x1ae0", ("dev/vfio/vfio", "dev/accel/accel0"))]
)
def test_other_devices_are_no_tpu(host: Host, vendor: str, files: tuple[str, ...]) -> None:
    host.put_tpu_files(*files)
    host.put_pci_vendor(vendor)
    host.put_facts("cpu", 1)
    assert "MODE=cpu: found neither" in host.succeed()


@pytest.mark.parametrize("mode, platforms", [("cpu", "cpu"), ("tpu", "tpu,cpu")])
def test_mode_overrides_what_is_found(host: Host, mode: str, platforms: str) -> None:
    host.put_gpus(HEADER.format("CUDA Version: 13.0"))
    host.put_facts(mode, 1)
    assert f"MODE={mode}, as asked" in host.succeed(f"MODE={mode}")
    assert host.calls[-1] == f"check JAX_PLATFORMS={platforms}"


UV_CALLS = ["uv python install 3.12 ()", "uv python find 3.12 (only-managed)"]


@pytest.mark.parametrize("version, venv", [("3.10.12", True), ("3.14.0", True), ("3.11.2", False)])
def test_python_of_its_own(host: Host, version: str, venv: bool) -> None:
    host.put_python("python3", version, venv=venv)
    host.put_uv(on_path=True)
    host.succeed()
    assert host.built == [*UV_CALLS, *built("cpu", "", python="python3.12")]
    host.succeed()
    assert host.built == []


def test_uv_is_fetched_once(host: Host) -> None:
    host.put_python("python3", "3.10.12", venv=False)
    host.put_uv(on_path=False)
    expected = [*UV_CALLS, *built("cpu", "", python="python3.12")]
    host.succeed()
    assert host.built == ["python3 -m pip install --quiet --target .venv-uv uv", *expected]
    host.succeed("FORCE=1")
    assert host.built == expected


def test_neither_python_nor_pip(host: Host) -> None:
    host.put_python("python3", "3.11.2", venv=False, pip=False)
    assert "sudo apt-get install -y python3-venv python3-pip, and run this again" in host.fail()


def test_another_python_on_the_path_saves_the_download(host: Host) -> None:
    host.put_python("python3", "3.10.12")
    host.put_python("python3.13", "3.13.1")
    host.succeed()
    assert host.built == built("cpu", "", python="python3.13")


def test_python_as_asked(host: Host) -> None:
    host.put_python("mine", "3.11.7")
    host.succeed("PYTHON=mine")
    assert host.built == built("cpu", "", python="mine")
    host.put_python("mine", "3.10.7")
    assert "PYTHON=mine is not a Python 3.11 to 3.13" in host.fail("PYTHON=mine")
    assert host.built == []


def test_supported_pythons_and_extras_are_those_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == ">=3.11,<3.14"
    assert r"^3\.(11|12|13)\." in SCRIPT.read_text()
    (floor,) = [line.removeprefix("jax") for line in project["dependencies"] if re.match(r"jax\W", line)]
    for extra in ("tpu", "cuda12", "cuda13"):
        assert project["optional-dependencies"][extra] == [f"jax[{extra}]{floor}"]


def test_a_second_run_builds_nothing(host: Host) -> None:
    host.succeed()
    said = host.succeed()
    assert host.built == [] and host.calls[-1] == "check JAX_PLATFORMS=cpu"
    assert ".venv-cpu is up to date (FORCE=1 builds it anew)" in said and "ready" in said


@pytest.mark.parametrize("change", ["FORCE", "pyproject.toml", "Python", "CUDA", "interrupted", "moved"])
def test_what_makes_it_build_anew(host: Host, change: str) -> None:
    host.put_gpus(HEADER.format("CUDA Version: 13.0"))
    arguments: list[str] = []
    extra = "[cuda13]"
    if change == "interrupted":
        host.environment = {"FAKE_PIP_STATUS": "1"}
        assert "pip could not install mae_align[cuda13]: see above, then run this again" in host.fail()
        host.environment = {}
    else:
        host.succeed()
    leftover = host.repository / ".venv-gpu/leftover"
    leftover.touch()
    if change == "FORCE":
        arguments = ["FORCE=1"]
    elif change == "pyproject.toml":
        with (host.repository / "pyproject.toml").open("a") as file:
            file.write("# one more line\n")
    elif change == "Python":
        host.put_python("python3", "3.12.5")
    elif change == "CUDA":
        arguments, extra = ["CUDA=12"], "[cuda12]"
    elif change == "moved":
        shutil.move(host.repository, host.folder / "elsewhere")
        shutil.copytree(host.folder / "elsewhere", host.repository / "deeper")
        done = host.run(script=host.repository / "deeper/tpu_setup.sh")
        assert done.returncode == 0 and host.built == built("gpu", extra)
        return
    host.succeed(*arguments)
    assert host.built == built("gpu", extra)
    assert not leftover.exists()


def test_modes_keep_their_environments(host: Host) -> None:
    host.succeed()
    host.put_tpu_files("dev/accel0")
    host.succeed()
    assert host.built == built("tpu", "[tpu]")
    host.put_facts("cpu", 1)
    host.succeed("MODE=cpu")
    assert host.built == []


def test_an_activated_environment_is_not_built_from_itself(host: Host) -> None:
    host.succeed()
    inside = host.repository / ".venv-cpu"
    (inside / "bin/python3").symlink_to("python")
    host.environment = {"VIRTUAL_ENV": str(inside), "PATH": f"{inside / 'bin'}:{host.folder / 'bin'}"}
    host.put_python("python3", "3.12.5")
    host.succeed()
    assert host.built == built("cpu", "")


@pytest.mark.parametrize(
    "backend, count, arguments, says",
    [
        (
            "tpu",
            4,
            ["EXPECT_DEVICES=8"],
            "JAX sees 4 devices on this host, EXPECT_DEVICES=8. Next: correct the number, or",
        ),
        ("cpu", 1, [], "JAX computes on 'cpu', not on 'tpu'. Next: does another process hold the TPU?"),
        ("tpu", 0, [], "JAX sees no device. Next: does another process hold the TPU?"),
    ],
)
def test_devices_that_are_not_as_expected(
    host: Host, backend: str, count: int, arguments: list[str], says: str
) -> None:
    host.put_tpu_files("dev/accel0")
    host.put_facts(backend, count)
    assert says in host.fail(*arguments)


@pytest.mark.parametrize(
    "mode, says",
    [
        ("cpu", "run this again with FORCE=1"),
        ("gpu", "does nvidia-smi list the GPU?"),
        ("tpu", "runtime version fit it"),
    ],
)
def test_jax_that_does_not_work(host: Host, mode: str, says: str) -> None:
    host.environment = {"FAKE_CHECK_STATUS": "1"}
    said = host.fail(f"MODE={mode}", *(["CUDA=13"] if mode == "gpu" else []))
    assert f"JAX does not work on MODE={mode}, see above. Next: " in said and says in said


def test_a_check_that_hangs(host: Host) -> None:
    host.environment = {"FAKE_HANG": "1"}
    said = host.fail("MODE=tpu", "WAIT=1")
    assert "the device check did not end in 1 s. Next: " in said and "--worker=all" in said


@pytest.mark.parametrize("status", ["124", "137"])  # ended by timeout's first and second signal
def test_a_check_that_is_too_slow(host: Host, status: str) -> None:
    host.environment = {"FAKE_CHECK_STATUS": status}
    assert "did not end in 600 s. Next: give more time with WAIT=SECONDS" in host.fail("MODE=cpu")


@pytest.mark.parametrize("version, warns", [("0.9.2", True), ("0.10.2", False)])
def test_old_jax(host: Host, version: str, warns: bool) -> None:
    host.put_facts("cpu", 1, jax_version=version)
    said = host.succeed()
    assert (f"warning: jax {version} is older than the 0.10.2 that pyproject.toml asks for" in said) == warns
    assert ("warning" in said) == warns


def test_outside_the_repository(host: Host) -> None:
    copy = Path(shutil.copy(SCRIPT, host.folder / "lost.sh"))
    done = host.run(script=copy)
    assert done.returncode == 1 and host.calls == []
    assert f"{host.folder} is no clone of mae_align: clone it, and run the tpu_setup.sh inside it" in done.stderr
    assert not list(host.folder.glob(".venv*"))


def test_read_from_standard_input(host: Host) -> None:
    """As `ssh HOST 'cd mae_align && bash -s' < tpu_setup.sh` does."""
    done = host.run(script=Path("-s"), cwd=host.repository, input=SCRIPT.read_text())
    assert done.returncode == 0, done.stderr
    assert host.built == built("cpu", "")


@pytest.mark.parametrize(
    "argument",
    "MODE=gpus mode=cpu --force EXPECT_DEVICES=0 EXPECT_DEVICES=two CUDA=11 WAIT=0 FORCE=yes PYTHON=".split(),
)
def test_bad_arguments(host: Host, argument: str) -> None:
    said = host.fail("MODE=cpu", argument, status=2)
    assert argument in said and "--help" in said and len(said.splitlines()) == 1
    assert host.calls == []


def test_help_is_the_header(host: Host) -> None:
    said = host.succeed("--help")
    header = SCRIPT.read_text().split("\nset -euo")[0].splitlines()[1:]
    assert said.splitlines() == [line[2:] for line in header]
    assert host.calls == []
    for needed in ("--worker=all", "tpu-vm create", "JAX_PLATFORMS=tpu,cpu", "MAE_ALIGN_DISTRIBUTED=auto"):
        assert needed in said


def test_the_caller_s_settings_reach_nothing(host: Host) -> None:
    """Settings are arguments; variables of the same names, common on servers, are not read."""
    host.environment = {"MODE": "gpu", "EXPECT_DEVICES": "7", "FORCE": "1", "PYTHON": "none", "CUDA": "11", "WAIT": "x"}
    host.succeed()
    host.succeed()
    assert host.built == []
    assert os.access(host.repository / ".venv-cpu/bin/python", os.X_OK)
