"""The pages of the documentation site: those that are written, and those made of code.

    python docs/site/stage.py build/docs/source

Written pages stay what a code host shows: they are copied, and links that leave
``docs/`` are led to the page that stands for what they name. Made of code are a page
for each objective (or the second half of one that is written), the settings of every
run, and the reference of each room of the package. An objective that has a gin file
is on the site without further ado.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCS, RUNS = ROOT / "docs", ROOT / "gin_configs" / "runs"
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))

# The sidebar. What is not there (yet) is left out, and what nobody listed comes last.
GROUPS = {
    "Start": ("start", "overview", "choosing", "examples"),
    "Data and models": ("data", "seqio", "pretrained", "adapters", "t5x"),
    "Methods": ("objectives", "paper_index", "settings"),
    "Use": ("decoding", "steering", "judges", "serving"),
    "Run": ("runs", "scaling", "performance", "faults"),
    "Build": ("extending", "api/index", "architecture", "rules", "contributing"),
    "Releases": ("changelog",),
}
# Files above docs/ that are pages, too.
ABOVE = {
    "README.md": "overview.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "examples/README.md": "examples.md",
    "docs/README.md": "index.md",
}
# Of rooms whose ``__init__`` names nothing: the modules that others call.
MODULES = {
    "cluster": ("mesh", "distributed"),
    "inference": ("policy", "generation", "score", "evaluation", "steering"),
    "interop": ("huggingface", "t5x", "opening"),
    "pipelines": ("study", "iterate", "compare"),
    "training": (
        *("run", "train", "inputs", "optimizers", "schedules", "sampling"),
        *("checkpoints", "scoring", "step"),
    ),
}
# What no caller needs: the command line is told by ``--help``.
_NO_REFERENCE = ("cli", "world", "report")
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
_MACRO = re.compile(r"^([A-Z][A-Z0-9_]*) = (.+)$", re.M)
_BINDINGS = re.compile(r"^([\w./]+):\n((?:  .*\n?)+)", re.M)
_OBJECTIVE = re.compile(r"^OBJECTIVE = @(?:\w+\.)*objectives\.(\w+)", re.M)


def pages() -> dict[str, str]:
    """Where each written page and picture of the repository is staged."""
    own = {
        str(path.relative_to(ROOT)): str(path.relative_to(DOCS))
        for path in sorted(DOCS.rglob("*"))
        if path.is_file() and DOCS / "site" not in path.parents
    }
    found = own | {n: page for n, page in ABOVE.items() if (ROOT / n).exists()}
    scripts = {f"examples/{p.name}": f"examples/{p.stem}.md" for p in EXAMPLES}
    return found | scripts | {"gin_configs/runs/train.gin": "settings.md"}


def title(source: str) -> str:
    """What a written page is called on the site."""
    if source == "README.md":
        return "Overview"
    return (ROOT / source).read_text("utf-8").splitlines()[0].strip("# ")


def led(text: str, source: str, staged: dict[str, str]) -> str:
    """A page's text with links to what is on the site.

    A file or folder of ``jaxalign/`` is its room's reference; what is not on the site
    keeps its text and loses its link. Names of files are titles.
    """
    here = Path(staged[source]).parent

    def lead(found: re.Match[str]) -> str:
        mark, label, target = found.groups()
        if re.match(r"[a-z]+:", target) or target.startswith("#"):
            return found[0]
        name, hash_, anchor = target.partition("#")
        named = os.path.normpath(ROOT / Path(source).parent / name)
        relative = os.path.relpath(named, ROOT)
        page = staged.get(relative)
        parts = Path(relative).parts
        if page is None and parts[0] == "jaxalign" and len(parts) > 1:
            page, hash_, anchor = f"api/{Path(parts[1]).stem}.md", "", ""
            if not (ROOT / "jaxalign" / parts[1] / "__init__.py").exists():
                page = None
        if page is None:
            return label
        if re.fullmatch(r"[\w./]+\.md", label):
            label = title(relative)
        return f"{mark}[{label}]({os.path.relpath(page, here)}{hash_}{anchor})"

    # Blocks of code and `code` are no text.
    pieces = re.split(r"(^```.*?^```|`[^`\n]+`(?!\]))", text, flags=re.M | re.S)
    return "".join(
        piece if i % 2 else _LINK.sub(lead, piece) for i, piece in enumerate(pieces)
    )


# ---- Objectives ----------------------------------------------------------------------


def objectives() -> dict[str, str]:
    """The class of each objective's gin file, by the file's name."""
    found = {}
    for path in sorted(RUNS.glob("*.gin")):
        objective = _OBJECTIVE.search(path.read_text("utf-8"))
        if objective:
            found[path.stem] = objective[1]
    return found


def macros(text: str, within: str = "") -> Iterator[tuple[str, str, str]]:
    """Name, default and remark of each setting that a gin file gives.

    A remark is the comment behind it, or what the docstring of the class or function
    that takes it says.

    Args:
      text: the file's, or a part of it.
      within: the whole file, where the settings are handed on.
    """
    flags = documented(
        "verbs.Settings"
    ).values()  # "the schedule's peak (LEARNING_RATE)"
    takers = {f[2]: f[1] for f in (re.match(r"(.*) \((\w+)\)", t) for t in flags) if f}
    for taker, bindings in _BINDINGS.findall(within or text):
        said = documented(taker)
        for parameter, macro in re.findall(r"(\w+) = %(\w+)", bindings):
            if parameter in said:
                takers[macro] = said[parameter]
    for name, rest in _MACRO.findall(text):
        value, _, remark = rest.partition("  # ")
        yield name, value.strip(), remark.strip() or takers.get(name, "")


def documented(taker: str) -> dict[str, str]:
    """What a docstring says of each parameter of what gin calls ``module.Name``."""
    module, _, name = taker.split("/")[-1].rpartition(".")
    package = ROOT / "jaxalign"
    files = [package / room / f"{module}.py" for room in ("training", "cli")]
    files += (package / module).glob("*.py")
    for path in filter(Path.is_file, files):
        for node in ast.parse(path.read_text("utf-8")).body:
            if getattr(node, "name", None) == name:
                said = re.sub(r"\n {2,}", "\n", ast.get_docstring(node) or "")
                parts = re.split(r"^(?:Attributes|Args):\n", said, flags=re.M)
                text = " ".join(parts[-1].split("\n\n")[0].splitlines())
                found = re.split(r"(?:^| )([*\w]+(?:, `?\w+`?)*): (?![^{]*\})", text)
                return dict(zip(found[1::2], found[2::2], strict=True))
    return {}


def table(rows: Iterator[tuple[str, str, str]]) -> str:
    """Settings as a table of Markdown."""
    lines = ["| setting | default | |", "| --- | --- | --- |"]
    for name, value, remark in rows:
        cells = (f"`{name}`", f"`{value}`", remark)
        lines.append("| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |")
    return "\n".join(lines) + "\n"


def made_page(name: str, class_name: str) -> str:
    """A page of an objective that nobody has written one of."""
    text = (RUNS / f"{name}.gin").read_text("utf-8")
    head = re.match(r"(?:#.*\n)*", text)[0]
    about = " ".join(line.strip("# ") for line in head.splitlines())
    own = (row for row in macros(text) if row[0] != "OBJECTIVE")
    return (
        f"# {class_name}\n\n{about}\n\n"
        f"```\njaxalign train --gin_file=runs/{name}.gin --data=rows.jsonl "
        f"--run_dir=runs/{name} \\\n    --checkpoint=runs/sft\n```\n\n{table(own)}"
    )


def reference(name: str, class_name: str, texts: dict[str, str]) -> str:
    """The second half of an objective's page: papers, its class, what runs share."""
    papers = [
        f"[{text.splitlines()[0].strip('# ')}](../{page})"
        for page, text in sorted(texts.items())
        if page.startswith("papers/") and f"(../objectives/{name}.md)" in text
    ]
    found = f"\nSettings of the paper: {', '.join(papers)}.\n" if papers else ""
    return (
        f"{found}\n## In Python\n\n```{{eval-rst}}\n"
        f".. autoclass:: jaxalign.objectives.{class_name}\n```\n\n"
        "What every run has beside these: [settings](../settings.md).\n"
    )


