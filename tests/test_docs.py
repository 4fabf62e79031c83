"""The documents hold: examples run, links lead somewhere, public names are described."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from shiftkern import attention, merge, norm, ot, peft, rotation, testing, tta

from helpers import process

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
WRITTEN_BY_MAKE = {ROOT / "docs" / "benchmarks.md"}
TEXTS = [page for page in (*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md") if page not in WRITTEN_BY_MAKE]


def python_blocks(text: str) -> str:
    """All Python examples as one script; other lines are empty, so that line numbers in errors are the document's."""
    kept, inside = [], False
    for line in text.splitlines():
        fence = line.startswith("```")
        kept.append(line if inside and not fence else "")
        if fence:
            inside = line == "```python"
    return "\n".join(kept)


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


README = ROOT / "README.md"
WITH_EXAMPLES = [page for page in PAGES if page != README and python_blocks(page.read_text()).strip()]


def test_examples_are_found():
    assert len(WITH_EXAMPLES) >= 5


@pytest.mark.parametrize("page", WITH_EXAMPLES, ids=name)
def test_examples_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    process.output(python_blocks(page.read_text()), deadline=90)


def test_readme_runs_and_shows_adaptation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    lines = process.output(python_blocks(README.read_text()), deadline=90).splitlines()
    right = {line.split()[0]: float(re.search(r"([\d.]+)% right", line)[1]) for line in lines}
    assert right["BatchNormAdapt"] > right["Source"] + 20
    assert right["Tent"] > right["Source"] + 20


@pytest.mark.parametrize("page", TEXTS, ids=name)
def test_links_lead_somewhere(page: Path):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        assert not target.startswith(("http:", "https:")), f"{target}: the documents stand on their own"
        path = (page.parent / target.partition("#")[0]).resolve()
        assert path.exists() or path in WRITTEN_BY_MAKE, target


def test_the_navigation_names_every_page_once():
    entries = re.findall(r"^ +- .+: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    pages = {page.name for page in PAGES if page.parent.name == "docs"} | {page.name for page in WRITTEN_BY_MAKE}
    assert sorted(entries) == sorted(pages)


@pytest.mark.parametrize("public", norm.__all__)
def test_the_guide_to_norm_describes(public: str):
    assert re.search(rf"`{public}(?!\w)", (ROOT / "docs" / "guide-norm.md").read_text())


@pytest.mark.parametrize("public", tta.__all__)
def test_the_guide_to_tta_describes(public: str):
    assert re.search(rf"`{public}(?!\w)", (ROOT / "docs" / "guide-tta.md").read_text())


def test_the_table_of_methods_is_that_of_the_library():
    page = runpy.run_path(str(ROOT / "tools" / "methods_page.py"))["page"]()
    assert (ROOT / "docs" / "methods.md").read_text() == page, "make docs writes it anew"


@pytest.mark.parametrize("public", testing.__all__)
def test_the_page_on_trust_describes(public: str):
    assert re.search(rf"\b{public}\b", (ROOT / "docs" / "trust.md").read_text())


def test_the_site_builds_without_a_warning(tmp_path: Path):
    pytest.importorskip("mkdocs")
    pytest.importorskip("material")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )
    assert done.returncode == 0, done.stderr
    for page in PAGES:
        if page.parent.name == "docs" and page.stem != "index":
            assert (tmp_path / page.stem / "index.html").exists()


def test_paths_in_contributing_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    new = set(re.findall(r"New file `([^`]+)`", text))
    assert len(new) == 3
    paths = set(re.findall(r"`((?:rust|python|tests|benches)/[\w./-]+)`", text)) - new
    assert len(paths) > 10
    for path in paths:
        assert (ROOT / path).exists(), path


def test_the_recipe_is_included_in_the_site():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    assert text.count("--8<-- [start:kernel]") == text.count("--8<-- [end:kernel]") == 1
    assert '--8<-- "CONTRIBUTING.md:kernel"' in (ROOT / "docs" / "adding-a-kernel.md").read_text()


@pytest.mark.parametrize("public", ot.__all__)
def test_the_guide_to_ot_describes(public: str):
    assert re.search(rf"`{public}(?!\w)", (ROOT / "docs" / "guide-ot.md").read_text())


@pytest.mark.parametrize("public", attention.__all__)
def test_the_guide_to_attention_describes(public: str):
    assert re.search(rf"`{public}(?!\w)", (ROOT / "docs" / "guide-attention.md").read_text())


@pytest.mark.parametrize("public", merge.__all__)
def test_the_guide_to_merge_describes(public: str):
    assert re.search(rf"`{public}(?!\w)", (ROOT / "docs" / "guide-merge.md").read_text())


@pytest.mark.parametrize("public", peft.__all__)
def test_the_guide_to_peft_describes(public: str):
    assert re.search(rf"`{public}(?!\w)", (ROOT / "docs" / "guide-peft.md").read_text())


@pytest.mark.parametrize("public", rotation.__all__)
def test_the_guide_to_rotation_describes(public: str):
    assert re.search(rf"`{public}(?!\w)", (ROOT / "docs" / "guide-rotation.md").read_text())
