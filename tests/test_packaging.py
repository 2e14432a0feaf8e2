"""What is built and installed: kernels inside the package, nothing beside it, and no name of others taken."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

import bilinear_ops

ROOT = Path(bilinear_ops.__file__).parents[1]
pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the source tree")


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | environment
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A copy of the source, so that building leaves nothing in the tree."""
    copy = tmp_path_factory.mktemp("source") / "bilinear_ops"
    ignore = shutil.ignore_patterns(".git", ".venv", ".*_cache", "__pycache__", "*.egg-info", "build", "dist")
    shutil.copytree(ROOT, copy, symlinks=True, ignore=ignore)
    return copy


@pytest.fixture(scope="module")
def dist(tree, tmp_path_factory) -> Path:
    """A source distribution, and the wheel built from it."""
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, cwd=tree)
    return out


@pytest.fixture(scope="module")
def installed(dist, tmp_path_factory) -> Path:
    """The wheel, unpacked as an installer would."""
    site = tmp_path_factory.mktemp("site")
    (wheel,) = dist.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    return site


@pytest.fixture(scope="module")
def unpacked(dist, tmp_path_factory) -> Path:
    """The source distribution, unpacked."""
    folder = tmp_path_factory.mktemp("unpacked")
    (archive,) = dist.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data")
    (root,) = folder.iterdir()
    return root


def files(root: Path, *folders: str) -> set[str]:
    found = (p for folder in folders for p in (root / folder).rglob("*"))
    return {str(p.relative_to(root)) for p in found if p.is_file() and "__pycache__" not in p.parts}


def test_sdist_holds_what_its_tests_read(unpacked):
    for folders in (("bench", "bilinear_ops", "docs", "examples", "tests"), ("kernels",)):
        assert files(unpacked, *folders) == files(ROOT, *folders) and files(ROOT, *folders)
    for name in ("CHANGELOG.md", "CONTRIBUTING.md", "Makefile", "README.md", "constraints.txt"):
        assert (unpacked / name).read_bytes() == (ROOT / name).read_bytes()


@pytest.mark.ci
def test_sdist_runs_its_own_tests(unpacked):
    """Every test is found; those that read files of the tree, and a kernel's, pass."""
    collected = run(sys.executable, "-m", "pytest", "-q", "--collect-only", cwd=unpacked)
    assert "error" not in collected.splitlines()[-1]
    reading = ("bench", "config", "mutate", "pickles", "readme", "rooms", "gated_gates")
    run(sys.executable, "-m", "pytest", "-q", "-x", *(f"tests/test_{name}.py" for name in reading), cwd=unpacked)


def test_wheel_is_pure_and_complete(dist, installed):
    version = bilinear_ops.__version__
    assert sorted(p.name for p in dist.iterdir()) == [
        f"bilinear_ops-{version}-py3-none-any.whl",
        f"bilinear_ops-{version}.tar.gz",
    ]
    assert sorted(p.name for p in installed.iterdir()) == ["bilinear_ops", f"bilinear_ops-{version}.dist-info"]
    files = {str(p.relative_to(installed)) for p in (installed / "bilinear_ops").rglob("*") if p.is_file()}
    package = {str(p.relative_to(ROOT)) for p in (ROOT / "bilinear_ops").rglob("*.py")}
    kernels = {f"bilinear_ops/{p.relative_to(ROOT)}" for p in (ROOT / "kernels").rglob("*.py")}
    assert files == package | kernels | {"bilinear_ops/py.typed"}
    assert "bilinear_ops/kernels/gated.py" in files
    assert "bilinear_ops/kernels/__init__.py" not in files


# a layer through the interpreted kernels, from wherever bilinear_ops is found
USE = """
import bilinear_ops, torch
from bilinear_ops.kernels import gated
x, w = torch.randn(4, 16), torch.randn(16, 16)
y = bilinear_ops.gated_bilinear(x, w, w, impl="triton")
torch.testing.assert_close(y, bilinear_ops.reference.gated_bilinear(x, w, w))
print(bilinear_ops.__file__, gated.__file__, sep="\\n")
"""
FOREIGN = "import kernels; print(kernels.MARK)"


@pytest.fixture
def foreign(tmp_path) -> Path:
    """A place that holds somebody else's package of that name."""
    package = tmp_path / "foreign" / "kernels"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("MARK = 'theirs'\n")
    return package.parent


@pytest.mark.ci
def test_wheel_runs_beside_a_foreign_kernels_package(installed, foreign, tmp_path):
    pytest.importorskip("triton")
    path = os.pathsep.join(map(str, (installed, foreign)))
    out = run(sys.executable, "-c", USE + FOREIGN, cwd=tmp_path, PYTHONPATH=path, TRITON_INTERPRET="1")
    package = installed / "bilinear_ops"
    assert out.splitlines() == [str(package / "__init__.py"), str(package / "kernels" / "gated.py"), "theirs"]


def test_source_tree_leaves_the_name_kernels_alone(foreign):
    """With our folder `kernels/` in the working directory, first on the path."""
    assert run(sys.executable, "-c", FOREIGN, cwd=ROOT, PYTHONPATH=str(foreign)) == "theirs\n"


@pytest.mark.ci
def test_editable_install_runs(tree, tmp_path):
    """Into an environment of its own that sees this one's packages."""
    pytest.importorskip("triton")
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv", cwd=tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip()
    (Path(site) / "parent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    install = ["install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--editable", tree]
    run(sys.executable, "-m", "pip", "--python", python, *install, cwd=tmp_path)
    out = run(python, "-c", USE, cwd=tmp_path, TRITON_INTERPRET="1")
    # through the symlink or past it, the kernels are those of the tree
    assert [Path(line).resolve() for line in out.splitlines()] == [
        tree / "bilinear_ops" / "__init__.py",
        tree / "kernels" / "gated.py",
    ]


@pytest.mark.ci
@pytest.mark.parametrize("left", ("../kernels", None), ids=("a file", "nothing"))
def test_a_tree_without_symbolic_links_runs(left, tree, tmp_path):
    """As it is unpacked from an archive, or checked out with core.symlinks=false."""
    pytest.importorskip("triton")
    copy = tmp_path / "copy"
    shutil.copytree(tree, copy, symlinks=True)
    link = copy / "bilinear_ops" / "kernels"
    link.unlink()
    if left:
        link.write_text(left)
    out = run(sys.executable, "-c", USE, cwd=copy, TRITON_INTERPRET="1")
    assert out.splitlines() == [str(copy / "bilinear_ops" / "__init__.py"), str(copy / "kernels" / "gated.py")]


def test_a_package_without_its_kernels_names_the_remedy(tree, tmp_path):
    shutil.copytree(tree / "bilinear_ops", tmp_path / "bilinear_ops", ignore=shutil.ignore_patterns("kernels"))
    done = subprocess.run([sys.executable, "-c", "import bilinear_ops"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert "ImportError: bilinear_ops.kernels is missing from" in done.stderr and "pip install ." in done.stderr
