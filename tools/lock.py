"""Resolve pyproject.toml in a fresh environment and pin what came out.

    python tools/lock.py              # requirements.lock and environment.yml, both anew
    python tools/lock.py --conda      # environment.yml from the present lock only

The lock names exact versions and nothing about where they came from: no index, no local build tag, so that
pip finds the build that fits the machine.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOCK, CONDA = ROOT / "requirements.lock", ROOT / "environment.yml"
ITSELF = "sparsity"
#: Fixed by decision, not by the resolver: another torch would change kernels, numbers and download size.
#: soupsieve: version 3 and later need Python 3.11.5, and Debian's 3.11 is older.
HELD = ["torch==2.13.0", "soupsieve<3"]
MARKERS = {"triton": 'platform_system == "Linux" and platform_machine == "x86_64"'}
HEAD = "# Exact versions for Python 3.11; written by `make lock`, not by hand.\n"
CONDA_HEAD = """\
# For conda and Binder. The pip part equals requirements.lock (a test compares them); written by `make lock`.
name: sparsity
channels:
  - conda-forge
dependencies:
  - python=3.11
  - pip
  - make
  - cxx-compiler
  - pip:
"""


def pins(freeze: str) -> list[str]:
    """The lock's lines for what `pip freeze` prints."""
    lines = []
    for line in freeze.splitlines():
        name, equals, version = line.partition("==")
        if not equals or name.lower() == "pip" or name.lower().startswith(ITSELF):
            continue  # the project itself, installed from its folder; pip is the user's own
        marker = MARKERS.get(name.lower())
        lines.append(f"{name}=={version.partition('+')[0]}" + (f" ; {marker}" if marker else ""))
    return sorted(lines, key=str.lower)


def resolve() -> str:
    """`pip freeze` of a new environment that holds what pyproject.toml asks for."""
    with tempfile.TemporaryDirectory() as folder:
        python = Path(folder) / "bin" / "python"
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", f"{ROOT}[book,test,cluster]", *HELD], check=True)
        freeze = [python, "-m", "pip", "freeze", "--all"]
        return subprocess.run(freeze, check=True, capture_output=True, text=True).stdout


def conda(lock: str) -> str:
    """environment.yml for a lock."""
    wanted = [line for line in lock.splitlines() if line and not line.startswith("#")]
    return CONDA_HEAD + "".join(f"      - {line}\n" for line in wanted)


def main() -> None:
    """Write the files."""
    if "--conda" not in sys.argv[1:]:
        LOCK.write_text(HEAD + "".join(f"{line}\n" for line in pins(resolve())))
    CONDA.write_text(conda(LOCK.read_text()))


if __name__ == "__main__":
    main()
