"""The floors: a module imports only from the floors below its own; heavy imports stay inside functions."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "edgeft"
FLOORS = [
    {"errors", "__init__", "agent"},
    {"progress", "resources"},
    {"tool"},
    {"stage"},
    {"store"},
    {"llamacpp", "corpus"},
    {"grid"},
    {"checkpoint", "training", "fit", "bundle", "runtimes", "onnx", "servers", "awq"},
    {"export", "parity", "merging", "chat", "doctor", "boards", "updates"},
    {"image"},
    {"emulator"},
    {"estimates"},
    {"staging"},
    {"serving"},
    {"stages"},
    {"recipe"},
    {"plan"},
    {"isolate"},
    {"build"},
    {"console", "report"},
    {"commands"},
    {"cli"},
    {"__main__"},
]
HEAVY = {"torch", "transformers", "peft", "datasets", "bitsandbytes", "gguf", "numpy", "llama_cpp", "huggingface_hub",
         "datasketch", "safetensors", "zstandard", "jinja2", "scipy", "matplotlib", "onnx", "onnx_ir", "onnxruntime", "onnxruntime_genai", "optimum",
         "compressed_tensors"}  # fmt: skip
PIPELINE = {"stage", "store", "staging", "serving", "plan", "build", "recipe", "stages"}
DOMAIN = {
    "awq",
    "corpus",
    "llamacpp",
    "training",
    "fit",
    "parity",
    "checkpoint",
    "merging",
    "bundle",
    "export",
    "doctor",
    "chat",
    "grid",
    "boards",
    "runtimes",
    "agent",
    "updates",
    "image",
    "emulator",
    "servers",
    "onnx",
}


def floor(part: str) -> int:
    return next(i for i, names in enumerate(FLOORS) if part in names)


def imports(tree: ast.Module):
    for node in tree.body:  # module level only
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from (
                [f"edgeft.{a.name}" for a in node.names] if node.module == "edgeft" else [node.module]
            )
        elif isinstance(node, ast.Import):
            yield from (a.name for a in node.names)


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path.relative_to(PACKAGE), list(imports(ast.parse(path.read_text())))


def test_imports_point_down():
    for path, names in modules():
        part = path.parts[0].removesuffix(".py")
        for name in names:
            if name.startswith("edgeft.") and name != "edgeft.__version__":
                other = name.split(".")[1]
                inside = other == part and part != "stages"
                registry = path.as_posix() == "stages/__init__.py"
                assert inside or registry or floor(other) < floor(part), f"{path} imports {name}"


def test_the_domain_packages_know_nothing_of_the_pipeline():
    for path, names in modules():
        if path.parts[0].removesuffix(".py") in DOMAIN:
            for name in names:
                assert not (name.startswith("edgeft.") and name.split(".")[1] in PIPELINE), (
                    f"{path} imports {name}"
                )


def test_heavy_imports_stay_inside_functions():
    for path, names in modules():
        assert not HEAVY & {n.split(".")[0] for n in names}, path


def test_files_stay_short():
    for path in PACKAGE.rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 330, path


def test_every_stage_file_is_registered_and_needs_point_backwards():
    from edgeft.stages import STAGES

    files = {p.stem for p in (PACKAGE / "stages").glob("*.py")} - {"__init__"}
    assert files == {s.run.__module__.rsplit(".", 1)[1] for s in STAGES}
    for i, stage in enumerate(STAGES):
        above = {name for s in STAGES[:i] for name in (s.name, s.id, *s.replaces)}
        assert set(stage.needs) <= above, stage.id


def test_help_imports_no_torch_and_nothing_else_that_is_heavy():
    code = (
        "import sys; sys.argv = ['edgeft', '--help']\n"
        "from edgeft.cli import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        f"print('heavy:', sorted({HEAVY!r} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "build" in out and out.rstrip().endswith("heavy: []")