def settings_page() -> str:
    """What `runs/train.gin` gives every run, in its sections."""
    text = (RUNS / "train.gin").read_text("utf-8")
    _, *parts = re.split(r"^# ---- (.+?)(?:: .*?)? -+\n", text, flags=re.M)
    sections = zip(parts[::2], parts[1::2], strict=True)
    lines = [
        "# Settings of every run\n",
        "Each is `--gin.NAME=VALUE` on the command line, a line of a gin file, an",
        "argument of `jaxalign.train`. `runs/train.gin` gives these defaults, and an",
        "objective's gin file some of its own.\n",
    ]
    for heading, body in sections:
        if _MACRO.search(body):
            lines += [
                f"## {heading[0].upper()}{heading[1:]}\n",
                table(macros(body, text)),
            ]
    return "\n".join(lines)


# ---- Reference -----------------------------------------------------------------------


def rooms() -> dict[str, list[str]]:
    """The modules that a room's reference shows, by room."""
    found = {}
    for path in sorted((ROOT / "jaxalign").glob("*/__init__.py")):
        room = path.parent.name
        if room in _NO_REFERENCE:
            continue
        tree = ast.parse(path.read_text("utf-8"))
        public = any(
            isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
            for node in tree.body
        )
        listed = [f"jaxalign.{room}"] * public
        listed += [
            f"jaxalign.{room}.{name}"
            for name in MODULES.get(room, ())
            if (path.parent / f"{name}.py").exists()
        ]
        if listed:
            found[room] = listed
    return found


