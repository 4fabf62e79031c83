"""What is inside the archives that are published: the wheel that is installed, and a source distribution made here."""

import csv
import email
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path, PurePosixPath

import pytest

import shiftkern

from helpers.process import output

ROOT = Path(__file__).parent.parent.parent
SOURCES = {
    path.relative_to(ROOT / "python").as_posix()
    for path in (ROOT / "python").rglob("*")
    if path.suffix in (".py", ".pyi", ".typed")
}


def installed() -> importlib.metadata.Distribution:
    """The installed wheel; skips where the source tree stands before it."""
    distribution = importlib.metadata.distribution("shiftkern")
    if not Path(shiftkern.__file__).is_relative_to(Path(str(distribution.locate_file("")))):
        pytest.skip("imported from the source tree")
    return distribution


def stray(names):
    """Names that belong into no archive."""
    folders = {"__pycache__", "target", "build", ".git", ".venv", ".hypothesis"}
    endings = (".pyc", ".orig", ".rej", ".swp", "~", ".log")
    return [name for name in names if folders & set(PurePosixPath(name).parts[:-1]) or name.endswith(endings)]


def check_wheel(names, tags):
    """The sources, one extension for every Python from 3.11 on, and metadata."""
    inside = {name for name in names if name.startswith("shiftkern/") and "__pycache__" not in name}
    extension = {name for name in inside if name.startswith("shiftkern/_native.") and not name.endswith(".pyi")}
    assert len(extension) == 1
    assert next(iter(extension)) in ("shiftkern/_native.abi3.so", "shiftkern/_native.pyd")
    assert inside - extension == SOURCES
    other = {name for name in names if not name.startswith(("shiftkern/", "shiftkern-"))}
    assert all(PurePosixPath(name).stem == "shiftkern" for name in other), other  # the command
    assert tags
    for tag in tags:
        assert tag.startswith("cp311-abi3-"), tag


def test_the_installed_wheel_holds_the_package_and_nothing_else():
    distribution = installed()
    files = [str(file) for file in distribution.files]
    tags = email.message_from_string(distribution.read_text("WHEEL")).get_all("Tag")
    check_wheel(files, tags)
    assert not stray(name for name in files if "__pycache__" not in name)


def test_the_installed_wheel_is_small():
    distribution = installed()
    rows = csv.reader(distribution.read_text("RECORD").splitlines())
    size = sum(int(size) for name, _, size in rows if size)
    print(f"installed: {size / 1e6:.2f} MB")
    assert size < 20e6
    wheels = sorted((ROOT / "dist").glob("shiftkern-*.whl"))
    for wheel in wheels:
        print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.2f} MB")
        assert wheel.stat().st_size < 10e6


def test_metadata_names_what_is_needed():
    distribution = importlib.metadata.distribution("shiftkern")
    installed()
    metadata = distribution.metadata
    needs = [need for need in metadata.get_all("Requires-Dist") if "extra ==" not in need]
    assert {need.split(">")[0].split("=")[0].strip() for need in needs} == {
        "torch", "numpy", "scipy", "pyyaml", "safetensors", "tqdm",
    }  # fmt: skip
    assert metadata["Requires-Python"] == ">=3.11"
    assert {"demo", "peft", "testing"} <= set(metadata.get_all("Provides-Extra"))
    assert metadata["License-Expression"] == "MIT"
    assert (ROOT / "README.md").read_text().strip() == metadata.get_payload().strip()


def test_the_extension_does_not_know_where_it_was_built():
    (extension,) = (path for path in Path(shiftkern.__file__).parent.glob("_native.*") if path.suffix != ".pyi")
    assert str(ROOT).encode() not in extension.read_bytes()


MAKER = Path(sys.executable).parent / "maturin"
needs_maturin = pytest.mark.skipif(
    shutil.which("cargo") is None or not MAKER.exists(), reason="needs cargo, and maturin beside this Python"
)


def make_sdist(folder: Path) -> Path:
    subprocess.run(
        [
            str(MAKER),
            "sdist",
            "--manifest-path",
            str(ROOT / "rust" / "bindings" / "Cargo.toml"),
            "--out",
            str(folder),
        ],
        check=True,
        capture_output=True,
        timeout=100,
        cwd=ROOT,
        env={**os.environ, "CARGO_NET_OFFLINE": "true"},
    )
    (archive,) = folder.glob("*.tar.gz")
    return archive


@needs_maturin
def test_the_source_distribution_holds_all_sources(tmp_path):
    archive = make_sdist(tmp_path)
    with tarfile.open(archive) as opened:
        members = [member.name.partition("/")[2] for member in opened.getmembers() if member.isfile()]
    assert not stray(members)
    assert not [name for name in members if name.endswith((".so", ".pyd", ".png"))]
    python = {name.removeprefix("python/") for name in members if name.startswith("python/")}
    assert python == SOURCES
    rust = {name for name in members if name.startswith("rust/") and name.endswith(".rs") and "/src/" in name}
    assert rust == {path.relative_to(ROOT).as_posix() for path in (ROOT / "rust").glob("*/src/**/*.rs")}
    assert {"pyproject.toml", "Cargo.toml", "Cargo.lock", "README.md", "LICENSE", "PKG-INFO"} <= set(members)
    print(f"{archive.name}: {archive.stat().st_size / 1e6:.2f} MB")
    assert archive.stat().st_size < 3e6


@pytest.mark.slow
@needs_maturin
@pytest.mark.timeout(1800)
def test_the_source_distribution_builds_a_wheel_offline(tmp_path):
    with tarfile.open(make_sdist(tmp_path)) as opened:
        opened.extractall(tmp_path / "source", filter="data")
    (source,) = (tmp_path / "source").iterdir()
    subprocess.run(
        [str(MAKER), "build", "--release", "--locked", "--offline", "--quiet", "--out", str(tmp_path / "dist")],
        check=True,
        timeout=1700,
        cwd=source,
        env={**os.environ, "CARGO_TARGET_DIR": str(tmp_path / "target")},
    )
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    assert "-cp311-abi3-" in wheel.name
    with zipfile.ZipFile(wheel) as opened:
        names = opened.namelist()
        (described,) = [name for name in names if name.endswith(".dist-info/WHEEL")]
        check_wheel(names, email.message_from_bytes(opened.read(described)).get_all("Tag"))
        opened.extractall(tmp_path / "installed")
    script = """
        import torch, shiftkern
        print(shiftkern.norm.channel_moments(torch.ones(4, 2)).mean.tolist(), shiftkern.__file__)
    """
    found = output(script, PYTHONPATH=str(tmp_path / "installed"))
    assert found.startswith("[1.0, 1.0]")
    assert str(tmp_path) in found
