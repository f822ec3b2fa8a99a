"""Install: a bare Python in, a virtual environment that holds everything out. Imports the standard library alone.

    python3 -m seap_ray.install [--extras dev,eval] [--venv .venv]

torch comes first and alone, since machines differ in it: one with an NVIDIA GPU takes the ordinary
build, any other the CPU build, a fraction of the size and what vLLM's CPU build insists on.
A second run finds a stamp and has nothing to do.
"""

import argparse
import hashlib
import importlib.util
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

if sys.version_info < (3, 11):  # noqa: UP036 (the one file that an older Python may get to read)
    sys.exit("error: seap_ray needs Python 3.11 or newer, and this is " + sys.version.split()[0])

ROOT = Path(__file__).resolve().parents[1]
START = time.monotonic()

COMPANIONS = ("torchvision", "torchaudio", "torchcodec")
"""Packages that vLLM asks for. Their GPU builds fail to import beside a CPU torch, and so does transformers then."""


def say(text: str) -> None:
    """Print a line with the seconds since the start."""
    print(f"[{time.monotonic() - START:6.1f} s] {text}", flush=True)


def fail(reason: str, output: str = "") -> NoReturn:
    """End with a one-line reason, below what the failing step printed."""
    sys.exit(f"{output.rstrip()}\nerror: {reason}" if output.strip() else f"error: {reason}")


def run(*command: str) -> tuple[bool, str]:
    """Return whether the command succeeded, and what it printed. It cannot ask: its input is closed."""
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    except OSError as error:
        return False, str(error)
    return done.returncode == 0, done.stdout.decode(errors="replace")


@dataclass(frozen=True, slots=True)
class Venv:
    """A virtual environment; everything is run by its own Python."""

    path: Path

    @property
    def python(self) -> str:
        """Path of the environment's interpreter."""
        return str(self.path / "bin" / "python")

    @property
    def stamp(self) -> Path:
        """File with the fingerprint of what was installed; written last, so that it means all of it."""
        return self.path / "seap_ray.stamp"

    def run(self, *arguments: str) -> tuple[bool, str]:
        """Run the environment's Python; return whether it succeeded, and what it printed."""
        return run(self.python, *arguments)

    def pip_install(self, *arguments: str, reason: str) -> None:
        """Install with the environment's pip, or end with ``reason``."""
        done, output = self.run("-m", "pip", "install", "--quiet", *arguments)
        if not done:
            fail(reason, output)

    def version(self, package: str) -> str | None:
        """Return the version of an installed package, or None where it is not installed."""
        code = f"from importlib.metadata import version; print(version({package!r}))"
        done, output = self.run("-c", code)
        return output.strip() if done else None

    def create(self) -> None:
        """Make the environment, or end with what this Python lacks for it."""
        # Debian keeps ensurepip out of its Python, in a package of its own.
        if not all(importlib.util.find_spec(name) for name in ("venv", "ensurepip")):
            package = f"python3.{sys.version_info.minor}-venv"
            fail(f"this Python cannot make virtual environments; on Debian: apt install {package}")

        say(f"making {self.path}")
        done, output = run(sys.executable, "-m", "venv", str(self.path))
        if not done:
            fail(f"{self.path} could not be made", output)

    def python_version(self) -> str:
        """Return the version of the environment's Python, or end where it is too old, broken or gone."""
        code = "import pip, platform, sys; assert sys.version_info >= (3, 11)"
        done, output = self.run("-c", f"{code}; print(platform.python_version())")
        if not done:
            fail(f"{self.path} has no working Python 3.11 and pip; remove it or name another")
        return output.strip()


def project() -> dict[str, Any]:
    """Return the table ``project`` of pyproject.toml."""
    import tomllib  # new in 3.11, so not above the check of the version

    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def torch_release(dependencies: list[str]) -> str:
    """Return the torch version to install.

    The project asks for `torch==2.13.*`; vLLM's builds ask for the first of these, 2.13.0.
    """
    wanted = next(entry for entry in dependencies if entry.startswith("torch=="))
    return wanted.removeprefix("torch==").replace("*", "0")


def has_nvidia_gpu() -> bool:
    """Return whether the driver lists a GPU."""
    done, output = run("nvidia-smi", "--list-gpus")
    return done and "GPU" in output