def room_page(room: str, modules: list[str]) -> str:
    """The reference of a room."""
    package = f"jaxalign.{room}"
    lines = [f"# {package}", ""]
    if package not in modules:
        lines += ["```{eval-rst}", f".. automodule:: {package}", "```", ""]
    for module in modules:
        if module != package:
            lines += [f"## {module}", ""]
        lines += ["```{eval-rst}", f".. automodule:: {module}", "   :members:"]
        if module == "jaxalign.objectives":  # each has a page of its own
            lines.append(f"   :exclude-members: {', '.join(objectives().values())}")
        lines += ["```", ""]
    return "\n".join(lines)


def api_index(listed: dict[str, list[str]]) -> str:
    """The page above all rooms: what `jaxalign` itself offers."""
    lines = [
        "# Python\n",
        "```{eval-rst}",
        ".. automodule:: jaxalign",
        "   :members: load, train",
        "```\n",
        "## Rooms\n",
        "[Architecture](../architecture.md) says how they build on each other; each",
        "objective is on [its own page](../objectives.md).\n",
    ]
    return "\n".join([*lines, toctree(listed, hidden=False)])


# ---- The site ------------------------------------------------------------------------


def toctree(names: object, caption: str = "", hidden: bool = True) -> str:
    lines = ["```{toctree}", ":maxdepth: 1", *[":hidden:"] * hidden]
    lines += [f":caption: {caption}"] * bool(caption)
    return "\n".join([*lines, "", *names, "```", ""])


def stage(target: Path) -> dict[str, str]:
    """Writes all pages; returns their text by name."""
    staged = pages()
    texts: dict[str, str] = {}
    shutil.rmtree(target, ignore_errors=True)
    for source, page in staged.items():
        if source.endswith(".md"):
            texts[page] = led((ROOT / source).read_text("utf-8"), source, staged)
        elif not page.endswith(".md"):
            (target / page).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / source, target / page)
    for name, class_name in objectives().items():
        page = f"objectives/{name}.md"
        texts[page] = texts.get(page) or made_page(name, class_name)
        texts[page] += reference(name, class_name, texts)
    texts["settings.md"] = settings_page()
    for path in EXAMPLES:
        code = f"```python\n{path.read_text('utf-8')}```\n"
        texts[f"examples/{path.stem}.md"] = f"# {path.name}\n\n{code}"
    listed = rooms()
    texts |= {f"api/{r}.md": room_page(r, names) for r, names in listed.items()}
    texts["api/index.md"] = api_index(listed)
    parts = {
        "objectives": "objectives",
        "paper_index": "papers",
        "examples": "examples",
    }
    for name, folder in parts.items():
        page = f"{name}.md"
        below = sorted(p for p in texts if p.startswith(f"{folder}/"))
        texts[page] += "\n" + toctree(p.removesuffix(".md") for p in below)
    texts["index.md"] += "\n" + sidebar(texts)
    for page, text in texts.items():
        (target / page).parent.mkdir(parents=True, exist_ok=True)
        (target / page).write_text(text, "utf-8")
    return texts


def sidebar(texts: dict[str, str]) -> str:
    """The groups of pages; those that no group names are the last one."""
    top = {p.removesuffix(".md") for p in texts if "/" not in p} - {"index"}
    top |= {"api/index"}
    named = {name for group in GROUPS.values() for name in group}
    groups = {**GROUPS, "More": tuple(sorted(top - named))}
    trees = [
        toctree([_named(name) for name in group if name in top], caption)
        for caption, group in groups.items()
        if top & set(group)
    ]
    return "\n".join(trees)


def _named(name: str) -> str:
    return "Overview <overview>" if name == "overview" else name


if __name__ == "__main__":
    written = stage(Path(sys.argv[1]))
    print(f"{len(written)} pages in {sys.argv[1]}")
