"""What the packages import is what setup.py declares, and the other way round."""

import ast
import re
import runpy
import sys
from pathlib import Path

import pytest
import setuptools

ROOT = Path(__file__).parents[2]

# Modules that have another name than the distribution that they come in.
DISTRIBUTIONS = {
    "fsspec": "fsspec",
    "google.cloud.storage": "google-cloud-storage",
    "orbax": "orbax-checkpoint",
    "ml_collections": "ml-collections",
    "ml_dtypes": "ml-dtypes",
    "tensorboardX": "tensorboardx",
    "espeakng_loader": "espeakng-loader",
    "yaml": "pyyaml",
}
# Modules that an extra brings through another distribution.
COMES_WITH = {"libtpu": "tpu"}
# Modules that users bring or do without; converters says where one is missing.
NOT_DECLARED = {"whisper"}
# Declared for other packages to import: gcsfs for fsspec, and jax's plugins.
IMPORTED_BY_OTHERS = {"gcsfs", "jax"}


class Imports(ast.NodeVisitor):
    """Module name to whether it is imported as soon as the file is, rather than inside a function."""

    def __init__(self, file):
        self.found, self._inside = {}, False
        self.visit(ast.parse(file.read_text(encoding="utf-8")))

    def visit_FunctionDef(self, node):
        before, self._inside = self._inside, True
        self.generic_visit(node)
        self._inside = before

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_If(self, node):
        if ast.unparse(node.test) != "TYPE_CHECKING":
            self.generic_visit(node)

    def visit_Import(self, node):
        for alias in node.names:
            self._add(alias.name)

    def visit_ImportFrom(self, node):
        for alias in node.names if node.module == "google.cloud" else ():
            self._add(f"google.cloud.{alias.name}")
        if node.module != "google.cloud":
            self._add(node.module)

    def visit_Call(self, node):
        """``import_module("name")`` and ``find_spec("name")`` too."""
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name in ("import_module", "find_spec") and isinstance(node.args[0], ast.Constant):
            self._inside, before = True, self._inside
            self._add(node.args[0].value)
            self._inside = before
        self.generic_visit(node)

    def _add(self, name):
        name = name if name.startswith("google.cloud.") else name.partition(".")[0]
        if name not in sys.stdlib_module_names and name not in ("ichigo_jax", "converters"):
            self.found[name] = self.found.get(name, False) or not self._inside


def imports_of(*folders):
    """Module name to (whether some file imports it at once, one such file)."""
    found = {}
    for folder in folders:
        for file in sorted((ROOT / folder).rglob("*.py")):
            for name, at_once in Imports(file).found.items():
                if name not in found or at_once > found[name][0]:
                    found[name] = (at_once, str(file.relative_to(ROOT)))
    return found


def distribution(module):
    return DISTRIBUTIONS.get(module, module).lower().replace("_", "-")


def name_of(requirement):
    return re.match(r"[A-Za-z0-9._-]+", requirement)[0].lower().replace("_", "-")


@pytest.fixture(scope="module")
def declared():
    """The arguments of ``setup(…)`` in setup.py, with the names of the distributions that are required."""
    given = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", lambda **arguments: given.update(arguments))
        patch.chdir(ROOT)
        runpy.run_path(str(ROOT / "setup.py"))
    required = {name_of(requirement) for requirement in given["install_requires"]}
    return required, {extra: {name_of(each) for each in needed} for extra, needed in given["extras_require"].items()}, given


@pytest.mark.parametrize("package", ["ichigo_jax", "converters"])
def test_what_is_imported_is_declared(package, declared):
    required, extras, _ = declared
    for module, (at_once, file) in imports_of(package).items():
        if module in NOT_DECLARED:
            assert not at_once, f"{file} imports {module} before it can say that it is missing"
        elif distribution(module) not in required:
            assert not at_once, f"{file} imports {module}, which `pip install .` does not install"
            optional = set().union(*(names for extra, names in extras.items() if extra != "test"))
            assert module in COMES_WITH or distribution(module) in optional, f"{file} imports {module}, which no extra declares"
    assert COMES_WITH["libtpu"] in extras


def test_what_is_declared_is_imported(declared):
    required, extras, _ = declared
    imported = {distribution(module) for module in imports_of("ichigo_jax", "converters")}
    assert required - imported == set()
    scripts = imported | {distribution(module) for module in imports_of("launch", "benchmarks")}
    optional = {extra: names - scripts - IMPORTED_BY_OTHERS for extra, names in extras.items() if extra != "test"}
    assert optional == {extra: set() for extra in optional}


def test_what_the_tests_import_is_declared(declared):
    required, extras, _ = declared
    own = {file.stem for file in (ROOT / "tests").rglob("*.py")} | {"tests"}
    for module, (at_once, file) in imports_of("tests").items():
        if at_once and module not in own:
            assert distribution(module) in required | extras["test"], f"{file} imports {module}"


def test_what_chat_templates_need_is_declared(declared):
    """transformers imports jinja2 for them and leaves it to others to require it."""
    required, _, _ = declared
    assert "jinja2" in required


def test_versions_that_compute_wrong_results_are_excluded(declared):
    _, _, given = declared
    assert "!=0.10.2" in next(each for each in given["install_requires"] if name_of(each) == "jax")