def all_extras(names: str, known: dict[str, list[str]]) -> list[str]:
    """Return the extras that are named, and `gpu` or `cpu` as the machine is, unless one of them is named."""
    extras = set(names.replace(",", " ").split())
    if not extras <= set(known):
        fail(f"no extra is named {min(extras - set(known))}; there are {', '.join(known)}")

    # vLLM has a build for each kind of machine.
    if not extras & {"cpu", "gpu"}:
        extras.add("gpu" if has_nvidia_gpu() else "cpu")
    return sorted(extras)


def fingerprint(python_version: str, extras: list[str]) -> str:
    """Return a hash of what decides the outcome: this file, pyproject.toml, their folder, Python and extras."""
    files = [Path(__file__).read_text(), (ROOT / "pyproject.toml").read_text()]
    return hashlib.sha256(repr([*files, str(ROOT), python_version, extras]).encode()).hexdigest()


def install_gpu_torch(venv: Venv, release: str) -> None:
    """Install the ordinary build of torch, which is the one for GPUs."""
    # Where pip knows the CPU build too it would prefer it, for its version has a suffix.
    wanted = f"torch=={release},!={release}+cpu"
    venv.pip_install(wanted, reason=f"torch {release} could not be installed")


def install_cpu_torch(venv: Venv, release: str) -> None:
    """Install torch's CPU build with pip, or with uv, which knows PyTorch's index; or else the ordinary build."""
    if venv.run("-m", "pip", "install", "--only-binary=:all:", f"torch=={release}+cpu")[0]:
        return

    say("pip finds no CPU build of torch; trying uv")
    uv = ("-m", "uv", "pip", "install", "--python", venv.python, "--torch-backend", "cpu")
    if venv.run("-m", "pip", "install", "uv")[0] and venv.run(*uv, f"torch=={release}")[0]:
        return

    say("nor does uv; installing the ordinary build, which is larger and also runs on a CPU")
    venv.pip_install(f"torch=={release}", reason=f"torch {release} could not be installed")


def install_project(venv: Venv, extras: list[str], torch: str) -> None:
    """Install the project, editable, with torch held at the version that is there."""
    if "cpu" in extras and sys.platform == "linux" and not torch.endswith("+cpu"):
        say("leaving vLLM out: its CPU build needs the CPU build of torch; all but serving works")
        extras = [extra for extra in extras if extra != "cpu"]

    # Without this pip could replace torch by another build while it resolves the others' needs.
    constraints = venv.path / "seap_ray.constraints.txt"
    constraints.write_text(f"torch=={torch}\n")
    say(f"installing seap_ray with {', '.join(extras) or 'no extras'} (some minutes)")
    target = f"{ROOT}[{','.join(extras)}]"
    reason = "seap_ray's dependencies could not be installed"
    venv.pip_install("--constraint", str(constraints), "--editable", target, reason=reason)


def remove_broken_companions(venv: Venv) -> None:
    """Uninstall companions of torch that do not import beside it."""
    for name in COMPANIONS:
        if venv.version(name) and not venv.run("-c", f"import {name}")[0]:
            done, output = venv.run("-m", "pip", "uninstall", "--yes", name)
            if not done:
                fail(f"{name} does not import here and could not be removed", output)
            say(f"removed {name}, which does not import beside this torch and is not needed")


def install(venv: Venv, extras: list[str], release: str) -> None:
    """Install torch, then the project, into an environment that is there."""
    build = "GPU" if "gpu" in extras else "CPU"
    say(f"installing torch {release}, {build} build")
    install_torch = install_gpu_torch if "gpu" in extras else install_cpu_torch
    install_torch(venv, release)
    install_project(venv, extras, venv.version("torch") or release)
    remove_broken_companions(venv)


def main() -> None:
    """Make or complete the environment, unless it is up to date."""
    parser = argparse.ArgumentParser(prog="python3 -m seap_ray.install")
    parser.add_argument("--extras", default="", help="comma-separated, for example dev,eval")
    parser.add_argument("--venv", type=Path, default=Path(".venv"), help="folder; made if missing")
    options = parser.parse_args()
    settings = project()
    venv = Venv(options.venv.absolute())
    extras = all_extras(options.extras, settings["optional-dependencies"])

    if not venv.path.exists() or not any(venv.path.iterdir()):
        venv.create()

    # The stamp is removed before anything changes and written last: after an interruption the next run installs again.
    key = fingerprint(venv.python_version(), extras)
    if venv.stamp.exists() and venv.stamp.read_text() == key:
        say(f"{venv.path} is up to date")
        return

    venv.stamp.unlink(missing_ok=True)
    install(venv, extras, torch_release(settings["dependencies"]))
    venv.stamp.write_text(key)
    say(f"ready: {venv.python}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on from here")
